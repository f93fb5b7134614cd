"""KV on the S-worker's own device, alone or beside R-workers: nobody can tell by what comes out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import NEW_TOKENS, Case, quiet
from test_recovery import HARMS, make_faulty, r_workers, tokens
from test_split_sequences import GREEDY, TOKEN_BYTES, steps

from cpu_attention import RWorker, available_memory_bytes
from fastdecode import LLM, SamplingParams
from fastdecode.engine import runtime
from fastdecode.engine.capacity import device_kv_bytes, kv_layout
from fastdecode.engine.config import EngineConfig
from fastdecode.errors import ConfigError, DeviceKVFailed
from fastdecode.holders.device import DeviceHolder, EmulatedStore, HostStore, TorchStore
from fastdecode.scheduling.parts import DEVICE
from fastdecode.scheduling.plan import Step
from transport import Message

__all__ = ["r_workers", "steps"]  # fixtures

STORES = ("host", "torch")
ALONE: dict[str, Any] = {"num_r_workers": 0}
FEW = TOKEN_BYTES * 256  # for some of the prompts


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What keeps K and V on the device: a processor's kernels, or, as on a GPU, torch."""
    if request.param == "torch":

        def open_device(config: Any, sworker: Any, layout: Any) -> DeviceHolder | None:
            num_bytes = runtime.device_kv_bytes(config, sworker.facts, layout)
            if not num_bytes:
                return None
            kv = sworker.device_kv(num_bytes, layout.block_tokens)
            return DeviceHolder(TorchStore(kv, sworker.facts.layers))

        monkeypatch.setattr(runtime, "_open_device", open_device)
    return str(request.param)


def places(steps: list[Step]) -> set[int]:
    """Where KV of steps went."""
    return {
        worker for step in steps for worker in (*step.decodes.r_workers.tolist(), *(s.r_worker for s in step.prompts))
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 40, "prompt_kv_memory": 0},
        {"micro_batches": 3, "block_tokens": 16},
        {"kv_policy": "greedy", "start_policy": "eager", "device_kv_memory": TOKEN_BYTES * 512, "block_tokens": 16},
        {"enable_prefix_caching": False},
    ],
    ids=["whole prompts", "chunks", "three lanes", "thrown out", "no prefixes"],
)
def test_without_r_workers(store: str, options: dict[str, Any], llama: Case, steps: list[Step]) -> None:
    with LLM(llama.directory, skip_tokenizer_init=True, **ALONE | options) as llm:
        for _ in range(2):
            assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference
        assert places(steps) == {DEVICE}
        params = SamplingParams(n=3, temperature=0.8, seed=5, max_tokens=9, logprobs=2, prompt_logprobs=1)
        found = quiet(llm, llama.prompts[-2:], params)
    with LLM(llama.directory, skip_tokenizer_init=True) as llm:
        expected = quiet(llm, llama.prompts[-2:], params)
    for one, other in zip(found, expected, strict=True):
        assert [sample.token_ids for sample in one.outputs] == [sample.token_ids for sample in other.outputs]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 40, "prompt_kv_memory": 0, "micro_batches": 2},
        {"transport": "shm", "num_r_workers": 2, "micro_batches": 2},
        {"transport": "ipc", "num_r_workers": 2, "max_num_batched_tokens": 60},
        {
            "num_r_workers": 3,
            "kv_cache_memory": TOKEN_BYTES * 96,
            "device_kv_memory": TOKEN_BYTES * 96,
            "block_tokens": 16,
        },
        {"kv_policy": "greedy", "start_policy": "eager", "kv_cache_memory": TOKEN_BYTES * 256, "block_tokens": 16},
    ],
    ids=["inproc", "remote prompts", "shm", "ipc", "in parts beside it", "thrown out"],
)
def test_beside_r_workers(store: str, options: dict[str, Any], llama: Case, steps: list[Step]) -> None:
    """The device first, and what does not fit there on R-workers; in the same steps."""
    options = {"device_kv_memory": FEW} | options
    with LLM(llama.directory, skip_tokenizer_init=True, **options) as llm:
        for _ in range(3):
            assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference
    assert {DEVICE, 0} <= places(steps)
    assert any(0 < step.num_device_decodes < len(step.decodes) for step in steps), "both in one step"


@pytest.mark.parametrize("family", ["mistral-window", "gemma2", "gpt-oss", "gpt2"])
def test_windows_caps_and_sinks(store: str, family: str, case: Callable[[str], Case]) -> None:
    model = case(family)
    with LLM(model.directory, skip_tokenizer_init=True, max_num_batched_tokens=60, **ALONE) as llm:
        assert tokens(quiet(llm, model.prompts, GREEDY)) == model.reference


