"""A step without rows on R-workers goes through all layers at once; its plain twin is suspended at each attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Case, quiet
from interrupts import run_until
from test_recovery import tokens
from test_split_sequences import GREEDY, TOKEN_BYTES

from fastdecode import LLM, SamplingParams
from fastdecode.engine.pipeline import Pipeline
from fastdecode.errors import DeviceKVFailed
from fastdecode.holders.device import HostStore
from gpu_sworker import AttentionCall, FlatBatch, PromptChunk, SWorker

ALONE: dict[str, Any] = {"num_r_workers": 0, "skip_tokenizer_init": True}
SAMPLED = SamplingParams(n=2, temperature=0.8, seed=5, max_tokens=6, logprobs=2, prompt_logprobs=1)

Logits = list[tuple[int, torch.Tensor]]


def run(monkeypatch: pytest.MonkeyPatch, model: Case, *, is_suspended: bool, **options: Any) -> tuple[Logits, Any]:
    """The lane and the logits of each step; tokens and log-probabilities."""
    steps: Logits = []
    original, through, num_through = Pipeline.run, SWorker.forward_through, 0

    def recorded(self: Pipeline) -> Any:
        step, logits = original(self)
        steps.append((step.lane, logits.clone()))
        return step, logits

    def counted(self: SWorker, *what: Any) -> torch.Tensor:
        nonlocal num_through
        num_through += 1
        return through(self, *what)

    with monkeypatch.context() as patch, LLM(model.directory, **ALONE | options) as llm:
        patch.setattr(Pipeline, "run", recorded)
        patch.setattr(SWorker, "forward_through", counted)
        if is_suspended:
            patch.setattr(Pipeline, "_takes_turns", lambda self: True)
        found = [tokens(quiet(llm, model.prompts, GREEDY))]
        for output in quiet(llm, model.prompts[-3:], SAMPLED):
            found.append([output.prompt_logprobs, [(o.token_ids, o.logprobs) for o in output.outputs]])
    assert num_through == (0 if is_suspended else len(steps))
    return steps, found


@pytest.mark.parametrize(
    "options",
    [
        {"linear_kernel": "onednn"},
        {"linear_kernel": "onednn", "max_num_batched_tokens": 100, "micro_batches": 2},
        {"linear_kernel": "plain", "max_num_batched_tokens": 40, "prompt_kv_memory": 0, "micro_batches": 3},
        {"linear_kernel": "onednn", "kv_cache_dtype": "int8", "max_num_batched_tokens": 80},
    ],
    ids=["whole prompts", "two lanes", "chunks that attend there", "prompts beside fewer bits"],
)
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "gpt-oss", "gpt2", "opt"])
def test_to_the_bit(
    family: str, options: dict[str, Any], case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of the same steps in the same order, and what is drawn from them."""
    model = case(family)
    straight, found = run(monkeypatch, model, is_suspended=False, **options)
    suspended, expected = run(monkeypatch, model, is_suspended=True, **options)
    assert [lane for lane, _ in straight] == [lane for lane, _ in suspended]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(straight, suspended, strict=True))
    assert found == expected
    assert "kv_cache_dtype" in options or found[0] == model.reference


