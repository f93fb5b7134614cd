"""What tells a tie that rounding decided from a fault: it must not excuse the fault."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import Case, quiet
from safetensors.torch import load_file, save_file

from bench import near_ties
from bench.near_ties import LOGITS_APART, assert_same_tokens
from fastdecode import LLM, SamplingParams
from gpu_sworker import derive_seed, uniforms
from models import make_model

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
PROMPT = [5, 6, 7]


@pytest.fixture(scope="module")
def doubled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int, int]:
    """A model that cannot tell two tokens apart: the best ones after PROMPT, and the third."""
    directory = make_model("llama", tmp_path_factory.mktemp("doubled"), tie_word_embeddings=False)
    best, other, third = np.argsort(-near_ties._logits(directory, tuple(PROMPT)))[:3].tolist()
    near_ties._reference.cache_clear()
    file = directory / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"][other] = weights["lm_head.weight"][best] * (1 + 1e-6)
    save_file(weights, file, metadata={"format": "pt"})
    return directory, best, other, third


def test_two_best_logits(doubled: tuple[Path, int, int, int]) -> None:
    model, best, other, third = doubled
    assert assert_same_tokens(model, [PROMPT], GREEDY, [[best, 1]], [[best, 1]]) == []
    (tie,) = assert_same_tokens(model, [PROMPT], GREEDY, [[other, 9, 9]], [[best, 1, 1]])  # no word of what follows
    assert (tie.sample, tie.position) == (0, 0) and 0 < tie.distance < tie.tolerance == LOGITS_APART
    with pytest.raises(
        AssertionError, match=f"new token 0: {third} where {best} was due; their logits are .* apart by"
    ):
        assert_same_tokens(model, [PROMPT], GREEDY, [[third, 1]], [[best, 1]])
    with pytest.raises(AssertionError, match=f"new token 0: {best} where {third} was due"):
        assert_same_tokens(model, [PROMPT], GREEDY, [[best, 1]], [[third, 1]])
    with pytest.raises(AssertionError, match="1 tokens where 2 were due"):
        assert_same_tokens(model, [PROMPT], GREEDY, [[best]], [[best, 1]])


def test_a_later_token_is_judged_by_what_came_before_it(doubled: tuple[Path, int, int, int]) -> None:
    model, best, other, _ = doubled
    with pytest.raises(AssertionError, match="new token 1"):
        assert_same_tokens(model, [[9]], GREEDY, [[PROMPT[1], other]], [[PROMPT[1], best]])
    (tie,) = assert_same_tokens(model, [PROMPT[:1]], GREEDY, [[*PROMPT[1:], other]], [[*PROMPT[1:], best]])
    assert tie.position == 2


@pytest.mark.parametrize("temperature", [0.8, 1.3])
def test_a_draw_and_a_border(temperature: float, llama: Case) -> None:
    """Its neighbour across the border may come if the draw lies beside it; no other token, and of no other draw."""
    ends = np.cumsum(near_ties._softmax(near_ties._logits(llama.directory, tuple(PROMPT)) / temperature))
    tolerance = LOGITS_APART / temperature
    seeds = np.arange(20_000)
    draws = uniforms(np.array([derive_seed(int(s), 0) for s in seeds], np.uint64), np.zeros(len(seeds)))
    tokens = np.searchsorted(ends, draws, side="right")
    wide = np.diff(ends, prepend=0.0) > 20 * tolerance  # shares that no rounding crosses
    above = ends[tokens] - draws
    is_inside = wide[tokens] & wide[np.minimum(tokens + 1, 255)] & (tokens < 255)
    beside, apart = (
        int(np.flatnonzero(is_inside & found)[0]) for found in (above < tolerance / 2, above > 3 * tolerance)
    )
    for seed, is_tie in ((beside, True), (apart, False)):
        params = SamplingParams(temperature=temperature, seed=seed, max_tokens=2)
        token = int(tokens[seed])
        if is_tie:
            (tie,) = assert_same_tokens(llama.directory, [PROMPT], params, [[token + 1, 3]], [[token, 4]])
            assert 0 < tie.distance < tie.tolerance == tolerance
        else:
            with pytest.raises(AssertionError, match="the draw is .* their shares are .* apart by"):
                assert_same_tokens(llama.directory, [PROMPT], params, [[token + 1, 3]], [[token, 4]])
        far = int(np.flatnonzero(wide & (np.abs(np.arange(256) - token) > 2))[0])
        with pytest.raises(AssertionError, match=f"{far} where {token} was due"):
            assert_same_tokens(llama.directory, [PROMPT], params, [[far, 3]], [[token, 4]])


def test_it_draws_as_the_engine_does(llama: Case) -> None:
    """The token that came lies where the draw is, at every position of every sample."""
    params = SamplingParams(temperature=1.3, max_tokens=6, seed=5, n=3, ignore_eos=True)
    with LLM(llama.directory, skip_tokenizer_init=True) as llm:
        outputs = quiet(llm, llama.prompts[:3], params)
    assert assert_same_tokens(llama.directory, llama.prompts[:3], params, outputs, outputs) == []
    for prompt, output in zip(llama.prompts, outputs, strict=False):
        for completion in output.outputs:
            for position, token in enumerate(completion.token_ids):
                logits = near_ties._logits(llama.directory, (*prompt, *completion.token_ids[:position]))
                ends = np.cumsum(near_ties._softmax(logits / 1.3))
                seed = np.array([derive_seed(5, completion.index)], np.uint64)
                draw = float(uniforms(seed, np.array([position]))[0])
                assert near_ties._distance(draw, ends, token) <= LOGITS_APART / 1.3


def test_errors_and_filters_are_not_judged(llama: Case) -> None:
    with LLM(llama.directory, skip_tokenizer_init=True) as llm:
        (refused,) = quiet(llm, [[]], GREEDY)
    with pytest.raises(AssertionError, match="the prompt is empty"):
        assert_same_tokens(llama.directory, [[5]], GREEDY, [refused], [[1]])
    filtered = SamplingParams(temperature=1, seed=1, top_p=0.5)
    with pytest.raises(AssertionError, match="only distributions that nothing but"):
        assert_same_tokens(llama.directory, [[5]], filtered, [[1]], [[2]])


def test_the_reference_that_others_compare_with_has_no_near_ties(llama: Case) -> None:
    """So its greedy tokens come on every processor, with any number of rows."""
    for prompt, tokens in zip(llama.prompts, llama.reference, strict=True):
        for position in range(len(tokens)):
            second, first = np.partition(near_ties._logits(llama.directory, (*prompt, *tokens[:position])), -2)[-2:]
            assert first - second > 2 * LOGITS_APART, (prompt, position)
