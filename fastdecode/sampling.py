"""From sequences to the rows a sampler wants.  Pure."""

from __future__ import annotations

from collections.abc import Sequence as Sequence_

import numpy as np

from fastdecode.request import Sequence
from gpu_sworker import Penalties, SamplingRows, uniforms

# vLLM's: below the first a temperature means the likeliest token, and none divides by less than the second.
GREEDY_BELOW, LEAST_TEMPERATURE = 1e-5, 1e-2


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
