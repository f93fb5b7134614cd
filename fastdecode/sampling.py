"""From sequences to the rows a sampler wants, and what it makes of them.  Pure.

logits of a micro-batch   sampled ┬ sampling_rows ─► the next token of each
                          scored  ┴ scoring_rows  ─► how likely each prompt's token after the row was
"""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

import numpy as np

from fastdecode.plan import Segment
from fastdecode.request import Sequence
from gpu_sworker import Penalties, Sampled, SamplingRows, TokenLogprob, uniforms

# vLLM's: below the first a temperature means the likeliest token, and none divides by less than the second.
GREEDY_BELOW, LEAST_TEMPERATURE = 1e-5, 1e-2


@dataclass(frozen=True)
class MicroBatchResult:
    """What a micro-batch's logits say."""

    sampled: Sampled
    scores: list[list[TokenLogprob]]  # per scored position, in the order of `MicroBatch.scored`


@dataclass(frozen=True)
class ScoringRows:
    token_ids: np.ndarray  # [n] int64, that a prompt has after each position
    num_logprobs: np.ndarray  # [n] int64, how many of the likeliest are wanted beside them


def scoring_rows(segments: Sequence_[Segment], sequences: Sequence_[Sequence]) -> ScoringRows:
    """Of segments with scored positions.  sequences: of each segment."""
    token_ids: list[int] = []
    num_logprobs: list[int] = []
    for segment, sequence in zip(segments, sequences, strict=True):
        scored, params = segment.scored, sequence.request.params
        assert params.prompt_logprobs is not None, "it was asked for"
        token_ids += sequence.request.prompt_token_ids[scored.start + 1 : scored.stop + 1]
        num_logprobs += [params.prompt_logprobs] * len(scored)
    return ScoringRows(np.array(token_ids, np.int64), np.array(num_logprobs, np.int64))


def sampling_rows(sequences: Sequence_[Sequence], vocab_size: int) -> SamplingRows:
    """How to sample the next token of each sequence; draw number = tokens generated so far."""
    params = [sequence.request.params for sequence in sequences]
    counts = np.array([len(sequence.output_token_ids) for sequence in sequences], np.uint64)
    seeds = np.array([sequence.seed for sequence in sequences], np.uint64)
    penalties, banned = [], []
    for row, sequence in enumerate(sequences):
        request = sequence.request
        if request.params.has_penalties:
            penalties.append(
                Penalties(
                    row,
                    list(request.prompt_token_ids),
                    sequence.output_token_ids,
                    request.params.presence_penalty,
                    request.params.frequency_penalty,
                    request.params.repetition_penalty,
                )
            )
        if len(sequence.output_token_ids) < request.params.min_tokens:
            ends = sorted(t for t in request.eos_token_ids | request.stop_token_ids if t < vocab_size)
            if ends:
                banned.append((row, ends))
    return SamplingRows(
        temperature=np.array([_temperature(p.temperature) for p in params], np.float32),
        top_k=np.array([p.top_k for p in params], np.int64),
        top_p=np.array([p.top_p for p in params], np.float32),
        min_p=np.array([p.min_p for p in params], np.float32),
        uniforms=uniforms(seeds, counts),
        num_logprobs=np.array([-1 if p.logprobs is None else p.logprobs for p in params], np.int64),
        penalties=penalties,
        banned=banned,
    )


def _temperature(asked: float) -> float:
    return 0.0 if asked < GREEDY_BELOW else max(asked, LEAST_TEMPERATURE)
