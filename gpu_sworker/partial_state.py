"""Attention over a part of a sequence's keys, on the device, and how the parts become the whole.

A holder of K and V answers with o, the weighted mean of the values it has, and the logarithm of what the weights add
up to.  That is all a merge needs (FlashAttention-2's and FlashInfer's form of it):

    lse = log(exp lseA + exp lseB)      o = oA · exp(lseA - lse) + oB · exp(lseB - lse)

so a sequence can lie on several holders.  A sink is a part with one score and no value: it goes in once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import numpy as np
import torch

from gpu_sworker.staging import on_device


@dataclass(frozen=True)
class PartialState:
    """What attention over some keys leaves behind, per query and head.  Over none: o is 0, lse -inf."""

    o: torch.Tensor  # [num_queries, num_q_heads, head_dim], of q's dtype
    lse: torch.Tensor  # [num_queries, num_q_heads] float32 (float64 if q is), log of the sum of exp(score)

    def __len__(self) -> int:
        return len(self.o)

    def __getitem__(self, queries: slice) -> PartialState:
        return PartialState(self.o[queries], self.lse[queries])


def merge(states: Sequence[PartialState]) -> PartialState:
    """The attention of each query over the keys of all; at least one state.  Sums in float32, rounds once."""
    if len(states) == 1:
        return states[0]
    total = reduce(torch.logaddexp, (state.lse for state in states))
    finite = total.clamp(min=torch.finfo(total.dtype).min)  # where no key was seen: exp(-inf - -inf) is to be 0
    weights = [torch.exp(state.lse - finite).unsqueeze(2) for state in states]
    o = states[0].o * weights[0]  # in the wider dtype of the two, which is the weights'
    for state, weight in zip(states[1:], weights[1:], strict=True):
        o.addcmul_(state.o.to(o.dtype), weight)
    return PartialState(o.to(states[0].o.dtype), total)


def merge_rows(parts: Sequence[tuple[np.ndarray, PartialState]]) -> PartialState:
    """Of rows that each part has some of: which ones, [n] int64 and rising, and their state there.

    Every row is in some part.
    """
    num_rows = 1 + max(int(rows[-1]) for rows, _ in parts)
    if all(len(rows) == num_rows for rows, _ in parts):
        return merge([state for _, state in parts])
    first = parts[0][1]
    o = first.o.new_zeros((num_rows, *first.o.shape[1:]))
    lse = first.lse.new_full((num_rows, first.lse.shape[1]), -torch.inf)
    for numbers, state in parts:
        rows = on_device(numbers, o.device)
        merged = merge([PartialState(o[rows], lse[rows]), state])
        o[rows], lse[rows] = merged.o, merged.lse
    return PartialState(o, lse)


def with_sinks(state: PartialState, sinks: torch.Tensor) -> PartialState:
    """sinks: [num_q_heads], logits that take weight but have no value."""
    total = torch.logaddexp(state.lse, sinks.to(state.lse))
    o = state.o * torch.exp(state.lse - total).unsqueeze(2)
    return PartialState(o.to(state.o.dtype), total)


def finished(state: PartialState, sinks: tuple[float, ...] | None) -> torch.Tensor:
    """o of a state that nothing more is merged with.  sinks: [num_q_heads]"""
    return state.o if sinks is None else with_sinks(state, _on_device(sinks, state.o.device)).o


@lru_cache(maxsize=1024)
def _on_device(sinks: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Copied once, not with every chunk and layer."""
    return torch.tensor(sinks, device=device)
