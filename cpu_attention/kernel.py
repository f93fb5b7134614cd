"""The functions of `reference.py`, compiled by numba: fp32 arithmetic over fp32, fp16 or bf16 storage.

Two ways to attend, chosen by shape: `vector.py`, one compilation per shape, and the portable loops below, one
compilation for all, for what the first does not take (soft-caps, odd head sizes or blocks, very large groups).

The portable loops walk once over a sequence's blocks per row and KV head.  A block's K and V are widened to fp32
once into tiles that stay in L1, then serve all query heads of the group with an online softmax (Milakov &
Gimelshein 2018):

    for block:  K tile, V tile
      for query head of the group:
        scores  = scale · q·K           tokens in the lanes
        maximum = max(maximum, scores)  what was summed so far is rescaled when it grows
        sum    += Σ exp(scores - maximum)
        out    += exp(scores - maximum)·V

Nothing here checks bounds: whoever calls has checked that tables, positions and shapes fit the store.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np

from cpu_attention.layout import AttentionRule
from cpu_attention.vector import BF16, F16, F32, can_vectorise, make_attend

_STORAGE = {"float32": (F32, np.uint32), "float16": (F16, np.uint16), "bfloat16": (BF16, np.uint16)}

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _compiled(function: _Function) -> _Function:
    """Without the GIL, so that one process can attend on several cores; kept on disk between runs."""
    return numba.njit(nogil=True, cache=True)(function)


def append(
    k: np.ndarray,  # [num_tokens, num_kv_heads, head_dim] of any float dtype
    v: np.ndarray,  # like k
    blocks: np.ndarray,  # [num_tokens] int32, the block each token goes to
    offsets: np.ndarray,  # [num_tokens] int32, its place in the block
    k_blocks: np.ndarray,  # [num_blocks, num_kv_heads, head_dim, block_tokens] of the storage dtype, written
    v_blocks: np.ndarray,  # [num_blocks, num_kv_heads, block_tokens, head_dim] of the storage dtype, written
) -> None:
    """Stores K and V of new tokens, rounded to the storage dtype."""
    _, bits = _STORAGE[k_blocks.dtype.name]
    k_bits = _kernel_input(k, k_blocks.dtype).view(bits)
    v_bits = _kernel_input(v, v_blocks.dtype).view(bits)
    _append(k_bits, v_bits, blocks, offsets, k_blocks.view(bits), v_blocks.view(bits))


def attend(
    q: np.ndarray,  # [num_rows, num_q_heads, head_dim] float32
    k_blocks: np.ndarray,  # [num_blocks, num_kv_heads, head_dim, block_tokens] of a storage dtype
    v_blocks: np.ndarray,  # [num_blocks, num_kv_heads, block_tokens, head_dim] of the same dtype
    block_tables: np.ndarray,  # [num_rows, max_blocks] int32: (row, position // block_tokens) -> block
    positions: np.ndarray,  # [num_rows] int32: row r attends to keys 0..positions[r] of its sequence
    rule: AttentionRule,
    out: np.ndarray,  # [num_rows, num_q_heads, head_dim] float32, written
) -> None:
    """softmax(q·K)·V of each row over its own sequence.  Releases the GIL."""
    kind, bits = _STORAGE[k_blocks.dtype.name]
    window = np.int64(rule.window if rule.window is not None else np.iinfo(np.int64).max)
    softcap = np.float32(rule.softcap or 0.0)
    sinks = np.empty(0, np.float32) if rule.sinks is None else _kernel_input(rule.sinks, np.dtype(np.float32))
    q = _kernel_input(q, np.dtype(np.float32))
    _, num_kv_heads, head_dim, block_tokens = k_blocks.shape
    group = q.shape[1] // num_kv_heads
    if rule.softcap is None and can_vectorise(kind, group, head_dim, block_tokens):
        flat = np.float32 if kind == F32 else np.uint16
        vectorised = make_attend(kind, group, head_dim, block_tokens)
        k_flat, v_flat = k_blocks.view(flat).reshape(-1), v_blocks.view(flat).reshape(-1)
        vectorised(q, k_flat, v_flat, block_tables, positions, np.float32(rule.scale), window, sinks, out)
        return
    _attend(
        q,
        k_blocks.view(bits),
        v_blocks.view(bits),
        kind,
        block_tables,
        positions,
        np.float32(rule.scale),
        window,
        softcap,
        sinks,
        out,
    )


def warm_up(dtype: np.dtype, group: int, head_dim: int, block_tokens: int, rule: AttentionRule) -> None:
    """Compiles (or loads from disk) what a layer of this shape and rule needs, before the first token."""
    k_blocks = np.zeros((1, 1, head_dim, block_tokens), dtype)
    v_blocks = np.zeros((1, 1, block_tokens, head_dim), dtype)
    row, zero = np.zeros((1, 1, head_dim), np.float32), np.zeros(1, np.int32)
    append(row, row, zero, zero, k_blocks, v_blocks)
    q = np.zeros((1, group, head_dim), np.float32)
    attend(q, k_blocks, v_blocks, zero[None], zero, rule, np.empty_like(q))


def _kernel_input(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """C-ordered, writable and of `dtype`: one compiled version then serves arrays from any source.

    Received frames are read-only, which numba takes for another type; copying these few rows costs less
    than a second compilation, and nothing beside the KV they attend to.
    """
    array = np.ascontiguousarray(array, dtype)
    return array if array.flags.writeable else array.copy()


@_compiled
def _append(k_bits, v_bits, blocks, offsets, k_blocks, v_blocks):  # type: ignore[no-untyped-def]
    num_tokens, num_kv_heads, head_dim = k_bits.shape
    for token in range(num_tokens):
        block, offset = blocks[token], offsets[token]
        for head in range(num_kv_heads):
            for d in range(head_dim):
                k_blocks[block, head, d, offset] = k_bits[token, head, d]
                v_blocks[block, head, offset, d] = v_bits[token, head, d]


@_compiled
def _widen(stored, kind, tile, tile_bits):  # type: ignore[no-untyped-def]
    """stored [m, n] bits of a storage dtype -> tile [m, n] float32; tile_bits is tile seen as uint32."""
    rows, columns = stored.shape
    if kind == F32:
        for i in range(rows):
            for j in range(columns):
                tile_bits[i, j] = np.uint32(stored[i, j])
    elif kind == BF16:
        for i in range(rows):
            for j in range(columns):
                tile_bits[i, j] = np.uint32(stored[i, j]) << np.uint32(16)
    else:
        # fp16: exponent and mantissa moved to their fp32 places, then multiplied by 2^112, which mends the
        # exponent's bias and the subnormals at once; infinities and NaN get their exponent back by hand.
        for i in range(rows):
            for j in range(columns):
                tile_bits[i, j] = (np.uint32(stored[i, j]) & np.uint32(0x7FFF)) << np.uint32(13)
            for j in range(columns):
                tile[i, j] *= np.float32(2.0**112)
            for j in range(columns):
                half = np.uint32(stored[i, j])
                special = np.uint32(0x7F800000) if (half & np.uint32(0x7C00)) == np.uint32(0x7C00) else np.uint32(0)
                tile_bits[i, j] |= ((half & np.uint32(0x8000)) << np.uint32(16)) | special


@_compiled
def _attend(  # type: ignore[no-untyped-def]
    q, k_blocks, v_blocks, kind, block_tables, positions, scale, window, softcap, sinks, out
):
    num_rows, num_q_heads, head_dim = q.shape
    num_kv_heads, block_tokens = k_blocks.shape[1], k_blocks.shape[3]
    group = num_q_heads // num_kv_heads
    k_tile = np.empty((head_dim, block_tokens), np.float32)
    v_tile = np.empty((block_tokens, head_dim), np.float32)
    k_tile_bits, v_tile_bits = k_tile.view(np.uint32), v_tile.view(np.uint32)
    scores = np.empty(block_tokens, np.float32)
    maxima, sums = np.empty(group, np.float32), np.empty(group, np.float32)
    for row in range(num_rows):
        position = np.int64(positions[row])
        first = max(np.int64(0), position + 1 - window)
        for kv_head in range(num_kv_heads):
            query_head = kv_head * group
            outs = out[row, query_head : query_head + group]
            outs[:] = np.float32(0)
            maxima[:] = -np.inf
            sums[:] = np.float32(0)
            for index in range(first // block_tokens, position // block_tokens + 1):
                block = block_tables[row, index]
                _widen(k_blocks[block, kv_head], kind, k_tile, k_tile_bits)
                _widen(v_blocks[block, kv_head], kind, v_tile, v_tile_bits)
                begin = max(first - index * block_tokens, 0)
                end = min(position + 1 - index * block_tokens, block_tokens)
                for g in range(group):
                    # All lanes of the block are computed, so that the loop has a fixed length; lanes
                    # outside begin..end hold what was there before and are not read again.
                    scores[:] = np.float32(0)
                    for d in range(head_dim):
                        query = q[row, query_head + g, d] * scale
                        for t in range(block_tokens):
                            scores[t] += query * k_tile[d, t]
                    maximum = maxima[g]
                    for t in range(begin, end):
                        if softcap > 0:
                            scores[t] = softcap * np.tanh(scores[t] / softcap)
                        maximum = max(maximum, scores[t])
                    shrink = np.exp(maxima[g] - maximum)
                    maxima[g] = maximum
                    total = sums[g] * shrink
                    for d in range(head_dim):
                        outs[g, d] *= shrink
                    for t in range(begin, end):
                        weight = np.exp(scores[t] - maximum)
                        total += weight
                        for d in range(head_dim):
                            outs[g, d] += weight * v_tile[t, d]
                    sums[g] = total
            for g in range(group):
                factor = np.float32(1)
                total = sums[g]
                if sinks.size:
                    maximum = max(maxima[g], sinks[query_head + g])
                    factor = np.exp(maxima[g] - maximum)
                    total = total * factor + np.exp(sinks[query_head + g] - maximum)
                for d in range(head_dim):
                    outs[g, d] *= factor / total
