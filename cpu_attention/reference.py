"""Storing and attending in plain numpy: the living definition, slow and exact.

`kernel.py` has the same functions with the same signatures, compiled; the tests hold the two together.
"""

from __future__ import annotations

import numpy as np

from cpu_attention.layout import LANES, NUMBER_DTYPES, AttentionRule, HeadFormat, Part
from cpu_attention.state import Pieces, State, merge, with_sinks
from cpu_attention.work import NewTokens, Work

_LARGEST_HALF = 65504.0


def append(
    k: np.ndarray,  # [num_tokens, num_kv_heads, head_dim] of any float dtype
    v: np.ndarray,  # like k
    blocks: np.ndarray,  # [num_tokens] int32, the block each token goes to
    offsets: np.ndarray,  # [num_tokens] int32, its place in the block
    data: np.ndarray,  # [num_blocks, num_kv_heads, head.nbytes] uint8, written
    head: HeadFormat,
) -> None:
    """Stores K and V of new tokens, rounded or quantised to the storage dtype.

    The tokens of a block come in order, the first one into place 0, but may come again from any place on: each takes
    nothing from what was there, and leaves nothing of it behind itself that attention would read.
    """
    for token, (block, offset) in enumerate(zip(blocks.tolist(), offsets.tolist(), strict=True)):
        for values, part in ((k, head.k), (v, head.v)):
            padded = np.zeros((data.shape[1], head.stored_dim), np.float32)
            padded[:, : head.head_dim] = values[token].astype(np.float32)
            if part.is_quantised:
                scales = _scales(data, part)
                if part is head.v:
                    scales[block, :, :, :, offset + 1 : offset - offset % LANES + LANES] = 0
                rotated = rotate(padded, head.rotation) if part is head.k else padded
                items, scales[block, :, :, :, offset] = quantise(rotated, part)
            else:
                items = padded.astype(NUMBER_DTYPES[part.dtype])
            if part is head.k:
                packed = items[:, 0::2] | items[:, 1::2] << 4 if part.packed == 2 else items
                _k_numbers(data, part)[block, :, offset // LANES, :, offset % LANES] = packed
            else:
                row = _v_numbers(data, part)[block, :, offset // part.packed]
                row[:] = items if offset % part.packed == 0 else row & 15 | items << 4


def attend(
    q: np.ndarray,  # [num_rows, num_q_heads, head_dim] of any float dtype
    data: np.ndarray,  # [num_blocks, num_kv_heads, head.nbytes] uint8, written if tokens are new
    head: HeadFormat,
    block_tables: np.ndarray,  # [num_rows, max_blocks] int32: (row, position // block_tokens) -> block
    work: Work,  # of these rows
    rule: AttentionRule,  # its window is in `work` already
    state: State,  # [num_rows, …], written; `out` of any float dtype
    new: NewTokens | None = None,  # stored first, see there
    team: object = None,  # this is done on one thread
) -> None:
    """softmax(q·K)·V of each row over its own sequence, and what is needed to merge it with others."""
    if new is not None:
        append(new.k, new.v, new.blocks, new.offsets, data, head)
    slots = State.empty(work.num_slots, *q.shape[1:])
    attend_pieces(q, data, head, block_tables, work.pieces, rule, slots)
    for slot, row in enumerate(work.split_rows.tolist(), work.num_rows):
        whole = merge(slots[row : row + 1], slots[slot : slot + 1])
        slots.out[row], slots.maxima[row], slots.sums[row] = whole.out[0], whole.maxima[0], whole.sums[0]
    rows = slots[: work.num_rows]
    if rule.sinks is not None:
        rows = with_sinks(rows, rule.sinks)
    with np.errstate(over="ignore"):  # what fp16 cannot hold is infinite
        state.out[:], state.maxima[:], state.sums[:] = rows.out.astype(state.out.dtype), rows.maxima, rows.sums


def attend_pieces(
    q: np.ndarray,  # [num_rows, num_q_heads, head_dim] of any float dtype
    data: np.ndarray,  # [num_blocks, num_kv_heads, head.nbytes] uint8
    head: HeadFormat,
    block_tables: np.ndarray,  # [num_rows, max_blocks] int32: (row, position // block_tokens) -> block
    pieces: Pieces,
    rule: AttentionRule,  # its scale and softcap; window and sinks are for whoever cuts and merges pieces
    state: State,  # written at pieces.slots
) -> None:
    """softmax(q·K)·V of each piece, in float64, rounded once at the end."""
    group = q.shape[1] // data.shape[1]
    columns = (pieces.rows, pieces.begins, pieces.ends, pieces.slots)
    for row, begin, end, slot in zip(*(column.tolist() for column in columns), strict=True):
        table = block_tables[row, begin // head.block_tokens : (end - 1) // head.block_tokens + 1]
        first = begin - begin % head.block_tokens
        keys, values = (
            np.repeat(np.concatenate(part, axis=1)[:, begin - first : end - first], group, axis=0)
            for part in read(data[table], head)
        )
        scores = rule.scale * np.einsum("hd,htd->ht", q[row].astype(np.float64), keys)
        if rule.softcap is not None:
            scores = rule.softcap * np.tanh(scores / rule.softcap)
        maxima = scores.max(axis=1)
        weights = np.exp(scores - maxima[:, None])
        sums = weights.sum(axis=1)
        state.out[slot] = np.einsum("ht,htd->hd", weights / sums[:, None], values)
        state.maxima[slot], state.sums[slot] = maxima, sums


def read(data: np.ndarray, head: HeadFormat) -> tuple[np.ndarray, np.ndarray]:
    """K and V as stored.

    # data: [num_blocks, num_kv_heads, head.nbytes] -> two of [num_blocks, num_kv_heads, block_tokens, head_dim] float64
    """
    shape = (*data.shape[:2], head.block_tokens, head.stored_dim)
    k, v = _k_numbers(data, head.k), _v_numbers(data, head.v)
    if head.k.packed == 2:
        k = np.stack([k & 15, k >> 4], axis=4).reshape(*shape[:2], -1, head.stored_dim, LANES)
    if head.v.packed == 2:
        v = np.stack([v & 15, v >> 4], axis=3)
    with np.errstate(invalid="ignore"):  # unused places may hold signalling NaN
        k = _dequantised(data, k.swapaxes(3, 4).reshape(shape).astype(np.float64), head.k)
        v = _dequantised(data, v.reshape(shape).astype(np.float64), head.v)
        return rotate(k, head.rotation)[..., : head.head_dim], v[..., : head.head_dim]


def rotate(values: np.ndarray, size: int) -> np.ndarray:
    """Walsh-Hadamard transform of every `size` channels, a power of two.  Its own inverse; keeps scalar products."""
    whole, stride = values.shape, 1
    while stride < size:
        pairs = values.reshape(*whole[:-1], -1, 2, stride)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        values = np.stack([low + high, low - high], axis=-2).reshape(whole)
        stride *= 2
    return values * values.dtype.type(size**-0.5)


def quantise(values: np.ndarray, part: Part) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales of single tokens: # [n, stored_dim] float32 -> [n, stored_dim] int8 or uint8,
    [n, scales and minima, groups] float16.

    The integers are chosen for the scale as it is stored, so that its rounding does not add to theirs.  A number that
    is not finite makes its scale NaN, so that it shows.
    """
    items = np.empty(values.shape, NUMBER_DTYPES[part.dtype])
    scales = np.empty((len(values), 1 + part.has_minima, part.num_groups), np.float16)
    for group in range(part.num_groups):
        channels = slice(group * part.group, (group + 1) * part.group)
        numbers = values[:, channels]
        nothing = np.where(np.isfinite(numbers).all(axis=1), np.float32(0), np.float32(np.nan))
        if part.has_minima:
            scales[:, 1, group] = minimum = _half(numbers.min(axis=1))
            width, low, high = numbers.max(axis=1) - minimum.astype(np.float32), 0, 15
            numbers = numbers - minimum.astype(np.float32)[:, None]
        else:
            width, low, high = np.abs(numbers).max(axis=1), -127, 127
        scales[:, 0, group] = scale = _half(width / np.float32(high) + nothing)
        divisor = np.where(scale > 0, scale.astype(np.float32), np.float32(1))[:, None]
        items[:, channels] = np.nan_to_num(np.clip(np.rint(numbers / divisor), low, high))
    return items, scales


def _k_numbers(data: np.ndarray, part: Part) -> np.ndarray:
    """# [num_blocks, num_kv_heads, block_tokens / LANES, stored_dim / packed, LANES], a view"""
    shape = (part.block_tokens // LANES, part.stored_dim // part.packed, LANES)
    return _view(data, part.numbers, part.end, NUMBER_DTYPES[part.dtype], *shape)


def _v_numbers(data: np.ndarray, part: Part) -> np.ndarray:
    """# [num_blocks, num_kv_heads, block_tokens / packed, stored_dim], a view"""
    shape = (part.block_tokens // part.packed, part.stored_dim)
    return _view(data, part.numbers, part.end, NUMBER_DTYPES[part.dtype], *shape)


def _scales(data: np.ndarray, part: Part) -> np.ndarray:
    """# [num_blocks, num_kv_heads, scales and minima, groups, block_tokens] float16, a view"""
    shape = (1 + part.has_minima, part.num_groups, part.block_tokens)
    return _view(data, part.begin, part.numbers, np.dtype(np.float16), *shape)


def _view(data: np.ndarray, begin: int, end: int, dtype: np.dtype, *shape: int) -> np.ndarray:
    return data[:, :, begin:end].view(dtype).reshape(*data.shape[:2], *shape)


def _dequantised(data: np.ndarray, numbers: np.ndarray, part: Part) -> np.ndarray:
    """# numbers [num_blocks, num_kv_heads, block_tokens, stored_dim]"""
    if not part.is_quantised:
        return numbers
    spread = np.repeat(_scales(data, part).astype(np.float64), part.group, axis=3)[:, :, :, : part.stored_dim]
    spread = spread.swapaxes(3, 4)
    return numbers * spread[:, :, 0] + (spread[:, :, 1] if part.has_minima else 0.0)


def _half(values: np.ndarray) -> np.ndarray:
    """Rounded to fp16, at most its largest number; a NaN stays one."""
    return np.clip(values, -_LARGEST_HALF, _LARGEST_HALF).astype(np.float16)
