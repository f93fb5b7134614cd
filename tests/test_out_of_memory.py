"""The S-worker's device runs out of memory at any moment of a step: it is done again, and no token changes."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch
from conftest import NEW_TOKENS, Case, quiet
from test_recovery import GREEDY, assert_at_rest, r_workers, tokens

from cpu_attention import RWorker
from fastdecode import LLM, SamplingParams
from fastdecode.engine import shortage
from gpu_sworker import AttentionCall, FlatBatch, SWorker

__all__ = ["r_workers"]  # a fixture

TOKEN_BYTES = 768  # of the small llama's KV, fp32


class Memory:
    """Of a device on which S-blocks, and the sampler, fail now and then; installed by `scarce`."""

    def __init__(self) -> None:
        self.num_asked = 0  # times that something was to be computed
        self.fails_at: set[int] = set()
        self.most_tokens = 1 << 30  # of a step that it has room for
        self.sizes: list[int] = []  # of the steps that were begun

    def ask(self, num_tokens: int) -> None:
        self.num_asked += 1
        if self.num_asked in self.fails_at or num_tokens > self.most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore is said")


@pytest.fixture
def scarce(monkeypatch: pytest.MonkeyPatch) -> Memory:
    memory = Memory()

    def forward(self: SWorker, batch: FlatBatch) -> Generator[Any, torch.Tensor, torch.Tensor]:
        memory.sizes.append(len(batch.token_ids))
        inner = compute(self, batch)
        try:
            memory.ask(len(batch.token_ids))
            call = next(inner)
            while True:
                o = yield call
                memory.ask(len(batch.token_ids))
                call = inner.send(o)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        finally:
            inner.close()

    def forward_through(
        self: SWorker, batch: FlatBatch, attend: Callable[[AttentionCall], torch.Tensor]
    ) -> torch.Tensor:
        def ask_and_attend(call: AttentionCall) -> torch.Tensor:
            memory.ask(len(batch.token_ids))
            return attend(call)

        memory.sizes.append(len(batch.token_ids))
        memory.ask(len(batch.token_ids))
        return go_through(self, batch, ask_and_attend)

    def sample(self: SWorker, *arguments: Any) -> Any:
        memory.ask(0)
        return draw(self, *arguments)

    # On a busy machine a thread may not run for longer than an R-worker has by default, and these are many steps.
    monkeypatch.setattr("fastdecode.holders.patience._LEAST_S", 50.0)
    compute, go_through, draw = SWorker.forward, SWorker.forward_through, SWorker.sample
    monkeypatch.setattr(SWorker, "forward_through", forward_through)
    monkeypatch.setattr(SWorker, "forward", forward)
    monkeypatch.setattr(SWorker, "sample", sample)
    return memory


PLACES: dict[str, dict[str, Any]] = {
    "R-workers": {"num_r_workers": 2},
    "lanes": {"num_r_workers": 2, "micro_batches": 3},
    "chunks": {"max_num_batched_tokens": 40, "micro_batches": 2},
    "chunks on R-workers": {"max_num_batched_tokens": 40, "prompt_kv_memory": 0},
    "parts": {"num_r_workers": 3, "kv_cache_memory": TOKEN_BYTES * 96, "block_tokens": 16},
    "the device": {"num_r_workers": 0, "device_kv_memory": TOKEN_BYTES * 4096, "max_num_batched_tokens": 100},
    "both": {"device_kv_memory": TOKEN_BYTES * 512, "micro_batches": 2},
    "preempted": {"kv_cache_memory": TOKEN_BYTES * 256, "block_tokens": 16, "kv_policy": "greedy"},
    "prefixes": {"enable_prefix_caching": True, "kv_cache_memory": TOKEN_BYTES * 512, "block_tokens": 16},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("first", [1, 60])
def test_nothing_is_lost_and_no_token_changes(
    first: int, place: str, llama: Case, scarce: Memory, r_workers: list[RWorker]
) -> None:
    """And who comes later is served as ever."""
    with LLM(llama.directory, skip_tokenizer_init=True, **PLACES[place]) as llm:
        scarce.fails_at = {first, first + 30, first + 33}  # also twice in the same step
        assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference
        assert max(scarce.fails_at) <= scarce.num_asked, "all of them happened"
        assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference
        llm._engine._scheduler.check_integrity()
        if r_workers:
            assert_at_rest(llm, r_workers)
        assert llm._engine.totals.num_lost == llm._engine.totals.num_recoveries == 0


@pytest.mark.parametrize("place", ["R-workers", "the device"])
def test_every_moment_of_two_steps(place: str, llama: Case, scarce: Memory) -> None:
    """A prompt's, and the first one that decodes: four S-blocks and the sampler each."""
    prompts, params = llama.prompts[2:5], SamplingParams(temperature=0, max_tokens=6)
    with LLM(llama.directory, skip_tokenizer_init=True, **PLACES[place]) as llm:
        for moment in range(1, 11):
            scarce.fails_at = {scarce.num_asked + moment}
            outputs = quiet(llm, prompts, params)
            assert tokens(outputs) == [reference[:6] for reference in llama.reference[2:5]]


