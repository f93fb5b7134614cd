"""Predicted lengths: distributions that are ones, errors as published, and learning from what ended."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdecode.scheduling.predictor import (
    BUCKET_TOKENS,
    PUBLISHED_ACCURACY,
    Learned,
    MaxTokens,
    NoisyOracle,
    Oracle,
    Prediction,
    Predictor,
)


@given(
    st.sampled_from(["max", "oracle", "noisy", "learned"]),
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), max_size=60),
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.integers(0, 4500),
)
def test_predictions_are_distributions(
    kind: str, ended: list[tuple[int, int]], true_tokens: int, max_tokens: int, so_far: int
) -> None:
    """Of lengths that are possible; quantiles rise with the share and lie beyond what there is already."""
    predictors: dict[str, Predictor] = {
        "max": MaxTokens(), "oracle": Oracle(), "noisy": NoisyOracle(), "learned": Learned(least=5)
    }  # fmt: skip
    predictor = predictors[kind]
    for prompt, output in ended:
        predictor.observe(prompt, output)
    prediction = predictor.predict(100, max_tokens, true_tokens)
    assert sum(prediction.weights) == pytest.approx(1) and len(prediction.lengths) == len(prediction.weights)
    assert list(prediction.lengths) == sorted(set(prediction.lengths))
    assert prediction.lengths[0] >= 1 and prediction.lengths[-1] <= max_tokens
    quantiles = [prediction.quantile(share, so_far) for share in (0.0, 0.5, 0.9, 1.0)]
    assert quantiles == sorted(quantiles) and quantiles[0] > so_far
    assert so_far < prediction.mean(so_far) <= quantiles[-1]
    left = {n: w for n, w in zip(prediction.lengths, prediction.weights, strict=True) if n > so_far}
    for share, quantile in zip((0.5, 0.9), quantiles[1:3], strict=True):
        reached = [
            n for n in left if sum(w for other, w in left.items() if other <= n) >= share * sum(left.values()) - 1e-9
        ]
        assert quantile == (reached[0] if sum(left.values()) else so_far + BUCKET_TOKENS)
    if sum(left.values()):
        assert prediction.mean(so_far) == pytest.approx(sum(n * w for n, w in left.items()) / sum(left.values()))


def test_a_sequence_that_outlives_its_bucket_moves_to_the_next() -> None:
    prediction = Prediction((200, 400), (0.9, 0.1))
    assert prediction.quantile(0.9) == 200 and prediction.quantile(0.9, 200) == 400
    assert prediction.quantile(0.5, 400) == 400 + BUCKET_TOKENS


def test_the_published_accuracy() -> None:
    """74.9 % name the true bucket; the rest a neighbour."""
    generator, oracle = np.random.default_rng(0), NoisyOracle(seed=1)
    right, near, count = 0, 0, 40_000
    for tokens in generator.integers(1, 2000, count).tolist():
        prediction = oracle.predict(10, 10_000, tokens)
        buckets = np.bincount([(n - 1) // BUCKET_TOKENS for n in prediction.lengths], prediction.weights)
        named = int(np.argmax(buckets))
        off = abs(named - (tokens - 1) // BUCKET_TOKENS)
        right, near = right + (off == 0), near + (off <= 1)
    assert right / count == pytest.approx(PUBLISHED_ACCURACY, abs=0.005) and near == count


def test_learning() -> None:
    """Short prompts with long answers and long prompts with short ones are told apart; the newest count."""
    learned = Learned(window=100, least=10)
    assert learned.predict(5, 777, None) == Prediction((777,), (1.0,), is_informed=False)
    for _ in range(50):
        learned.observe(5, 950)
        learned.observe(500, 30)
    assert 950 <= learned.predict(5, 4000, None).quantile(0.9) <= 950 * 17 / 16
    assert learned.predict(500, 4000, None).quantile(0.9) == 30
    assert learned.predict(500, 20, None).lengths == (20,)
    for _ in range(100):
        learned.observe(5, 150)
    assert 150 <= learned.predict(5, 4000, None).mean() <= 160


def test_oracles_need_the_truth() -> None:
    for oracle in (Oracle(), NoisyOracle()):
        with pytest.raises(ValueError, match="simulation"):
            oracle.predict(1, 10, None)


def test_outputs_that_were_cut() -> None:
    """They say nothing of how far they would have gone."""
    learned = Learned(least=10)
    for _ in range(40):
        learned.observe(5, 4, was_cut=True)
    assert learned.predict(5, 4, None).quantile(0.5) == 4 and learned.predict(5, 1000, None).quantile(0.0) == 1000


def counted(ended: list[tuple[int, bool]], max_tokens: int) -> Prediction:
    """Of output lengths, each with whether it was cut, what `Learned` says: looked at one by one."""
    counts: dict[int, int] = {}
    for tokens, was_cut in ended:
        grain = 1 << max(0, tokens.bit_length() - 5)
        length = max_tokens if was_cut else min(-(-tokens // grain) * grain, max_tokens)
        counts[length] = counts.get(length, 0) + 1
    lengths = tuple(sorted(counts))
    return Prediction(lengths, tuple(counts[length] / len(ended) for length in lengths))


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.booleans()), min_size=1, max_size=60),
    st.lists(st.integers(1, 4000), min_size=1, max_size=3),
)
def test_lengths_are_counted_as_they_come(ended: list[tuple[int, bool]], limits: list[int]) -> None:
    """After each end what counting all of the window anew says, for any limit, however often it is asked."""
    learned = Learned(window=20, least=1)
    for i, (tokens, was_cut) in enumerate(ended):
        learned.observe(7, tokens, was_cut=was_cut)
        for max_tokens in limits * 2:
            assert learned.predict(7, max_tokens, None) == counted(ended[max(0, i - 19) : i + 1], max_tokens)
