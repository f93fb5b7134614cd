"""Sampling: every filter against its definition, draws against their distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdecode.api.token_rules import TokenCounts
from gpu_sworker import Penalties, SamplingRows, derive_seed, uniforms
from gpu_sworker.sampler import sample, score


def rows(n: int, **columns: object) -> SamplingRows:
    """n rows of greedy sampling, but for what is given: a value for all or a list."""
    defaults = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "uniforms": 0.5, "num_logprobs": -1}
    dtypes = {"top_k": np.int64, "num_logprobs": np.int64, "uniforms": np.float64}
    arrays = {
        name: np.broadcast_to(np.array(columns.pop(name, value), dtypes.get(name, np.float32)), n).copy()
        for name, value in defaults.items()
    }
    return SamplingRows(**arrays, **columns)  # type: ignore[arg-type]


def draws(logits: list[float], n: int = 20_000, **columns: object) -> np.ndarray:
    """Frequencies of n draws with evenly spread uniforms: exact to 1/n."""
    spread = (np.arange(n) + 0.5) / n
    sampled = sample(
        torch.tensor([logits]).expand(n, -1),
        rows(n, temperature=columns.pop("temperature", 1.0), uniforms=spread, **columns),
    )
    return np.bincount(sampled.token_ids, minlength=len(logits)) / n


def penalties(
    row: int, prompt: list[int], output: list[int], *, presence: float, frequency: float, repetition: float
) -> Penalties:
    """As counted from nothing."""
    ids = np.unique(np.array([*output, *(prompt if repetition != 1 else [])], np.int64))
    return Penalties(row, ids, np.array([output.count(i) for i in ids], np.int64), presence, frequency, repetition)


LOGITS = [2.0, 1.0, 0.0, -1.0, 3.0]


def softmax(logits: list[float], temperature: float = 1.0) -> np.ndarray:
    weights = np.exp(np.array(logits) / temperature)
    return weights / weights.sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_temperature(temperature: float) -> None:
    np.testing.assert_allclose(draws(LOGITS, temperature=temperature), softmax(LOGITS, temperature), atol=1e-3)


def kept(mask: list[bool]) -> np.ndarray:
    weights = softmax(LOGITS) * mask
    return weights / weights.sum()


@pytest.mark.parametrize(
    "columns, mask",
    [
        ({"top_k": 2}, [True, False, False, False, True]),
        ({"top_k": 1}, [False, False, False, False, True]),
        ({"top_k": 99}, [True] * 5),
        ({"top_p": 0.7}, [True, False, False, False, True]),
        ({"top_p": 1e-6}, [False, False, False, False, True]),
        ({"min_p": 0.2}, [True, False, False, False, True]),
        ({"min_p": 1.0}, [False, False, False, False, True]),
        ({"top_k": 3, "min_p": 0.3}, [True, False, False, False, True]),
    ],
)
def test_filters(columns: dict[str, float], mask: list[bool]) -> None:
    np.testing.assert_allclose(draws(LOGITS, **columns), kept(mask), atol=1e-3)


def test_rows_do_not_mix() -> None:
    """Greedy, filtered and free rows in one batch are each what they are alone."""
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    columns = {
        "temperature": [0, 1, 1, 0.5, 1, 0],
        "top_k": [0, 3, 0, 0, 5, 7],
        "top_p": [1, 1, 0.4, 1, 0.8, 0.3],
        "min_p": [0, 0, 0, 0.1, 0.02, 0.5],
        "uniforms": [0.1, 0.9, 0.5, 0.99, 0.0, 0.7],
    }
    together = sample(logits, rows(6, **columns)).token_ids
    alone = [sample(logits[i : i + 1], rows(1, **{k: v[i] for k, v in columns.items()})).token_ids[0] for i in range(6)]
    assert together.tolist() == alone


@given(st.floats(0, 1, exclude_max=True), st.floats(0.01, 1), st.integers(0, 6), st.floats(0, 1))
def test_a_token_without_probability_is_never_drawn(uniform: float, top_p: float, top_k: int, min_p: float) -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1e-3, -50.0, -torch.inf]])
    token = sample(logits, rows(1, temperature=1, uniforms=uniform, top_p=top_p, top_k=top_k, min_p=min_p)).token_ids[0]
    assert torch.isfinite(logits[0, token])


def test_penalties() -> None:
    logits = torch.tensor([[1.0, 1.0, -1.0, 1.0]])
    given = penalties(0, [3], [0, 0, 2], presence=0.25, frequency=0.5, repetition=2.0)
    result = sample(logits, rows(1, penalties=[given], num_logprobs=0))
    assert result.token_ids[0] == 1  # 0: 1/2 - 0.25 - 2*0.5, 2: -1*2 - ..., 3: 1/2
    # Log-probabilities are those of the raw logits.
    assert result.logprobs[0][0].logprob == pytest.approx(float(logits[0].log_softmax(0)[1]))
    assert torch.equal(logits, torch.tensor([[1.0, 1.0, -1.0, 1.0]]))


def penalised(logits: np.ndarray, prompt: list[int], output: list[int], by: dict[str, float]) -> np.ndarray:
    """One row by definition.  Repetition is CTRL's, the others are OpenAI's."""
    made = logits.copy()
    for token_id in {*prompt, *output}:
        made[token_id] *= np.float32(by["repetition"]) if made[token_id] <= 0 else 1
        made[token_id] /= np.float32(by["repetition"]) if logits[token_id] > 0 else 1
        if count := output.count(token_id):
            made[token_id] -= np.float32(by["presence"]) + np.float32(by["frequency"]) * np.float32(count)
    return made


def test_penalties_of_many_rows_while_outputs_grow() -> None:
    """Each row by its own, those of no penalties untouched, and counted as tokens come as if from nothing."""
    random = np.random.default_rng(0)
    logits = random.standard_normal((30, 40)).astype(np.float32)
    asked: list[dict[str, float]] = [
        {
            "presence": random.choice([0.0, 0.3]),
            "frequency": random.choice([0.0, 0.2]),
            "repetition": random.choice([1.0, 1.3]),
        }
        for _ in range(20)
    ]
    prompts = [random.integers(0, 40, 5).tolist() if by["repetition"] != 1 else [] for by in asked]
    counts = [TokenCounts(np.unique(np.array(prompt, np.int64))) for prompt in prompts]
    outputs: list[list[int]] = [[] for _ in asked]
    for step in range(40):
        given, expected = [], logits.copy()
        for row, (by, prompt, output, counted) in enumerate(zip(asked, prompts, outputs, counts, strict=True)):
            counted.update(output)
            given.append(Penalties(row, counted.token_ids, counted.counts, **by))
            anew = penalties(row, prompt, output, **by)
            order = np.argsort(counted.token_ids)
            assert counted.token_ids[order].tolist() == anew.token_ids.tolist()
            assert counted.counts[order].tolist() == anew.counts.tolist()
            expected[row] = penalised(logits[row], prompt, output, by)
        columns = {"temperature": [0, 1] * 15, "uniforms": random.random(30)}
        result = sample(torch.from_numpy(logits), rows(30, penalties=given, **columns)).token_ids
        assert result.tolist() == sample(torch.from_numpy(expected), rows(30, **columns)).token_ids.tolist(), step
        for output in outputs:
            output += random.integers(0, 40, random.integers(0, 3)).tolist()


def test_banned_tokens() -> None:
    assert sample(torch.tensor([LOGITS, LOGITS]), rows(2, banned=[(1, [4, 0])])).token_ids.tolist() == [4, 1]


def test_logprobs() -> None:
    result = sample(
        torch.tensor([LOGITS, LOGITS]), rows(2, num_logprobs=[2, -1], temperature=[1, 0], uniforms=0.999999)
    )
    entries, nothing = result.logprobs
    expected = np.log(softmax(LOGITS))
    assert not nothing and [e.token_id for e in entries[1:]] == [4, 0] and [e.rank for e in entries[1:]] == [1, 2]
    assert entries[0].token_id == result.token_ids[0]
    for entry in entries:
        assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-6)
    assert entries[0].rank == 1 + int((expected > expected[entries[0].token_id]).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_given_tokens(dtype: torch.dtype) -> None:
    """More rows than are looked at together; each with as many of the likeliest as it wants, at most all there are."""
    logits = torch.randn(150, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    given, wanted = torch.arange(150) % 40, np.arange(150) % 50
    expected = logits.float().log_softmax(dim=1)
    for row, (own, *likeliest) in enumerate(score(logits, given, wanted)):
        of_row = expected[row]
        assert (own.token_id, own.logprob) == (given[row], of_row[given[row]])
        assert own.rank == 1 + int((of_row > of_row[given[row]]).sum())
        assert [entry.logprob for entry in likeliest] == of_row.sort(descending=True).values[: wanted[row]].tolist()
        assert all(entry.logprob == of_row[entry.token_id] for entry in likeliest)
        assert [entry.rank for entry in likeliest] == list(range(1, len(likeliest) + 1))


def test_uniforms_look_uniform_and_depend_on_both() -> None:
    """Mean, variance and neighbours' correlation of 200,000 draws, along positions and along seeds."""
    n = 200_000
    counter = np.arange(n, dtype=np.uint64)
    for stream in (uniforms(np.full(n, 7, np.uint64), counter), uniforms(counter, np.zeros(n, np.uint64))):
        assert stream.min() >= 0 and stream.max() < 1
        assert abs(stream.mean() - 0.5) < 0.003 and abs(stream.var() - 1 / 12) < 0.002
        assert abs(np.corrcoef(stream[:-1], stream[1:])[0, 1]) < 0.01
        assert len(np.unique(stream)) > n - 5


@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**32))
def test_derived_seeds(seed: int, index: int) -> None:
    derived = derive_seed(seed, index)
    assert 0 <= derived < 2**64 and derived == derive_seed(seed, index) != derive_seed(seed, index + 1)


def test_min_p_comes_before_top_p() -> None:
    """vLLM's order: what min_p leaves is renormalised before top_p counts."""
    logits = np.log([0.45, 0.27] + [0.28 / 6] * 6).tolist()
    np.testing.assert_allclose(draws(logits, min_p=0.2, top_p=0.6), [1] + [0] * 7, atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_rows_stay_in_the_vocabulary_and_alone(bad: float) -> None:
    logits = torch.tensor([LOGITS, [bad] * 5, [0.0, bad, 0.0, 0.0, 0.0], LOGITS])
    token_ids = sample(logits, rows(4, temperature=1, uniforms=0.999)).token_ids
    assert ((token_ids >= 0) & (token_ids < 5)).all()
    assert token_ids[0] == token_ids[3] == sample(logits[:1], rows(1, temperature=1, uniforms=0.999)).token_ids[0]
