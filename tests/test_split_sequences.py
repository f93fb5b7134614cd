"""Sequences in parts on several R-workers: nobody can tell by what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import NEW_TOKENS, Case, quiet
from test_recovery import HARMS, assert_at_rest, make_faulty, r_workers, tokens

from cpu_attention import RWorker
from fastdecode import LLM, SamplingParams
from fastdecode.engine.pipeline import Pipeline
from fastdecode.scheduling.plan import Step
from transport import Message

__all__ = ["r_workers"]  # a fixture

GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
TOKEN_BYTES = 768  # of the small llama's KV, fp32
TIGHT = {
    "kv_cache_memory": TOKEN_BYTES * 96,
    "block_tokens": 16,
}  # 232 tokens fit on none of three, but on all together


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """That were begun."""
    begun: list[Step] = []

    def begin(self: Pipeline, step: Step) -> None:
        begun.append(step)
        begin_step(self, step)

    begin_step = Pipeline.begin
    monkeypatch.setattr(Pipeline, "begin", begin)
    return begun


OPTIONS: dict[str, dict[str, Any]] = {
    "whole prompts": {},
    "prompts in chunks": {"max_num_batched_tokens": 33},
    "prompts attend on R-workers": {"max_num_batched_tokens": 40, "prompt_kv_memory": 0},
    "another process each": {"transport": "shm", "micro_batches": 2},
    "over sockets": {"transport": "ipc", "max_num_batched_tokens": 64},
    "as they grow": {"kv_policy": "greedy", "start_policy": "eager", "micro_batches": 2},
    "two R-workers": {"num_r_workers": 2, "kv_cache_memory": TOKEN_BYTES * 160, "micro_batches": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_tokens_are_those_of_whole_sequences(name: str, llama: Case, steps: list[Step]) -> None:
    options = {"num_r_workers": 3, "skip_tokenizer_init": True} | TIGHT | OPTIONS[name]
    with LLM(llama.directory, **options) as llm:
        assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference
        assert any(step.decodes.num_in_parts for step in steps)
        if name == "prompts attend on R-workers":
            assert any(segment.is_in_parts for step in steps for segment in step.prompts)
        params = SamplingParams(n=3, temperature=0.8, seed=5, max_tokens=9, logprobs=2, prompt_logprobs=1)
        found = quiet(llm, llama.prompts[-2:], params)
        llm._engine._rpool.settle()
    with LLM(llama.directory, skip_tokenizer_init=True) as llm:
        expected = quiet(llm, llama.prompts[-2:], params)
    for one, other in zip(found, expected, strict=True):
        assert [sample.token_ids for sample in one.outputs] == [sample.token_ids for sample in other.outputs]


@pytest.mark.parametrize("family", ["mistral-window", "gemma2", "gpt-oss", "gpt2"])
@pytest.mark.parametrize("room", [{}, {"prompt_kv_memory": 0, "max_num_batched_tokens": 48}], ids=["local", "remote"])
def test_windows_caps_and_sinks(
    family: str, room: dict[str, Any], case: Callable[[str], Case], steps: list[Step]
) -> None:
    """A part may lie before all that a query sees."""
    model = case(family)
    prompts = [model.prompts[-1], model.prompts[-2]]
    with LLM(
        model.directory, num_r_workers=3, skip_tokenizer_init=True, min_part_tokens=16, block_tokens=16, **room
    ) as llm:
        for prompt, reference in zip(prompts, model.reference[:-3:-1], strict=True):
            assert tokens(quiet(llm, [prompt], GREEDY)) == [reference]
    assert any(len(parts) == 3 for step in steps for parts in step.parts.values())


@pytest.mark.parametrize("dtype", ["int8", "k8v4", "int4", "float16"])
def test_stored_in_fewer_bits(dtype: str, llama: Case, steps: list[Step]) -> None:
    """What a block holds does not depend on where it is."""
    found = []
    for options in ({}, {"num_r_workers": 3, "min_part_tokens": 16}):
        steps.clear()
        with LLM(llama.directory, skip_tokenizer_init=True, kv_cache_dtype=dtype, **options) as llm:
            found.append(tokens(quiet(llm, [llama.prompts[-1]], GREEDY)))
    assert found[0] == found[1] and any(step.parts for step in steps)


def test_a_sequence_larger_than_an_r_worker(llama: Case) -> None:
    with LLM(llama.directory, num_r_workers=3, skip_tokenizer_init=True, **TIGHT) as llm:
        assert llm.max_model_len == 3 * 96 + 1, "the pool's, not the largest R-worker's"
        assert tokens(quiet(llm, llama.prompts[-1:], GREEDY)) == llama.reference[-1:]
        (longest,) = quiet(llm, [[5] * 250], SamplingParams(temperature=0, ignore_eos=True, max_tokens=None))
        assert len(longest.outputs[0].token_ids) == 39
        (refused,) = quiet(llm, [[5] * 289])
        assert refused.error and refused.error.code == "context_length_exceeded"


def test_a_guess_that_was_wrong(llama: Case, steps: list[Step]) -> None:
    """Taken to be short, it outgrows its R-worker, and starts again in parts."""
    with LLM(llama.directory, num_r_workers=3, skip_tokenizer_init=True, **TIGHT) as llm:
        short = SamplingParams(temperature=0, max_tokens=100, stop_token_ids=[llama.reference[0][1]])
        quiet(llm, [llama.prompts[0]] * 64, short)  # what is learnt: requests of that size end soon
        steps.clear()
        (output,) = quiet(
            llm, [llama.prompts[0]], SamplingParams(temperature=0, max_tokens=200, logit_bias={2: -100.0})
        )
        assert len(output.outputs[0].token_ids) == 200
        assert any(step.parts for step in steps)
        assert sum(step.num_preempted for step in steps) >= 1


def test_one_long_sequence_is_shared_and_many_are_not(llama: Case, steps: list[Step]) -> None:
    options = {"num_r_workers": 2, "skip_tokenizer_init": True, "block_tokens": 16, "min_part_tokens": 64}
    with LLM(llama.directory, **options) as llm:
        for prompts, is_divided in (([llama.prompts[-1]], True), ([llama.prompts[-1]] * 4, False), ([[5] * 40], False)):
            llm.reset_prefix_cache()
            steps.clear()
            quiet(llm, prompts, GREEDY)
            held = {part.r_worker for step in steps for parts in step.parts.values() for part in parts}
            assert held == ({0, 1} if is_divided else set())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 40, "prompt_kv_memory": 0, "micro_batches": 2},
        {"transport": "shm", "micro_batches": 3, "max_num_batched_tokens": 70},
        {
            "transport": "ipc",
            "kv_cache_dtype": "int8",
            "enable_prefix_caching": True,
            "kv_cache_memory": TOKEN_BYTES * 40,
        },
    ],
    ids=["local", "remote", "shm", "ipc, int8"],
)
def test_later_turns_compute_what_is_new(options: dict[str, Any], llama: Case, steps: list[Step]) -> None:
    """Of a chat that fits on no R-worker, with others between its turns."""
    options = {"kv_cache_memory": TOKEN_BYTES * 128, "block_tokens": 16, "num_r_workers": 3} | options
    with LLM(llama.directory, skip_tokenizer_init=True, **options) as llm:
        turn, params = llama.prompts[-1], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        for number in range(3):
            if number:
                quiet(llm, [[number] * 9] * 2, GREEDY)
            steps.clear()
            (output,) = quiet(llm, [turn], params)
            assert any(step.parts for step in steps)
            computed = sum(step.num_prompt_tokens for step in steps)
            with LLM(
                llama.directory, skip_tokenizer_init=True, kv_cache_dtype=options.get("kv_cache_dtype", "auto")
            ) as alone:
                (expected,) = quiet(alone, [turn], params)
            assert "int8" in options.values() or output.outputs[0].token_ids == expected.outputs[0].token_ids
            assert computed == len(turn) - output.num_cached_tokens <= (len(turn) if number == 0 else 6 + 1)
            turn = [*turn, *output.outputs[0].token_ids, *[11, 12, 13, 14, 15, number]]


@pytest.mark.parametrize("count", [1, 3])
def test_beginnings_in_parts_are_shared(count: int, llama: Case, steps: list[Step]) -> None:
    """By prompts that come together, and by samples; and read once."""
    options = {"num_r_workers": 2, "kv_cache_memory": TOKEN_BYTES * 1024, "block_tokens": 16, "min_part_tokens": 64}
    alike = [[*llama.prompts[-1][:180], *range(20 + i, 30 + i)] for i in range(4)]
    params = SamplingParams(temperature=0.7, seed=3, n=count, max_tokens=9)
    with LLM(llama.directory, skip_tokenizer_init=True, **options) as llm:
        quiet(llm, [alike[0]], GREEDY)
        steps.clear()
        found = quiet(llm, alike, params)
        assert any(step.parts for step in steps)
        assert sum(step.num_prompt_tokens for step in steps) < 4 * 16 + 4 * count * 16
        llm._engine._rpool.settle()
    with LLM(llama.directory, skip_tokenizer_init=True, enable_prefix_caching=False) as llm:
        expected = quiet(llm, alike, params)
    for one, other in zip(found, expected, strict=True):
        assert [sample.token_ids for sample in one.outputs] == [sample.token_ids for sample in other.outputs]


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("options", [{}, {"micro_batches": 2, "max_num_batched_tokens": 40, "prompt_kv_memory": 0}])
def test_an_r_worker_is_lost(
    harm: Callable[[], Message | None],
    options: dict[str, Any],
    llama: Case,
    r_workers: list[RWorker],
    steps: list[Step],
) -> None:
    """Whoever has a part of a sequence: it is computed again in parts on the others, or is refused by its name."""
    generator = np.random.default_rng(len(harm.__name__) + len(options))
    tight = TIGHT | {"kv_cache_memory": TOKEN_BYTES * 128}
    for _ in range(3):
        r_workers.clear()
        with LLM(
            llama.directory, num_r_workers=3, skip_tokenizer_init=True, worker_timeout_s=2, **tight, **options
        ) as llm:
            lost = int(generator.integers(3))
            make_faulty(llm, lost, int(generator.integers(0, 300)), harm)
            assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference
            assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference
            assert_at_rest(llm, r_workers)
    assert any(step.parts for step in steps)


def test_aborted_at_any_time(llama: Case, r_workers: list[RWorker]) -> None:
    with LLM(llama.directory, num_r_workers=3, skip_tokenizer_init=True, max_num_batched_tokens=50, **TIGHT) as llm:
        for num_steps in (1, 2, 3, 4, 6, 9, 14):
            ids = [llm._engine.next_request_id() for _ in range(2)]
            for request_id, prompt in zip(ids, llama.prompts[-2:], strict=True):
                llm._engine.add_request(request_id, prompt, GREEDY)
            for _ in range(num_steps):
                llm._engine.step()
            llm._engine.abort(ids)
            while llm._engine.has_work:
                llm._engine.step()
            assert_at_rest(llm, r_workers)
        assert tokens(quiet(llm, llama.prompts, GREEDY)) == llama.reference
