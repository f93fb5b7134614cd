"""Whether tokens that differ are a fault, or a tie that rounding decided.

Matrix kernels round differently for different numbers of rows, so the logits of a sequence move in their last bits with
whoever shares its steps, and recovery computes with other numbers than an undisturbed run.  A token can then change in
two places, and nowhere else:

    greedy     the two best logits are as good as equal
    sampled    the draw, which depends on seed and position alone, lies beside a border of the distribution

The unsplit model tells which it was, from the tokens up to the first difference.  What comes after it has another
prefix, so a sequence is compared no further than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from fastdecode import RequestOutput, SamplingParams
from gpu_sworker import derive_seed, load_reference, uniforms

# Of one logit, between two ways of computing it in fp32: three times the largest difference of log-probabilities that
# was seen (6.4e-5: small Llama of the tests, 60 sequences, 3 at a time against 16, both linear kernels).
LOGITS_APART = 2e-4


@dataclass(frozen=True)
class NearTie:
    sample: int  # which of the request's n
    position: int  # of the first token that differs
    distance: float  # of the two logits, or of the draw and the border
    tolerance: float


def assert_same_tokens(
    model: Path,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    outputs: Sequence[RequestOutput] | Sequence[Sequence[int]],
    expected: Sequence[RequestOutput] | Sequence[Sequence[int]],
) -> list[NearTie]:
    """Raises AssertionError at the first difference that is no near-tie, with its numbers; returns those that are.

    outputs, expected: as `generate` gives them, or the tokens of each.
    """
    assert len(prompts) == len(outputs) == len(expected), "as many on both sides"
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
    ties = []
    for prompt, own, output, wanted in zip(prompts, each, outputs, expected, strict=True):
        pairs = zip(_tokens(output), _tokens(wanted), strict=True)
        for sample, (got, right) in enumerate(pairs):
            if got != right:
                ties.append(_judge(model, list(prompt), own, sample, got, right))
    return ties


def _tokens(output: RequestOutput | Sequence[int]) -> list[list[int]]:
    if isinstance(output, RequestOutput):
        assert not output.error, output.error
        return [completion.token_ids for completion in output.outputs]
    return [list(output)]


def _judge(
    model: Path, prompt: list[int], params: SamplingParams, sample: int, got: list[int], right: list[int]
) -> NearTie:
    position = next((i for i, (a, b) in enumerate(zip(got, right, strict=False)) if a != b), None)
    assert position is not None, f"sample {sample}: {len(got)} tokens where {len(right)} were due, equal so far"
    shaped = params.has_penalties or params.logit_bias or params.allowed_ids or params.bad_words or params.min_p
    is_plain = not shaped and params.top_k == 0 and params.top_p == 1
    assert is_plain, "only distributions that nothing but the temperature shapes are judged here"
    logits = _logits(model, (*prompt, *right[:position]))
    one, other = got[position], right[position]
    if params.temperature == 0:
        best = float(logits.max())
        tie = NearTie(sample, position, best - float(min(logits[one], logits[other])), LOGITS_APART)
        numbers = f"their logits are {logits[one]:.6f} and {logits[other]:.6f}, the best is {best:.6f}"
    else:
        assert params.seed is not None, "a draw is known by its seed"
        draw = float(uniforms(np.array([derive_seed(params.seed, sample)], np.uint64), np.array([position]))[0])
        ends = np.cumsum(_softmax(logits / params.temperature))
        # Where no logit moves by more than e, no border moves by more than e / temperature.
        distance = max(_distance(draw, ends, token) for token in (one, other))
        tie = NearTie(sample, position, distance, LOGITS_APART / params.temperature)
        numbers = f"the draw is {draw:.6f}, their shares are {_share(ends, one)} and {_share(ends, other)}"
    place = f"sample {sample}, new token {position}: {one} where {other} was due"
    apart = f"apart by {tie.distance:.2e}, a tie is {tie.tolerance:.2e} or less"
    assert tie.distance <= tie.tolerance, f"{place}; {numbers}: {apart}"
    return tie


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _share(ends: np.ndarray, token: int) -> str:
    """Of the numbers from 0 to 1, those whose draw is this token."""
    return f"[{ends[token - 1] if token else 0.0:.6f}, {ends[token]:.6f})"


def _distance(draw: float, ends: np.ndarray, token: int) -> float:
    """From the draw to a token's share; 0 within it."""
    return max(0.0, (ends[token - 1] if token else 0.0) - draw, draw - ends[token])


@cache
def _reference(model: Path) -> PreTrainedModel:
    return load_reference(model, torch.float64)


def _logits(model: Path, token_ids: tuple[int, ...]) -> np.ndarray:
    """After the last token.  # [vocab] float64"""
    with torch.inference_mode():
        logits: np.ndarray = _reference(model)(torch.tensor([token_ids])).logits[0, -1].double().numpy()
    return logits
