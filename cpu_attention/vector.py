"""Decode attention as vector code, compiled for one shape at a time: what numba's own loops do not become.

For a piece of work (a query row and a range of its sequence's tokens) the kernel walks over the blocks, and inside
a block over the KV heads, which is the order in which they lie in memory; `block.py` has what happens there.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import astuple
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core import errors
from numba.extending import intrinsic

from cpu_attention import block as block_code
from cpu_attention import emit
from cpu_attention.block import HeadCode, Shape
from cpu_attention.compiling import compiled
from cpu_attention.emit import I8, I64
from cpu_attention.layout import LANES


@cache
def make_attend(shape: Shape) -> Callable[..., None]:
    """attend(q, data, tables, rows, begins, ends, slots, scale, softcap, out, maxima, sums), compiled when called.

    Piece i: query rows[i] over tokens begins[i] to ends[i] of the sequence in tables[rows[i]], at least one.

    q: [num_rows, num_q_heads, head_dim] float32; data: the layer's blocks as flat uint8; tables: [num_rows,
    max_blocks] int32; rows, begins, ends, slots: [num_pieces] int64; out: [num_slots, num_q_heads, head_dim],
    maxima, sums: [num_slots, num_q_heads] float32, written at slots[i].
    """
    SPEC = repr(astuple(shape))
    GROUP, BLOCK, UNIT = shape.group, shape.block_tokens, shape.head.nbytes
    LEAST = np.float32(block_code.MASKED)
    AT_ONCE, REST = shape.heads_at_once, shape.group % shape.heads_at_once
    CHANNELS, NUM_SUMS = shape.head.k.group, shape.num_query_sums
    NUM_FOLDED, IS_ROTATED = shape.head.v.num_groups, shape.head.rotation > 1

    @compiled
    def attend(  # type: ignore[no-untyped-def]
        q, data, tables, rows, begins, ends, slots, scale, softcap, out, maxima, sums
    ):
        num_q_heads, head_dim = q.shape[1], q.shape[2]
        num_kv_heads = num_q_heads // GROUP
        scratch = np.empty(AT_ONCE * (BLOCK * (1 + NUM_FOLDED) + NUM_FOLDED + 1), np.float32)
        query_sums = np.zeros((num_q_heads, NUM_SUMS), np.float32)
        rotated = np.empty((1, num_q_heads, head_dim), np.float32)
        queries = rotated if IS_ROTATED else q
        for piece in range(rows.size):
            row, slot, begin, end = rows[piece], slots[piece], begins[piece], ends[piece]
            out[slot] = np.float32(0)
            maxima[slot] = LEAST
            sums[slot] = np.float32(0)
            if IS_ROTATED:
                for head in range(num_q_heads):
                    _rotate(q, row * num_q_heads + head, rotated, head, SPEC)
            source = 0 if IS_ROTATED else row
            for head in range(num_q_heads):
                for group in range(NUM_SUMS):
                    total = np.float32(0)
                    for d in range(group * CHANNELS, min((group + 1) * CHANNELS, head_dim)):
                        total += queries[source, head, d]
                    query_sums[head, group] = total
            last = (end - 1) // BLOCK
            block = np.int64(tables[row, begin // BLOCK])
            for index in range(begin // BLOCK, last + 1):
                following = block
                if index < last:
                    following = np.int64(tables[row, index + 1])
                elif piece + 1 < rows.size:
                    following = np.int64(tables[rows[piece + 1], begins[piece + 1] // BLOCK])
                low, high = max(begin - index * BLOCK, 0), min(end - index * BLOCK, BLOCK)
                for kv_head in range(num_kv_heads):
                    unit = (block * num_kv_heads + kv_head) * UNIT
                    ahead = unit + UNIT if kv_head + 1 < num_kv_heads else following * num_kv_heads * UNIT
                    _inside(data, unit, ahead + UNIT - 1)  # for numba's bounds checks, when they are on
                    head = kv_head * GROUP
                    for _ in range(GROUP // AT_ONCE):
                        _attend_head(
                            queries, source * num_q_heads + head, data, unit, ahead, low, high, scale, softcap,
                            query_sums, head, scratch, out, maxima, sums, slot * num_q_heads + head, SPEC, AT_ONCE,
                        )  # fmt: skip
                        head += AT_ONCE
                    if REST > 0:
                        _attend_head(
                            queries, source * num_q_heads + head, data, unit, ahead, low, high, scale, softcap,
                            query_sums, head, scratch, out, maxima, sums, slot * num_q_heads + head, SPEC, REST,
                        )  # fmt: skip
                block = following
            for head in range(num_q_heads):
                factor = np.float32(1) / sums[slot, head]
                for d in range(head_dim):
                    out[slot, head, d] *= factor

    return attend


@numba.njit(inline="always")
def _inside(data, first, last):  # type: ignore[no-untyped-def]
    return data[first] + data[last]


@intrinsic
def _rotate(typing_context, q, q_head, rotated, head, SPEC):  # type: ignore[no-untyped-def]
    """rotated[head] = the rotation of q[q_head], as K was rotated when it was quantised."""
    shape = _shape(SPEC)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        q_p, rotated_p = (
            b.bitcast(context.make_array(signature.args[i])(context, b, arguments[i]).data, I8.as_pointer())
            for i in (0, 2)
        )
        q_at, at = (b.mul(arguments[i], I64(shape.head_dim * 4)) for i in (1, 3))
        places = [I64(first * 4) for first in range(0, shape.head_dim, LANES)]
        vectors = emit.rotate(b, [emit.load(b, q_p, b.add(q_at, place)) for place in places], shape.head.rotation)
        for vector, place in zip(vectors, places, strict=True):
            emit.store(b, vector, rotated_p, b.add(at, place))
        return context.get_dummy_value()

    return types.void(q, q_head, rotated, head, SPEC), generate


_ARRAYS = ("q", "data", "query_sums", "scratch", "out", "maxima", "sums")


@intrinsic
def _attend_head(  # type: ignore[no-untyped-def]
    typing_context, q, q_head, data, unit, ahead, low, high, scale, softcap,
    query_sums, head, scratch, out, maxima, sums, out_head, SPEC, COUNT,
):  # fmt: skip
    """Tokens low to high of the block and KV head at byte `unit`, for COUNT query heads.

    They are the q_head-th and following of all in q, the head-th of their row, the out_head-th of all in out.
    """
    if not isinstance(COUNT, types.IntegerLiteral):
        raise errors.RequireLiteralValue("COUNT is compiled in")
    shape, count = _shape(SPEC), COUNT.literal_value
    given = {
        "q": q, "q_head": q_head, "data": data, "unit": unit, "ahead": ahead, "low": low, "high": high,
        "scale": scale, "softcap": softcap, "query_sums": query_sums, "head": head, "scratch": scratch,
        "out": out, "maxima": maxima, "sums": sums, "out_head": out_head,
    }  # fmt: skip

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        values = dict(zip(given, arguments, strict=False))
        for name in _ARRAYS:
            array = context.make_array(given[name])(context, b, values[name])
            values[name] = b.bitcast(array.data, I8.as_pointer())
        if count:
            HeadCode(b, shape, count, values).emit()
        return context.get_dummy_value()

    return types.void(*given.values(), SPEC, COUNT), generate


def _shape(SPEC: Any) -> Shape:
    if not isinstance(SPEC, types.StringLiteral):
        raise errors.RequireLiteralValue("shapes are compiled in")
    return Shape(*ast.literal_eval(SPEC.literal_value))
