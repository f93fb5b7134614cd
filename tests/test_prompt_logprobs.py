"""Log-probabilities of prompts: those of transformers' logits over the whole prompt, however it was computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Case, quiet
from test_recovery import SMALL_STEPS, gone, hung, make_faulty, three_workers

from fastdecode import LLM, RequestOutput, SamplingParams
from fastdecode.engine import capacity
from fastdecode.scheduling.request import Sequence
from fastdecode.server.metrics import Metrics
from gpu_sworker import FlatBatch, SWorker, load_reference

LENGTHS = slice(0, 6)  # of the case's prompts: 1, 2, 31, 32, 33 and 75 tokens
SCORED = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=3)


@cache
def expected(directory: Path, prompt: tuple[int, ...]) -> torch.Tensor:
    """[num_tokens - 1, vocab]: of each token but the first, with transformers' own forward over the whole prompt."""
    model = load_reference(directory)
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0, :-1].float().log_softmax(dim=1)


def check(output: RequestOutput, directory: Path, num_logprobs: int = 3) -> None:
    prompt, told = output.prompt_token_ids, output.prompt_logprobs
    assert output.error is None and told is not None and len(told) == len(prompt) and told[0] is None
    for token_id, entries, of_row in zip(prompt[1:], told[1:], expected(directory, tuple(prompt)), strict=True):
        assert entries is not None
        own, ordered = entries[token_id], of_row.sort(descending=True).values
        close = {"abs": 2e-4, "rel": 0}
        assert own.logprob == pytest.approx(float(of_row[token_id]), **close)
        # Two that are all but equal may change places.
        assert float(ordered[own.rank - 1]) == pytest.approx(own.logprob, **close)
        likeliest = sorted((e.rank, e.logprob) for i, e in entries.items() if i != token_id or e.rank <= num_logprobs)
        assert [rank for rank, _ in likeliest] == list(range(1, num_logprobs + 1))
        assert [logprob for _, logprob in likeliest] == pytest.approx(ordered[:num_logprobs].tolist(), **close)
        assert len(entries) == num_logprobs + (own.rank > num_logprobs)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize(
    "options, scored_rows",
    [
        ({}, None),
        ({"micro_batches": 2, "num_r_workers": 2, "linear_kernel": "onednn"}, None),
        ({"micro_batches": 2, "max_num_batched_tokens": 40, "linear_kernel": "plain"}, None),
        ({"max_num_batched_tokens": 1}, None),
        ({"micro_batches": 3, "num_r_workers": 2, "linear_kernel": "onednn"}, 20),
        ({"max_num_batched_tokens": 16, "max_num_seqs": 2}, 1),
    ],
)
def test_equal_to_transformers(
    family: str,
    options: dict[str, Any],
    scored_rows: int | None,
    case: Callable[[str], Case],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a soft cap on the logits (gemma2), in one chunk and in many; the tokens after it stay what they are."""
    made, counts = case(family), bound(monkeypatch, scored_rows)
    prompts = made.prompts[LENGTHS]
    with LLM(made.directory, skip_tokenizer_init=True, **options) as llm:
        outputs = quiet(llm, prompts, SCORED)
    for output, tokens in zip(outputs, made.reference, strict=False):
        check(output, made.directory)
        assert output.outputs[0].token_ids == tokens[: SCORED.max_tokens]
    if scored_rows:
        assert max(counts) <= scored_rows + len(prompts), "those that are sampled come on top"


def bound(monkeypatch: pytest.MonkeyPatch, scored_rows: int | None) -> list[int]:
    """Sets how many rows are scored in a step; returns a list that will hold the rows of logits of every forward."""
    if scored_rows:
        monkeypatch.setattr(capacity, "_SCORES_BYTES", 1)
        monkeypatch.setattr(capacity, "_LEAST_SCORED_ROWS", scored_rows)
    counts: list[int] = []
    forward = SWorker.forward

    def counted(self: SWorker, batch: FlatBatch) -> Any:
        counts.append(len(batch.logits_rows))
        return forward(self, batch)

    monkeypatch.setattr(SWorker, "forward", counted)
    return counts


def test_as_many_rows_as_memory_allows(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 MiB of float32, for a vocabulary of 256: they need not be cut.  And a step takes all that it may."""
    assert max(capacity._SCORES_BYTES // (4 * 151_936), capacity._LEAST_SCORED_ROWS) == 441
    prompts = llama.prompts[-2:]  # 140 and 200 tokens
    for scored_rows, steps in ((None, 1), (100, 4)):
        with monkeypatch.context() as patch:
            counts = bound(patch, scored_rows)
            with LLM(llama.directory, skip_tokenizer_init=True) as llm:
                for output in quiet(llm, prompts, SamplingParams(max_tokens=0, prompt_logprobs=3)):
                    check(output, llama.directory)
        assert sum(counts) == sum(map(len, prompts)) - len(prompts) and len(counts) == steps
        assert max(counts) <= (scored_rows or 1000)


def test_n_samples_score_once(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = bound(monkeypatch, None)
    params = SamplingParams(n=3, temperature=1, max_tokens=2, prompt_logprobs=0, seed=1)
    with LLM(llama.directory, skip_tokenizer_init=True) as llm:
        (output,) = quiet(llm, [llama.prompts[3]], params)
    check(output, llama.directory, num_logprobs=0)
    assert sum(counts) == len(llama.prompts[3]) - 1 + 3 * 2


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 8, "num_r_workers": 2}, {"kv_policy": "greedy"}])
def test_nothing_but_scores(options: dict[str, Any], llama: Case) -> None:
    """max_tokens=0, beside requests that go on; without scores, too."""
    scores, plain = SamplingParams(max_tokens=0, prompt_logprobs=3, n=2), SamplingParams(max_tokens=0)
    goes_on = SamplingParams(temperature=0, max_tokens=8)
    with LLM(llama.directory, skip_tokenizer_init=True, max_model_len=75, **options) as llm:
        asked = [(llama.prompts[5], scores), (llama.prompts[2], goes_on), (llama.prompts[0], scores), ([5, 6], plain)]
        outputs = quiet(llm, *map(list, zip(*asked, strict=True)))
        assert not llm._engine.has_work
        llm._engine._scheduler.check_integrity()
        (too_long,) = quiet(llm, [[5] * 76], scores)
    check(outputs[0], llama.directory)
    assert outputs[1].outputs[0].token_ids == llama.reference[2][:8]
    assert outputs[2].prompt_logprobs == [None] and outputs[3].prompt_logprobs is None
    for output in (outputs[0], outputs[2], outputs[3]):
        for completion in output.outputs:
            assert (completion.token_ids, completion.text, completion.finish_reason) == ([], "", "length")
        assert output.metrics and output.metrics.first_token_s is None and output.metrics.total_s > 0
        Metrics("m").on_finished(output)
    assert too_long.error and "76 tokens; the limit is max_model_len = 75" in too_long.error.message