@pytest.mark.parametrize("dtype", ["int8", "k8v4", "int4", "float16"])
def test_stored_in_fewer_bits(dtype: str, llama: Case) -> None:
    """A processor keeps it as R-workers do."""
    found = []
    for options in ({}, ALONE):
        with LLM(llama.directory, skip_tokenizer_init=True, kv_cache_dtype=dtype, **options) as llm:
            found.append(tokens(quiet(llm, llama.prompts[-1:], GREEDY)))
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(store: str, dtype: str, llama: Case) -> None:
    with LLM(llama.directory, skip_tokenizer_init=True, dtype=dtype, **ALONE) as llm:
        (output,) = quiet(llm, llama.prompts[-1:], GREEDY)
    assert len(output.outputs[0].token_ids) == NEW_TOKENS


@pytest.mark.parametrize("harm", HARMS)
def test_an_r_worker_is_lost(
    store: str, harm: Callable[[], Message | None], llama: Case, r_workers: list[RWorker], steps: list[Step]
) -> None:
    """What is on the device goes on from where it was before the step."""
    generator = np.random.default_rng(len(harm.__name__))
    for _ in range(3):
        with LLM(
            llama.directory, num_r_workers=2, skip_tokenizer_init=True, worker_timeout_s=2, micro_batches=2,
            device_kv_memory=FEW, kv_cache_memory=TOKEN_BYTES * 640, block_tokens=16,
        ) as llm:  # fmt: skip
            make_faulty(llm, int(generator.integers(2)), int(generator.integers(0, 200)), harm)
            for _ in range(2):
                assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference
    assert DEVICE in places(steps)


def test_aborted_at_any_time(store: str, llama: Case) -> None:
    with LLM(llama.directory, skip_tokenizer_init=True, max_num_batched_tokens=50, **ALONE) as llm:
        for num_steps in (1, 2, 3, 4, 6, 9, 14):
            ids = [llm._engine.next_request_id() for _ in range(2)]
            for request_id, prompt in zip(ids, llama.prompts[-2:], strict=True):
                llm._engine.add_request(request_id, prompt, GREEDY)
            for _ in range(num_steps):
                llm._engine.step()
            llm._engine.abort(ids)
            while llm._engine.has_work:
                llm._engine.step()
        assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference
        llm.reset_prefix_cache()
        quiet(llm, [[5]], GREEDY)
        llm.reset_prefix_cache()
        llm._engine.abort_all()
        assert len(llm._engine._pipeline._device._held) <= 1


