"""Attention over a part of a sequence, and how parts become the whole.

Softmax attention over keys A ∪ B follows from its results over A and over B, if each keeps the maximum of its scores
and the sum of their exponentials (Milakov & Gimelshein 2018; merged as in FlashDecoding and FlashInfer):

    maximum = max(mA, mB)     weight of A = sA · exp(mA - maximum)     out = (wA · oA + wB · oB) / (wA + wB)

So a sequence can be cut anywhere: over threads, over R-workers, or into a prefix and the rest.  A sink is a part
with one score and the value zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import DTypeLike


@dataclass(frozen=True)
class Pieces:
    """Work: query rows[i] attends to tokens begins[i] to ends[i] of its sequence, at least one; the result goes to
    slots[i] of a State."""

    rows: np.ndarray  # [num_pieces] int64
    begins: np.ndarray  # like rows
    ends: np.ndarray
    slots: np.ndarray

    def __getitem__(self, part: slice) -> Pieces:
        return Pieces(self.rows[part], self.begins[part], self.ends[part], self.slots[part])

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class State:
    """What attention over some keys leaves behind, per slot and query head."""

    out: np.ndarray  # [num_slots, num_q_heads, head_dim] float32 unless rounded, the weighted mean of the values
    maxima: np.ndarray  # [num_slots, num_q_heads] float32, of the scores
    sums: np.ndarray  # [num_slots, num_q_heads] float32, of exp(score - maximum)

    @classmethod
    def empty(cls, num_slots: int, num_q_heads: int, head_dim: int, dtype: DTypeLike = np.float32) -> State:
        """Uninitialised; dtype: of `out`."""
        shape = (num_slots, num_q_heads)
        return cls(np.empty((*shape, head_dim), dtype), np.empty(shape, np.float32), np.empty(shape, np.float32))

    def __getitem__(self, slots: slice | np.ndarray) -> State:
        return State(self.out[slots], self.maxima[slots], self.sums[slots])

    def __len__(self) -> int:
        return len(self.out)


def log_sum_exp(state: State) -> np.ndarray:
    """Of the scores; -inf where there were none.  # [num_slots, num_q_heads] float32"""
    with np.errstate(divide="ignore"):
        return state.maxima + np.log(state.sums)


def merge(a: State, b: State) -> State:
    """The attention of each slot over the keys of both."""
    maxima = np.maximum(a.maxima, b.maxima)
    weight_a, weight_b = a.sums * np.exp(a.maxima - maxima), b.sums * np.exp(b.maxima - maxima)
    sums = weight_a + weight_b
    out = (a.out * weight_a[..., None] + b.out * weight_b[..., None]) / sums[..., None]
    return State(out, maxima, sums)


def with_sinks(state: State, sinks: np.ndarray) -> State:
    """sinks: [num_q_heads] float32, logits that take weight but have no value."""
    maxima = np.broadcast_to(sinks.astype(np.float32), state.maxima.shape)
    return merge(state, State(np.zeros_like(state.out), maxima, np.ones_like(state.sums)))