def test_preemption(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thrown out in the middle of a prompt, and later: what was scored is kept, and is not scored again."""
    thrown_out_at: list[tuple[int, int]] = []  # (scored, of so many)
    num_scored: list[int] = []
    preempt, score = Sequence.preempt, SWorker.score

    def noted(self: Sequence) -> None:
        thrown_out_at.append((self.num_scored, self.num_to_score))
        preempt(self)

    def counted(self: SWorker, logits: torch.Tensor, token_ids: np.ndarray, num_logprobs: np.ndarray) -> Any:
        num_scored.append(len(token_ids))
        return score(self, logits, token_ids, num_logprobs)

    monkeypatch.setattr(Sequence, "preempt", noted)
    monkeypatch.setattr(SWorker, "score", counted)
    prompts = [llama.prompts[4], llama.prompts[3], llama.prompts[5], llama.prompts[2]]
    with LLM(
        llama.directory,
        skip_tokenizer_init=True,
        kv_cache_memory=768 * 160,
        block_tokens=16,
        kv_policy="greedy",
        start_policy="eager",
        max_num_batched_tokens=8,
    ) as llm:
        outputs = quiet(llm, prompts, SamplingParams(temperature=0, max_tokens=60, prompt_logprobs=3))
    for output in outputs:
        check(output, llama.directory)
    assert any(0 < scored < of for scored, of in thrown_out_at) and any(scored == of for scored, of in thrown_out_at)
    assert sum(num_scored) == sum(len(prompt) - 1 for prompt in prompts)


@pytest.mark.parametrize("options", [{}, SMALL_STEPS], ids=["whole", "chunked"])
def test_lost_r_workers(options: dict[str, Any], llama: Case) -> None:
    """A step broken off is scored again, and prompts that were computed start anew: each score is there once."""
    params = SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=3)
    for calls in (4, 11, 25, 47):
        with three_workers(llama, **options) as llm:
            make_faulty(llm, calls % 3, calls, gone)
            make_faulty(llm, (calls + 1) % 3, 2 * calls, hung)
            for output, reference in zip(quiet(llm, llama.prompts, params), llama.reference, strict=True):
                check(output, llama.directory)
                assert output.outputs[0].token_ids == reference[:8]
            assert len(llm._engine._rpool.alive) < 3


def test_penalties_do_not_touch_them(llama: Case) -> None:
    params = SamplingParams(max_tokens=2, prompt_logprobs=3, repetition_penalty=3.0, temperature=0.7, top_k=2, seed=3)
    with LLM(llama.directory, skip_tokenizer_init=True) as llm:
        (output,) = quiet(llm, [llama.prompts[4]], params)
    check(output, llama.directory)


def test_made_up_ones_of_an_emulated_device(demo_model: Path) -> None:
    with LLM(demo_model, device="emulated:h100", max_model_len=256) as llm:
        params = SamplingParams(max_tokens=2, prompt_logprobs=2, logprobs=1)
        (output,) = quiet(llm, [[5, 6, 7]], params)
        size = llm.facts.vocab_size
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 3
    told = [*output.prompt_logprobs, *(output.outputs[0].logprobs or [])]
    values = [entry.logprob for entries in told if entries for entry in entries.values()]
    assert values == pytest.approx([-np.log(size)] * len(values))