def test_lanes_take_turns(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step each, in their order, for as long as all of them have something to do."""
    steps, _ = run(monkeypatch, llama, is_suspended=False, micro_batches=3)
    lanes = [lane for lane, _ in steps]
    assert lanes[:60] == [0, 1, 2] * 20


def test_r_workers_of_another_lane_do_not_wait(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one lane has rows there, all go layer by layer; those that were begun so, to their end."""
    begun, through = Pipeline._begin_layers, Pipeline._go_through
    by_layer, at_once = [], []

    def beginning(self: Pipeline, flight: Any) -> None:
        assert any(other.ticket.shares for other in self._flights.values())
        by_layer.append(bool(flight.ticket.shares))
        begun(self, flight)

    def going_through(self: Pipeline, flight: Any) -> torch.Tensor:
        assert not any(other.ticket.shares for other in self._flights.values())
        at_once.append(flight.lane)
        return through(self, flight)

    monkeypatch.setattr(Pipeline, "_begin_layers", beginning)
    monkeypatch.setattr(Pipeline, "_go_through", going_through)
    long, short = 5, 1  # of which the former is too long for the device
    with LLM(
        llama.directory, skip_tokenizer_init=True, device_kv_memory=TOKEN_BYTES * 64, block_tokens=16, micro_batches=2
    ) as llm:
        params = [SamplingParams(temperature=0, max_tokens=count) for count in (8, 32)]
        found = tokens(quiet(llm, [llama.prompts[long], llama.prompts[short]], params))
    assert found == [llama.reference[long][:8], llama.reference[short]]
    assert by_layer.count(True) == 8 and by_layer.count(False) in (8, 9) and len(at_once) + by_layer.count(False) == 32


@pytest.mark.parametrize("num_tokens", [1, 64, 65, 129])
@pytest.mark.parametrize("brings_padding", [True, False])
def test_padding(num_tokens: int, brings_padding: bool, llama: Case) -> None:
    """Whoever answers sees no padding, and may answer for it or not."""
    sworker = SWorker(llama.directory, linear_kernel="onednn")
    ids = np.arange(num_tokens) % 97
    batch, chunk = (
        FlatBatch(ids, np.arange(num_tokens), np.array([num_tokens - 1])),
        PromptChunk(0, 0, num_tokens, 0, num_tokens),
    )

    def attend(call: AttentionCall) -> torch.Tensor:
        assert len(call.q) == len(call.k) == len(call.v) == num_tokens
        o = sworker.attend_prompt(call, chunk)
        return call.join([o]) if brings_padding else o

    with sworker.inference():
        logits = sworker.forward_through(batch, attend)
        forward = sworker.forward(batch)
        call = next(forward)
        with pytest.raises(StopIteration) as end:
            while True:
                call = forward.send(attend(call))
    assert torch.equal(logits, end.value.value)


def test_one_answer_is_not_copied() -> None:
    q = torch.zeros(5, 2, 4)
    call, o = AttentionCall(0, q, q, q, 1.0, None, None, None, None, True, ()), torch.randn(5, 2, 4)
    assert call.join([o]) is o
    assert torch.equal(call.join([o[:2], o[2:]]), o)
    turned = torch.randn(2, 5, 4).transpose(0, 1)
    assert call.join([turned]).is_contiguous() and torch.equal(call.join([turned]), turned)
    padded = call.first(3).join([o[:1], o[1:3]])
    assert torch.equal(padded[:3], o[:3]) and not padded[3:].any() and len(padded) == 5


def test_a_store_that_fails(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a forward: it is told, requests end, and the next are served."""
    attend, calls = HostStore.attend, 0

    def failing(self: HostStore, *what: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 20:
            raise DeviceKVFailed("K and V on the S-worker's device: no more")
        return attend(self, *what)

    monkeypatch.setattr(HostStore, "attend", failing)
    with LLM(llama.directory, micro_batches=2, **ALONE) as llm:
        with pytest.raises(DeviceKVFailed, match="no more"):
            quiet(llm, llama.prompts, GREEDY)
        assert not llm._engine.has_work
        assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference


def test_interrupted_at_any_line(llama: Case) -> None:
    """Of pipeline, forward and attention, over two lanes: the next requests are served."""
    files = "fastdecode/engine/pipeline.py", "fastdecode/holders/device.py", "gpu_sworker"
    few, number, came = SamplingParams(temperature=0, max_tokens=3), 0, True
    with LLM(llama.directory, micro_batches=2, block_tokens=16, max_num_batched_tokens=48, **ALONE) as llm:
        while came:
            came = run_until(number, lambda: quiet(llm, llama.prompts[2:5], few), *files, by="line")
            assert tokens(quiet(llm, llama.prompts[2:5], few)) == [r[:3] for r in llama.reference[2:5]]
            engine = llm._engine
            assert not engine.has_work and not engine._pipeline.under_way
            engine._requests.check_integrity()
            engine._scheduler.check_integrity()
            number += 37
    assert number > 37 * 20
