"""Opening and closing an LLM: every option that cannot work says why, and what to change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Case, quiet

from fastdecode import LLM, EngineConfig, SamplingParams
from fastdecode.engine import capacity
from fastdecode.errors import ConfigError, ModelError, RWorkerUnreachable
from fastdecode.observe.step_log import read_step_log

GREEDY = SamplingParams(temperature=0, max_tokens=12)


def test_skip_tokenizer_init(demo_model: Path) -> None:
    with LLM(demo_model, skip_tokenizer_init=True) as llm:
        ok, text, stop = quiet(llm, [[1, 2, 3], "text", [1]], [GREEDY, GREEDY, SamplingParams(stop="x")])
        assert ok.error is None and ok.outputs[0].text == "" and ok.outputs[0].token_ids
        assert text.error and "needs the tokenizer" in text.error.message
        assert stop.error and "stop strings need a tokenizer" in stop.error.message
        with pytest.raises(ConfigError, match="needs the tokenizer"):
            llm.chat([{"role": "user", "content": "x"}])


def test_missing_tokenizer(llama: Case) -> None:
    with pytest.raises(ConfigError, match="skip_tokenizer_init=True"):
        LLM(llama.directory)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"num_rworkers": 2}, "no option 'num_rworkers'; did you mean 'num_r_workers'"),
        ({"gpu": 1}, "no option 'gpu'"),
        ({"num_r_workers": -1}, "num_r_workers must be a whole number from 0"),
        ({"micro_batches": 0}, "micro_batches"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype must be one of"),
        ({"transport": "carrier-pigeon"}, "transport must be one of inproc, shm, ipc, tcp, mpi"),
        ({"kv_cache_memory": "lots"}, "no amount of memory; write it like 4GiB"),
        ({"prompt_kv_memory": "lots"}, "prompt_kv_memory: 'lots' is no amount of memory; write it like 4GiB"),
        ({"prompt_kv_memory": "900TiB"}, "prompt_kv_memory 900.0 TiB is more than the .* of memory that are free"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"kv_cache_memory": "900TiB"}, "more than the .* of memory that are free"),
        ({"r_worker_addresses": ["rdma://1"]}, "known: inproc://"),
        ({"worker_timeout_s": 0}, "worker_timeout_s"),
        ({"r_worker_addresses": ["ipc://a", "ipc://a"]}, "twice"),
        ({"transport": "mpi"}, "mpirun -n 3"),
        ({"key_file": "k"}, "key_file is for R-workers over tcp://"),
        ({"key_file": "k", "r_worker_addresses": ["ipc://a"]}, "key_file is for R-workers over tcp://"),
        ({"key_file": "/nonexistent", "transport": "tcp"}, "key_file: there is no /nonexistent"),
        ({"r_worker_addresses": ["ipc://a"], "num_r_workers": 2}, "either num_r_workers"),
        ({"max_model_len": 5000}, "max_model_len is 5000, but the model has positions for 512 tokens only"),
        (
            {"kv_cache_memory": "1KiB"},
            "KV budget of 1024 bytes holds no block: 64 tokens x 768 bytes per token = 49152",
        ),
        (
            {"kv_cache_memory": "100KiB", "max_model_len": 500},
            "too small for one sequence of max_model_len = 500 tokens: 499 tokens of KV x 768 bytes, "
            "in blocks of 64 = 384.0 KiB"
            ".*R-workers hold 128 tokens.*in all; raise kv_cache_memory or lower max_model_len",
        ),
    ],
)
def test_bad_options(options: dict[str, Any], text: str, llama: Case) -> None:
    with pytest.raises(ConfigError, match=text):
        LLM(llama.directory, skip_tokenizer_init=True, **options)


def test_numpys_numbers_are_taken(llama: Case) -> None:
    options = {"max_model_len": np.int64(100), "worker_timeout_s": np.float32(5), "skip_tokenizer_init": np.bool_(True)}
    with LLM(llama.directory, seed=np.uint32(3), r_worker_addresses=np.array([]), **options) as llm:
        assert llm.max_model_len == 100 and type(llm.config.max_model_len) is int and llm.config.seed == 3


def test_small_budget_bounds_the_length(llama: Case, caplog: pytest.LogCaptureFixture) -> None:
    with LLM(llama.directory, skip_tokenizer_init=True, kv_cache_memory="100KiB") as llm:
        assert llm.max_model_len == 129 and "max_model_len is 129" in caplog.text
        fits, too_long = quiet(llm, [[5] * 100, [5] * 129], SamplingParams(temperature=0, max_tokens=None))
        assert len(fits.outputs[0].token_ids) == 29 or fits.outputs[0].finish_reason == "stop"
        assert too_long.error and too_long.error.code == "context_length_exceeded"


def test_missing_model() -> None:
    with pytest.raises(ModelError, match="is no directory"):
        LLM("meta-llama/Llama-2-7b")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "ipc:///tmp/fastdecode-nobody-here"])
def test_nobody_answers(address: str, llama: Case) -> None:
    with pytest.raises(RWorkerUnreachable, match=f"R-worker 0 .*{address}.*is it running"):
        LLM(llama.directory, skip_tokenizer_init=True, r_worker_addresses=[address], worker_timeout_s=0.5)


def test_closed(llama: Case) -> None:
    llm = LLM(llama.directory, skip_tokenizer_init=True)
    llm.close()
    llm.close()
    with pytest.raises(ConfigError, match="closed"):
        quiet(llm, [[1]], GREEDY)


def test_closed_in_the_middle(llama: Case) -> None:
    llm = LLM(llama.directory, skip_tokenizer_init=True)
    iteration = llm.generate_iter([[5], [6]], [SamplingParams(max_tokens=m, ignore_eos=True) for m in (2, 40)])
    next(iteration)
    llm.close()
    with pytest.raises(ConfigError, match="closed while it was generating"):
        next(iteration)


def test_start_says_what_fits(llama: Case) -> None:
    """1 MiB = 21 blocks of 64 tokens x 768 bytes; a sequence of 100 tokens stores 99, in 2 blocks."""
    with LLM(llama.directory, kv_cache_memory="1MiB", max_model_len=100, skip_tokenizer_init=True) as llm:
        assert len(llm.kv_places) == 1
        assert "1008.0 KiB of float32 KV = 1344 tokens = 10 sequences of 100 tokens" in llm.kv_places[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length_quantile": 0.3, "start_policy": "eager"},
        {"length_predictor": "max-tokens", "order": "sjf", "order_window": 8},
        {"kv_policy": "greedy", "start_policy": "eager", "max_num_batched_tokens": 96},
        {"kv_policy": "reserve-static", "start_policy": "at-once", "max_num_waiting": 5},
    ],
    ids=str,
)
def test_schedules_do_not_change_what_comes_out(options: dict[str, Any], demo_model: Path, tmp_path: Path) -> None:
    """Lines of code of all lengths, in KV for a few of them at a time, against all of them together."""
    texts = ["def read(self", "import os", "class Node", "    return", "for i in", "x = [", "if not", "while True"]
    prompts = [text + " " * (i % 3) for i in range(5) for text in texts]
    params = SamplingParams(temperature=0, max_tokens=32, stop=["\n"])
    with LLM(demo_model) as llm:
        expected = [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]
    log = tmp_path / "steps.jsonl"
    with LLM(demo_model, kv_cache_memory="2MiB", max_model_len=128, block_tokens=16, step_log=log, **options) as llm:
        result = [output.outputs[0].text for output in llm.generate(prompts, params, use_tqdm=False)]
    assert result == expected and len(set(expected)) > 10
    assert max(record.num_running for record in read_step_log(log)) < len(prompts), "the KV was to be tight"


def test_forms_of_prompts(demo_model: Path) -> None:
    """Arrays are taken where lists are; what stands beside a prompt is never left out without a word."""
    with LLM(demo_model) as llm:
        (plain,) = quiet(llm, [[5, 6, 7]], GREEDY)
        token_ids: list[Any] = [
            np.array([5, 6, 7]), [np.int32(5), np.int64(6), 7], torch.tensor([5, 6, 7]), (5, 6, 7),
            {"prompt_token_ids": np.array([5, 6, 7], np.uint16)}, {"prompt": [5, 6, 7], "multi_modal_data": None},
        ]  # fmt: skip
        for given in token_ids:
            for (output,) in (quiet(llm, given, GREEDY), quiet(llm, [given], GREEDY)):
                assert output.error is None and output.prompt_token_ids == [5, 6, 7], given
                assert all(type(token) is int for token in output.prompt_token_ids)
                assert output.outputs[0].token_ids == plain.outputs[0].token_ids
        both = quiet(llm, np.array([[5, 6, 7], [7, 6, 5]]), GREEDY)
        assert [output.prompt_token_ids for output in both] == [[5, 6, 7], [7, 6, 5]]
        beside: list[dict[str, Any]] = [
            {"multi_modal_data": {"image": object()}}, {"prompt_embeds": [[0.0]]}, {"temperatur": 1},
        ]  # fmt: skip
        for more in beside:
            (output,) = quiet(llm, [{"prompt": "def fib(n):", **more}], GREEDY)
            assert output.error and output.error.code == "invalid_request" and output.error.param == next(iter(more))
        wrong: list[Any] = [{}, {"prompt": 5}, {"prompt": 5, "prompt_token_ids": [5]}, 5.0, None, [5, None], [None]]
        assert all(output.error for output in quiet(llm, wrong, GREEDY))
        (output,) = quiet(llm, ["x" * 10**6], GREEDY)
        assert output.error and output.error.code == "context_length_exceeded"
        assert output.error.numbers["n_ctx"] == llm.max_model_len < output.error.numbers["n_prompt_tokens"]
        (output,) = quiet(llm, [[5] * 5000], GREEDY)
        assert output.error and output.error.numbers == {"n_prompt_tokens": 5000, "n_ctx": llm.max_model_len}
        with pytest.raises(ConfigError, match="not int"):
            quiet(llm, 5, GREEDY)


def test_what_the_device_decides() -> None:
    """Beside a GPU R-workers are processes, one for each NUMA node; what is said stays."""
    config = EngineConfig(model="m")
    assert (config.num_r_workers, config.transport) == (None, None)
    beside_gpu = config.completed(is_gpu=True, num_numa_nodes=2)
    assert (beside_gpu.num_r_workers, beside_gpu.transport) == (2, "shm")
    on_cpu = config.completed(is_gpu=False, num_numa_nodes=2)
    assert (on_cpu.num_r_workers, on_cpu.transport) == (1, "inproc")
    said = EngineConfig(model="m", num_r_workers=3, transport="ipc").completed(is_gpu=True, num_numa_nodes=2)
    assert (said.num_r_workers, said.transport) == (3, "ipc")
    alone = EngineConfig(model="m", num_r_workers=0).completed(is_gpu=True, num_numa_nodes=2)
    assert (alone.num_r_workers, alone.transport) == (0, "inproc")
    elsewhere = EngineConfig(model="m", r_worker_addresses=("tcp://h:1",)).completed(is_gpu=True, num_numa_nodes=2)
    assert (elsewhere.num_r_workers, elsewhere.transport) == (1, "inproc")


def test_a_share_of_a_gpus_memory(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KV gets 0.8 of what is left of it; on a GPU without a word of it, on a CPU it is refused."""
    with LLM(demo_model, skip_tokenizer_init=True) as llm:
        facts = replace(llm.facts, device="cuda:0")
    monkeypatch.setattr(capacity, "free_bytes", lambda device: 60 << 30)
    monkeypatch.setattr(capacity, "total_bytes", lambda device: 80 << 30)
    open_ended = {"max_num_seqs": 1 << 20, "max_model_len": 1 << 20}

    def budget(**options: Any) -> float:
        config = EngineConfig(model="m", **open_ended, **options).completed(is_gpu=True, num_numa_nodes=1)
        return capacity.device_kv_bytes(config, facts, capacity.kv_layout(config, facts)) / (1 << 30)

    assert budget() == pytest.approx(0.8 * (60 - 8))
    assert budget(gpu_memory_utilization=0.5) == pytest.approx(0.8 * (60 - 40))
    assert budget(gpu_memory_utilization=0.1) == 0
    assert budget(device_kv_memory=1 << 30) == 1
    assert budget(kv_cache_dtype="int8") == 0  # in another storage type than the device's
    with pytest.raises(ConfigError, match="say the same"):
        EngineConfig(model="m", gpu_memory_utilization=0.5, device_kv_memory=1)
    with pytest.raises(ConfigError, match="share above 0"):
        EngineConfig(model="m", gpu_memory_utilization=1.5)
    with pytest.raises(ConfigError, match="the device is cpu"):
        LLM(demo_model, gpu_memory_utilization=0.5)
