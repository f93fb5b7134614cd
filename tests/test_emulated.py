"""An emulated device: the model's shape, another device's time, everything else real."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Case

from fastdecode import LLM, SamplingParams
from fastdecode.errors import ConfigError, ModelError
from fastdecode.modelling.calibration import Calibration, write_calibration
from fastdecode.modelling.perf_model import PerfModel
from fastdecode.modelling.simulation.devices import DEVICES, gpu_model
from fastdecode.observe.step_log import read_step_log
from gpu_sworker import EmulatedSWorker, FlatBatch, SWorker, describe_model

PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt-neox"])
def test_described_as_the_probe_finds_it(family: str, case: Callable[[str], Case]) -> None:
    directory = case(family).directory
    described, parameters = describe_model(directory, "emulated:a10")
    real = SWorker(directory).facts
    assert (described.vocab_size, described.max_positions) == (real.vocab_size, real.max_positions)
    assert described.num_parameters == real.num_parameters
    for ours, theirs in zip(described.layers, real.layers, strict=True):
        assert (ours.num_q_heads, ours.num_kv_heads, ours.head_dim) == (
            theirs.num_q_heads,
            theirs.num_kv_heads,
            theirs.head_dim,
        )
    assert 0 < parameters.of_block * len(real.layers) < real.num_parameters


def test_times_are_the_papers() -> None:
    """Table 2: a block of 16 h² weights, h = 4096, on the A10: 1.46 ms for one token, 7.08 ms for 1024; figure 1, from
    which the model is, shows other runs."""
    model = gpu_model("a10", 16 * 4096**2, 32)
    assert model.s_seconds(1) == pytest.approx(1.46e-3, rel=0.1)
    assert model.s_seconds(1024) == pytest.approx(7.08e-3, rel=0.2)
    for device in DEVICES:
        model = gpu_model(device, 1 << 28, 8)
        assert all(b >= a for a, b in zip(model.seconds, model.seconds[1:], strict=False))
    assert gpu_model("h100", 1 << 28, 8).s_seconds(256) < gpu_model("v100", 1 << 28, 8).s_seconds(256)


def test_a_block_takes_its_time_and_no_less(llama: Case) -> None:
    facts, _ = describe_model(llama.directory, "emulated:a10")
    sworker = EmulatedSWorker(facts, lambda tokens: tokens * 1e-3)
    for tokens in (1, 7):
        batch = FlatBatch(np.zeros(tokens, np.int64), np.zeros(tokens, np.int64), np.array([tokens - 1]))
        forward, began, calls = sworker.forward(batch), time.perf_counter(), 0
        call = next(forward)
        with pytest.raises(StopIteration) as end:
            while True:
                calls += 1
                assert (call.layer, call.q.shape) == (calls - 1, (tokens, 4, 16))
                transfer = sworker.stage(call, slice(None), slice(None))
                assert not transfer.is_done()
                q, k, v = transfer.wait()
                assert transfer.is_done() and q.shape == (tokens, 4, 16) and k.shape == v.shape == (tokens, 2, 16)
                call = forward.send(call.q)
        assert calls == 3 and time.perf_counter() - began >= 3 * tokens * 1e-3
        assert end.value.value.shape[0] == 1


def test_blocks_are_done_one_after_another(llama: Case) -> None:
    """Like a device that is given work ahead of time: two launched at once take twice as long."""
    facts, _ = describe_model(llama.directory, "emulated:a10")
    sworker = EmulatedSWorker(facts, lambda tokens: 0.05)
    batch = FlatBatch(np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([0]))
    began = time.perf_counter()
    first, second = [sworker.stage(next(sworker.forward(batch)), slice(1), slice(None)) for _ in range(2)]
    assert time.perf_counter() - began < 0.05
    second.wait()
    assert first.is_done() and time.perf_counter() - began >= 0.1
    assert first.block_ns[1] == second.block_ns[0]


@pytest.mark.parametrize("options", [{}, {"transport": "shm", "num_r_workers": 2}])
def test_whole_runs(options: dict[str, object], llama: Case, tmp_path: Path) -> None:
    log = tmp_path / "steps.jsonl"
    with LLM(llama.directory, device="emulated:h100", skip_tokenizer_init=True, step_log=log, **options) as llm:
        outputs = llm.generate(llama.prompts, PARAMS, use_tqdm=False)
        assert llm.facts.device == "emulated:h100"
    assert [len(output.outputs[0].token_ids) for output in outputs] == [6] * len(llama.prompts)
    records = list(read_step_log(log))
    of_lanes = [max(record.num_decodes for record in records if record.lane == lane) for lane in (0, 1)]
    assert of_lanes == [len(llama.prompts) // 2] * 2


def test_a_calibration_is_a_profile(llama: Case, tmp_path: Path) -> None:
    model = PerfModel((1, 64), (0.002, 0.002), 1e-9, 3)
    path = tmp_path / "machine.json"
    write_calibration(Calibration("llama", "some", "float32", "float16", "here", 1, 1, "2026-01-01", model), path)
    began = time.perf_counter()
    with LLM(llama.directory, device=f"emulated:{path}", skip_tokenizer_init=True) as llm:
        llm.generate(llama.prompts[:1], PARAMS, use_tqdm=False)
    assert time.perf_counter() - began >= 6 * 3 * 0.002


def test_unknown_profiles_and_models(llama: Case, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a10, v100, h100, or a file"):
        LLM(llama.directory, device="emulated:tpu")
    with pytest.raises(ModelError, match="no directory"):
        LLM(tmp_path / "none", device="emulated:a10")