def test_draws_are_the_same_ones(llama: Case, scarce: Memory) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.9, frequency_penalty=0.2, n=2, seed=3, max_tokens=NEW_TOKENS)
    with LLM(llama.directory, skip_tokenizer_init=True, num_r_workers=2) as llm:
        expected = [[one.token_ids for one in output.outputs] for output in quiet(llm, llama.prompts, params)]
        scarce.fails_at = {scarce.num_asked + more for more in (3, 44, 45, 90)}
        assert [[one.token_ids for one in output.outputs] for output in quiet(llm, llama.prompts, params)] == expected


def test_steps_become_as_small_as_there_is_memory_for(
    llama: Case, scarce: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And larger again once there is more of it."""
    monkeypatch.setattr(shortage, "_STEADY_STEPS", 4)
    with LLM(llama.directory, skip_tokenizer_init=True) as llm:
        scheduler = llm._engine._scheduler
        asked = scheduler.step_tokens
        scarce.most_tokens = 50
        assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference
        assert max(scarce.sizes) > 500 and scheduler.step_tokens < asked
        # Twice as many were tried, and were too many, later and later.
        assert scarce.sizes.count(32) > 1 and llm._engine._shortage._num_steady > 4
        scarce.most_tokens = 1 << 30
        for _ in range(100):
            if scheduler.step_tokens == asked:
                break
            assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference
        assert scheduler.step_tokens == asked


def test_requests_that_no_step_is_small_enough_for_end_with_an_error(
    llama: Case, scarce: Memory, caplog: pytest.LogCaptureFixture
) -> None:
    """That says what to lower; the next ones are served."""
    with LLM(llama.directory, skip_tokenizer_init=True, num_r_workers=2) as llm:
        scarce.most_tokens = 0
        outputs = quiet(llm, llama.prompts, GREEDY)
        assert [output.error and output.error.code for output in outputs] == ["out_of_memory"] * len(outputs)
        error = outputs[0].error
        assert error and "a step of 1 tokens (CUDA out of memory. Tried to allocate 2.00 GiB.)" in error.message
        assert "lower max_num_seqs, max_num_batched_tokens, device_kv_memory" in error.message
        assert "It failed again, and ends" in caplog.text
        scarce.most_tokens = 1 << 30
        assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference


@pytest.mark.parametrize("place", ["R-workers", "lanes", "the device"])
def test_those_that_decode_together_and_are_too_many_take_turns(place: str, llama: Case, scarce: Memory) -> None:
    with LLM(llama.directory, skip_tokenizer_init=True, **PLACES[place]) as llm:
        scarce.most_tokens = 3
        assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference
        assert scarce.sizes.count(2) + scarce.sizes.count(3) > 10, "not one by one"
