"""From sequences to the rows a sampler wants, and what it makes of them.  Pure.

logits of a step           sampled ┬ sampling_rows ─► the next token of each
                          scored  ┴ scoring_rows  ─► how likely each prompt's token after the row was
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

import numpy as np

from fastdecode.api.sampling_params import LIKELIEST
from fastdecode.api.token_rules import TokenCounts, TokenRules
from fastdecode.scheduling.plan import Decodes, Segment, Step
from fastdecode.scheduling.request import Sequence
from gpu_sworker import Penalties, Sampled, SamplingRows, TokenLogprobs, uniforms


@dataclass(frozen=True)
class StepResult:
    """What the logits of a step say."""

    sampled: Sampled
    scores: list[TokenLogprobs]  # per scored position, in the order of `Step.scored`


@dataclass(frozen=True)
class ScoringRows:
    token_ids: np.ndarray  # [n] int64, that a prompt has after each position
    num_logprobs: np.ndarray  # [n] int64, how many of the likeliest are wanted beside them


def scoring_rows(segments: abc.Sequence[Segment], sequences: abc.Sequence[Sequence]) -> ScoringRows:
    """Of segments with scored positions.  sequences: of each segment."""
    token_ids: list[int] = []
    num_logprobs: list[int] = []
    for segment, sequence in zip(segments, sequences, strict=True):
        scored, params = segment.scored, sequence.request.params
        assert params.prompt_logprobs is not None, "it was asked for"
        token_ids += sequence.request.prompt_token_ids[scored.start + 1 : scored.stop + 1]
        num_logprobs += [params.prompt_logprobs] * len(scored)
    return ScoringRows(np.array(token_ids, np.int64), np.array(num_logprobs, np.int64))


def sampling_rows(step: Step, running: abc.Callable[[int], Sequence]) -> SamplingRows:
    """How to sample the next token of each row of `Step.sampled`; draw number = tokens generated so far.

    running: seq_id -> sequence; asked of those alone that have just begun, or rules of single tokens.
    """
    decodes, begun = step.decodes, [running(segment.seq_id) for segment in step.sampled_prompts]
    assert decodes.has_rules is not None, "a lane knows it"
    with_rules = [(row, running(int(decodes.seq_ids[row]))) for row in np.flatnonzero(decodes.has_rules).tolist()]
    with_rules += [(row, sequence) for row, sequence in enumerate(begun, len(decodes)) if sequence.request.rules]
    if decodes.draws is None and all(sequence.request.params.draw == LIKELIEST for sequence in begun):
        rows = SamplingRows.likeliest(len(decodes) + len(begun))
    else:
        rows = _drawn(decodes, begun)
    for row, sequence in with_rules:
        assert sequence.request.rules
        _add_rules(rows, row, sequence, sequence.request.rules)
    return rows


def _drawn(decodes: Decodes, begun: list[Sequence]) -> SamplingRows:
    """Each by its own `Draw`."""
    draws, seeds, numbers = decodes.draws, decodes.seeds, decodes.num_output_tokens
    assert seeds is not None and numbers is not None, "a lane has them"
    if draws is None:
        draws = np.broadcast_to(LIKELIEST, (len(decodes), len(LIKELIEST)))
    if begun:
        draws = np.concatenate([draws, np.array([sequence.request.params.draw for sequence in begun], np.float64)])
        seeds = np.concatenate([seeds.view(np.uint64), np.array([sequence.seed for sequence in begun], np.uint64)])
        numbers = np.concatenate([numbers, np.array([len(s.output_token_ids) for s in begun], np.int64)])
    temperature, top_k, top_p, min_p, num_logprobs = draws.T  # float64 holds all of them exactly
    rows = SamplingRows(
        temperature=temperature.astype(np.float32),
        top_k=top_k.astype(np.int64),
        top_p=top_p.astype(np.float32),
        min_p=min_p.astype(np.float32),
        uniforms=np.zeros(len(draws)),
        num_logprobs=num_logprobs.astype(np.int64),
    )
    random = np.flatnonzero(temperature > 0)
    if len(random):
        rows.uniforms[random] = uniforms(seeds.view(np.uint64)[random], numbers[random].astype(np.uint64))
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
        counts = sequence.token_counts = sequence.token_counts or TokenCounts(rules.prompt_ids)
        counts.update(output)
        rows.penalties.append(
            Penalties(
                row,
                counts.token_ids,
                counts.counts,
                params.presence_penalty,
                params.frequency_penalty,
                params.repetition_penalty,
            )
        )
