"""Decode attention and append in plain numpy: the living definition, slow and exact.

`kernel.py` has the same functions with the same signatures in numba; the tests hold the two together.
"""

from __future__ import annotations

import numpy as np

from cpu_attention.layout import AttentionRule


def append(
    k: np.ndarray,  # [num_tokens, num_kv_heads, head_dim] of any float dtype
    v: np.ndarray,  # like k
    blocks: np.ndarray,  # [num_tokens] int32, the block each token goes to
    offsets: np.ndarray,  # [num_tokens] int32, its place in the block
    k_blocks: np.ndarray,  # [num_blocks, num_kv_heads, head_dim, block_tokens] of the storage dtype, written
    v_blocks: np.ndarray,  # [num_blocks, num_kv_heads, block_tokens, head_dim] of the storage dtype, written
) -> None:
    """Stores K and V of new tokens, rounded to the storage dtype."""
    k_blocks[blocks, :, :, offsets] = k.astype(k_blocks.dtype)
    v_blocks[blocks, :, offsets, :] = v.astype(v_blocks.dtype)


def attend(
    q: np.ndarray,  # [num_rows, num_q_heads, head_dim] float32
    k_blocks: np.ndarray,  # [num_blocks, num_kv_heads, head_dim, block_tokens] of a storage dtype
    v_blocks: np.ndarray,  # [num_blocks, num_kv_heads, block_tokens, head_dim] of the same dtype
    block_tables: np.ndarray,  # [num_rows, max_blocks] int32: (row, position // block_tokens) -> block
    positions: np.ndarray,  # [num_rows] int32: row r attends to keys 0..positions[r] of its sequence
    rule: AttentionRule,
    out: np.ndarray,  # [num_rows, num_q_heads, head_dim] float32, written
) -> None:
    """softmax(q·K)·V of each row over its own sequence, in float64, rounded once at the end."""
    block_tokens = k_blocks.shape[3]
    group = q.shape[1] // k_blocks.shape[1]
    for row, position in enumerate(positions.tolist()):
        first = 0 if rule.window is None else max(0, position + 1 - rule.window)
        table = block_tables[row, : position // block_tokens + 1]
        keys = np.concatenate(k_blocks[table].astype(np.float64), axis=2)[:, :, first : position + 1]
        values = np.concatenate(v_blocks[table].astype(np.float64), axis=1)[:, first : position + 1]
        keys, values = np.repeat(keys, group, axis=0), np.repeat(values, group, axis=0)
        scores = rule.scale * np.einsum("hd,hdt->ht", q[row].astype(np.float64), keys)
        if rule.softcap is not None:
            scores = rule.softcap * np.tanh(scores / rule.softcap)
        if rule.sinks is not None:
            scores = np.concatenate([scores, rule.sinks[:, None]], axis=1)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        out[row] = np.einsum("ht,htd->hd", weights[:, : values.shape[1]], values)