def test_interrupted_and_goes_on(store: str, llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(llama.directory, skip_tokenizer_init=True, **ALONE) as llm:
        attend, calls = DeviceHolder.attend, 0

        def interrupted(self: DeviceHolder, *what: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 7:
                raise KeyboardInterrupt
            return attend(self, *what)

        monkeypatch.setattr(DeviceHolder, "attend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quiet(llm, llama.prompts, GREEDY)
        assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference


def test_the_longest_sequence(llama: Case) -> None:
    """What the device or the R-workers together can hold."""
    options = {"kv_cache_memory": TOKEN_BYTES * 48, "block_tokens": 16, "skip_tokenizer_init": True}
    for device, longest in ((96, 96), (48, 2 * 48)):
        with LLM(llama.directory, num_r_workers=2, device_kv_memory=TOKEN_BYTES * device, **options) as llm:
            assert llm.max_model_len == longest + 1
            (output,) = quiet(llm, [[5] * 60], SamplingParams(temperature=0, ignore_eos=True, max_tokens=None))
            assert len(output.outputs[0].token_ids) == longest + 1 - 60


@pytest.mark.parametrize(
    "options, told",
    [
        ({"num_r_workers": 0, "device_kv_memory": 0}, "leave no place for KV"),
        ({"num_r_workers": 0, "transport": "shm"}, "transport is for R-workers"),
        ({"device_kv_memory": "900TiB"}, "device_kv_memory 900.0 TiB is more than"),
        ({"num_r_workers": 0, "device_kv_memory": "20KiB"}, "holds no block: .*set another device_kv_memory"),
        (
            {"num_r_workers": 0, "device_kv_memory": "100KiB", "max_model_len": 200},
            "device holds .* raise device_kv_memory",
        ),
        ({"num_r_workers": 0, "kv_cache_memory": "1MiB"}, "kv_cache_memory is for R-workers"),
        ({"device_kv_memory": "1TiB", "device": "emulated:a10"}, "emulated:a10 has 16.1 GiB for KV beside the weights"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], told: str, llama: Case) -> None:
    with pytest.raises(ConfigError, match=told):
        LLM(llama.directory, skip_tokenizer_init=True, **options)


def test_a_gpu_keeps_the_models_dtype(llama: Case) -> None:
    with LLM(llama.directory, skip_tokenizer_init=True) as llm:
        facts = replace(llm._engine._sworker.facts, device="cuda:0")
    config = EngineConfig(model="m", kv_cache_dtype="int8", device_kv_memory=1 << 20)
    with pytest.raises(ConfigError, match="KV on cuda:0 is in the model's dtype, float32; kv_cache_dtype int8"):
        device_kv_bytes(config, facts, kv_layout(config, facts))


def test_prompts_on_their_way_are_forgotten(llama: Case) -> None:
    """Where KV is stored in fewer bits, their K and V are kept beside it until they are through."""
    room = 8 * 64 * TOKEN_BYTES
    with LLM(
        llama.directory, skip_tokenizer_init=True, kv_cache_dtype="int8", max_num_batched_tokens=80, micro_batches=2,
        prompt_kv_memory=room, enable_prefix_caching=False, **ALONE,
    ) as llm:  # fmt: skip
        for _ in range(4):
            ids = [llm._engine.next_request_id() for _ in range(2)]
            for request_id in ids:
                llm._engine.add_request(request_id, llama.prompts[-1], GREEDY)
            for _ in range(2):
                llm._engine.step()
            llm._engine.abort(ids)
            kept = llm._engine._sworker.prompt_kv
            assert kept.num_free_blocks == kept.num_blocks == 8
        assert len(tokens(quiet(llm, llama.prompts[-2:], GREEDY))) == 2


@pytest.mark.parametrize("verb", ["admit", "release", "fork", "rewind", "begin", "attend"])
@pytest.mark.parametrize("is_after", [False, True], ids=["before", "after"])
def test_interrupted_anywhere(
    store: str, verb: str, is_after: bool, llama: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the holder and the store were in the middle of, both are empty then, and the next are served."""
    kind, calls, due = HostStore if store == "host" else TorchStore, 0, 1 if verb == "fork" else 2
    original = getattr(kind, verb)

    def broken(self: Any, *what: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == due and not is_after:
            raise KeyboardInterrupt
        result = original(self, *what, **more)
        if calls == due:
            raise KeyboardInterrupt
        return result

    with LLM(
        llama.directory, skip_tokenizer_init=True, device_kv_memory=TOKEN_BYTES * 320, block_tokens=16,
        kv_policy="greedy", start_policy="eager", num_r_workers=0,
    ) as llm:  # fmt: skip
        monkeypatch.setattr(kind, verb, broken)
        interrupted = False
        for _ in range(3):
            try:
                quiet(llm, [*llama.prompts[2:], llama.prompts[-1]], GREEDY)
            except KeyboardInterrupt:
                interrupted = True
        assert interrupted
        assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference


def test_goes_on_when_the_last_r_worker_is_gone(store: str, llama: Case) -> None:
    """What lies on the device, and what fits there; what does not is refused by the loss's name."""
    with LLM(
        llama.directory, num_r_workers=1, skip_tokenizer_init=True, worker_timeout_s=2, block_tokens=16,
        device_kv_memory=TOKEN_BYTES * 192, kv_cache_memory=TOKEN_BYTES * 1024,
    ) as llm:  # fmt: skip
        assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference
        make_faulty(llm, 0, 3, HARMS[0])
        outputs = quiet(llm, llama.prompts, GREEDY)
        fits = [len(prompt) + NEW_TOKENS <= 192 for prompt in llama.prompts]
        assert [output.error is None for output in outputs[:-1]] == fits[:-1]
        for output, reference in zip(outputs, llama.reference, strict=True):
            assert output.error or output.outputs[0].token_ids == reference
        assert outputs[-1].error and outputs[-1].error.code in ("worker_lost", "kv_budget_exceeded")
        assert tokens(quiet(llm, llama.prompts[:-1], GREEDY)) == llama.reference[:-1]


def test_a_store_of_no_block_is_refused(llama: Case) -> None:
    with LLM(llama.directory, skip_tokenizer_init=True) as llm:
        kv = llm._engine._sworker.device_kv(20 << 10, 64)
        with pytest.raises(DeviceKVFailed, match="less than a block of 49152 bytes"):
            TorchStore(kv, ())


def test_budgets_are_counted_together(llama: Case) -> None:
    most = available_memory_bytes() * 7 // 10
    with pytest.raises(ConfigError, match="is more than"):
        LLM(llama.directory, skip_tokenizer_init=True, device_kv_memory=most, kv_cache_memory=most)


def test_an_emulated_gpu_takes_the_time_of_reading(llama: Case) -> None:
    """The same steps once with KV that is read at its rate, and once with none to speak of."""
    with LLM(llama.directory, skip_tokenizer_init=True, device="emulated:a10", num_r_workers=0) as llm:
        assert llm._engine.standing.device_kv_capacity_tokens > 100_000
        pipeline, seconds = llm._engine._pipeline, list[float]()
        assert pipeline._device
        store = pipeline._device._store
        assert isinstance(store, EmulatedStore)
        for each in (lambda count: 20e-3, lambda count: 0.0):
            store._attention_seconds = each
            began = time.monotonic()
            (output,) = quiet(llm, [[5] * 20], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
            seconds.append(time.monotonic() - began)
            assert len(output.outputs[0].token_ids) == 5
        num_reads = 5 * len(llm._engine._sworker.facts.layers)
        assert seconds[0] - seconds[1] > 0.8 * num_reads * 20e-3
