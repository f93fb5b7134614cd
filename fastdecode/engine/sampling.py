"""From sequences to the rows a sampler wants, and what it makes of them.  Pure.

logits of a micro-batch   sampled ┬ sampling_rows ─► the next token of each
                          scored  ┴ scoring_rows  ─► how likely each prompt's token after the row was
"""

from __future__ import annotations

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass

import numpy as np

from fastdecode.api.token_rules import TokenRules
from fastdecode.scheduling.plan import Segment
from fastdecode.scheduling.request import Sequence
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


def sampling_rows(sequences: Sequence_[Sequence]) -> SamplingRows:
    """How to sample the next token of each sequence; draw number = tokens generated so far."""
    params = [sequence.request.params for sequence in sequences]
    counts = np.array([len(sequence.output_token_ids) for sequence in sequences], np.uint64)
    seeds = np.array([sequence.seed for sequence in sequences], np.uint64)
    rows = SamplingRows(
        temperature=np.array([_temperature(p.temperature) for p in params], np.float32),
        top_k=np.array([p.top_k for p in params], np.int64),
        top_p=np.array([p.top_p for p in params], np.float32),
        min_p=np.array([p.min_p for p in params], np.float32),
        uniforms=uniforms(seeds, counts),
        num_logprobs=np.array([-1 if p.logprobs is None else p.logprobs for p in params], np.int64),
    )
    for row, sequence in enumerate(sequences):
        if sequence.request.rules:
            _add_rules(rows, row, sequence, sequence.request.rules)
    return rows


def _add_rules(rows: SamplingRows, row: int, sequence: Sequence, rules: TokenRules) -> None:
    params, output = sequence.request.params, sequence.output_token_ids
    if rules.allowed is not None:
        rows.allowed.append((row, rules.allowed))
    if banned := rules.banned(output):
        rows.banned.append((row, banned))
    if len(rules.bias_ids):
        rows.biases.append((row, rules.bias_ids, rules.bias_values))
    if params.has_penalties:
        rows.penalties.append(
            Penalties(
                row,
                rules.prompt_ids,
                output,
                params.presence_penalty,
                params.frequency_penalty,
                params.repetition_penalty,
            )
        )


def _temperature(asked: float) -> float:
    return 0.0 if asked < GREEDY_BELOW else max(asked, LEAST_TEMPERATURE)
