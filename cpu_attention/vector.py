"""Decode attention as vector code, compiled for one shape at a time: what numba's own loops do not become.

For a piece of work (a query row and a range of its sequence's tokens) the kernel walks over the blocks, and inside
a block over the KV heads, which is the order in which they lie in memory; `block.py` has what happens there.
"""

from __future__ import annotations

import ast
from dataclasses import astuple
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import carray, types
from numba.core import errors
from numba.extending import intrinsic

from cpu_attention import block as block_code
from cpu_attention import emit
from cpu_attention.block import HeadCode, Shape
from cpu_attention.compiling import compiled
from cpu_attention.emit import I8, I64
from cpu_attention.job import JOB
from cpu_attention.layout import LANES
from cpu_attention.native import Entry, call, entry_of, fail, fetch_add, pointer
from cpu_attention.wire import narrow, widen


@cache
def make_attend(shape: Shape) -> Entry:
    """attend(job, share): the share's pieces, and the rows whose last piece is done with it; see `Job`.

    The newest tokens are stored on the way if the job says so: those of a row by its last piece, just before the
    block is read that they are in.
    """
    SPEC = repr(astuple(shape))
    GROUP, BLOCK, UNIT, D = shape.group, shape.block_tokens, shape.head.nbytes, shape.head_dim
    LEAST = np.float32(block_code.MASKED)
    AT_ONCE, REST = shape.heads_at_once, shape.group % shape.heads_at_once
    CHANNELS, NUM_SUMS = shape.head.k.group, shape.num_query_sums
    NUM_FOLDED, IS_ROTATED = shape.head.v.num_groups, shape.head.rotation > 1

    @compiled
    def attend(job, share):  # type: ignore[no-untyped-def]
        j = carray(pointer(job), 1, JOB)[0]
        num_q_heads, num_kv_heads, num_pieces = j.num_q_heads, j.num_q_heads // GROUP, j.num_pieces
        data = carray(pointer(j.data), (j.data_bytes,), np.uint8)
        tables = carray(pointer(j.tables), (j.num_rows, j.max_blocks), np.int32)
        rows = carray(pointer(j.rows), (num_pieces,), np.int64)
        begins = carray(pointer(j.begins), (num_pieces,), np.int64)
        ends = carray(pointer(j.ends), (num_pieces,), np.int64)
        places = carray(pointer(j.places), (num_pieces,), np.int64)
        jointly = carray(pointer(j.jointly), (num_pieces,), np.int64)
        part_firsts = carray(pointer(j.part_firsts), (j.num_rows,), np.int64)
        part_counts = carray(pointer(j.part_counts), (j.num_rows,), np.int64)
        bounds = carray(pointer(j.bounds), (j.num_shares + 1,), np.int64)
        parts = carray(pointer(j.parts), (j.num_parts, num_q_heads, D), np.float32)
        part_maxima = carray(pointer(j.part_maxima), (j.num_parts, num_q_heads), np.float32)
        part_sums = carray(pointer(j.part_sums), (j.num_parts, num_q_heads), np.float32)
        # Of the row at hand.
        queries = np.empty((num_q_heads, D), np.float32)
        query_sums = np.empty((num_q_heads, NUM_SUMS), np.float32)
        whole, maxima = np.empty((1, num_q_heads, D), np.float32), np.empty((1, num_q_heads), np.float32)
        sums = np.empty_like(maxima)
        scratch = np.empty(AT_ONCE * (BLOCK * (1 + NUM_FOLDED) + NUM_FOLDED + 1), np.float32)
        joint_end = np.int64(0)  # pieces before it are done
        for piece in range(bounds[share], bounds[share + 1]):
            row, begin, end = rows[piece], begins[piece], ends[piece]
            first_part, num_parts = part_firsts[row], part_counts[row]
            is_whole = num_parts == 1
            if jointly[piece] > 1 and piece >= joint_end:  # the first of several rows'
                code, raised = call(j.joint_entry, job, piece)
                fail(code, raised)
                joint_end = piece + jointly[piece]
            if piece < joint_end:
                if fetch_add(j.num_done + 4 * first_part, 1) + 1 == num_parts:
                    _merge(parts, part_maxima, part_sums, first_part, num_parts, whole, maxima, sums)
                    _finish(job, row, whole, maxima, sums)
                continue
            is_last = is_whole or places[piece] == first_part + num_parts - 1
            out, out_maxima, out_sums = (whole, maxima, sums) if is_whole else (parts, part_maxima, part_sums)
            place = 0 if is_whole else places[piece]
            for head in range(num_q_heads):
                widen(j.q + row * j.q_row_bytes + head * j.q_head_bytes, j.head_dim, j.q_wire, queries, head * D)
                if IS_ROTATED:
                    rotate(queries, head, SPEC)
                for group in range(NUM_SUMS):
                    total = np.float32(0)
                    for d in range(group * CHANNELS, min((group + 1) * CHANNELS, D)):
                        total += queries[head, d]
                    query_sums[head, group] = total
                out_maxima[place, head], out_sums[place, head] = LEAST, np.float32(0)
                for d in range(D):
                    out[place, head, d] = np.float32(0)
            last = (end - 1) // BLOCK
            block = np.int64(tables[row, begin // BLOCK])
            for index in range(begin // BLOCK, last + 1):
                following = block
                if index < last:
                    following = np.int64(tables[row, index + 1])
                elif piece + 1 < bounds[share + 1]:
                    following = np.int64(tables[rows[piece + 1], begins[piece + 1] // BLOCK])
                if index == last and is_last and j.append_entry != 0:
                    code, raised = call(j.append_entry, job, row)
                    fail(code, raised)
                low, high = max(begin - index * BLOCK, 0), min(end - index * BLOCK, BLOCK)
                for kv_head in range(num_kv_heads):
                    unit = (block * num_kv_heads + kv_head) * UNIT
                    ahead = unit + UNIT if kv_head + 1 < num_kv_heads else following * num_kv_heads * UNIT
                    inside(data, unit, ahead + UNIT - 1)  # for numba's bounds checks, when they are on
                    head = kv_head * GROUP
                    for _ in range(GROUP // AT_ONCE):
                        attend_head(
                            queries, head, data, unit, ahead, low, high, j.scale, j.softcap,
                            query_sums, scratch, out, out_maxima, out_sums, place * num_q_heads + head, SPEC, AT_ONCE,
                        )  # fmt: skip
                        head += AT_ONCE
                    if REST > 0:
                        attend_head(
                            queries, head, data, unit, ahead, low, high, j.scale, j.softcap,
                            query_sums, scratch, out, out_maxima, out_sums, place * num_q_heads + head, SPEC, REST,
                        )  # fmt: skip
                block = following
            is_done = is_whole
            if not is_whole:
                # Whoever is last puts the parts together, always in the same order.
                is_done = fetch_add(j.num_done + 4 * first_part, 1) + 1 == num_parts
                if is_done:
                    _merge(parts, part_maxima, part_sums, first_part, num_parts, whole, maxima, sums)
            if is_done:
                _finish(job, row, whole, maxima, sums)

    return entry_of(attend)


@numba.njit
def _merge(parts, part_maxima, part_sums, first, count, whole, maxima, sums):  # type: ignore[no-untyped-def]
    """What `state.merge` does, for `count` parts of a row from the first-th on, whose sums are not divided by yet."""
    _, num_q_heads, dim = whole.shape
    for head in range(num_q_heads):
        top = part_maxima[first, head]
        for part in range(first + 1, first + count):
            top = max(top, part_maxima[part, head])
        total = np.float32(0)
        for d in range(dim):
            whole[0, head, d] = np.float32(0)
        for part in range(first, first + count):
            weight = np.exp(part_maxima[part, head] - top)
            total += weight * part_sums[part, head]
            for d in range(dim):
                whole[0, head, d] += weight * parts[part, head, d]
        maxima[0, head], sums[0, head] = top, total


@numba.njit
def _finish(job, row, whole, maxima, sums):  # type: ignore[no-untyped-def]
    """A row's sinks, division and narrowing, to where the job wants it."""
    j = carray(pointer(job), 1, JOB)[0]
    _, num_q_heads, stored_dim = whole.shape
    item = 4 if j.out_wire == 0 else 2
    all_maxima = carray(pointer(j.maxima), (j.num_rows, num_q_heads), np.float32)
    all_sums = carray(pointer(j.sums), (j.num_rows, num_q_heads), np.float32)
    sinks = carray(pointer(j.sinks), (num_q_heads,), np.float32)
    for head in range(num_q_heads):
        top, total, weight = maxima[0, head], sums[0, head], np.float32(1)
        if j.sinks != 0:
            sink = sinks[head]
            top = max(top, sink)
            weight = np.exp(maxima[0, head] - top)
            total = total * weight + np.exp(sink - top)
        all_maxima[row, head], all_sums[row, head] = top, total
        address = j.out + (row * num_q_heads + head) * j.head_dim * item
        narrow(whole, head * stored_dim, weight / total, j.head_dim, j.out_wire, address)


@numba.njit(inline="always")
def inside(data, first, last):  # type: ignore[no-untyped-def]
    return data[first] + data[last]


@intrinsic
def rotate(typing_context, queries, head, SPEC):  # type: ignore[no-untyped-def]
    """One head of q as K was rotated when it was quantised."""
    shape = shape_of(SPEC)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        base = b.bitcast(context.make_array(signature.args[0])(context, b, arguments[0]).data, I8.as_pointer())
        begin = b.mul(arguments[1], I64(shape.head_dim * 4))
        places = [b.add(begin, I64(first * 4)) for first in range(0, shape.head_dim, LANES)]
        vectors = emit.rotate(b, [emit.load(b, base, place) for place in places], shape.head.rotation)
        for vector, place in zip(vectors, places, strict=True):
            emit.store(b, vector, base, place)
        return context.get_dummy_value()

    return types.void(queries, head, SPEC), generate


_ARRAYS = ("q", "data", "query_sums", "scratch", "out", "maxima", "sums")


@intrinsic
def attend_head(  # type: ignore[no-untyped-def]
    typing_context, q, head, data, unit, ahead, low, high, scale, softcap,
    query_sums, scratch, out, maxima, sums, out_head, SPEC, COUNT,
):  # fmt: skip
    """Tokens low to high of the block and KV head at byte `unit`, for COUNT query heads.

    They are the head-th and following of their row, the out_head-th of all in out.
    """
    if not isinstance(COUNT, types.IntegerLiteral):
        raise errors.RequireLiteralValue("COUNT is compiled in")
    shape, count = shape_of(SPEC), COUNT.literal_value
    given = {
        "q": q, "head": head, "data": data, "unit": unit, "ahead": ahead, "low": low, "high": high,
        "scale": scale, "softcap": softcap, "query_sums": query_sums, "scratch": scratch,
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


def shape_of(SPEC: Any) -> Shape:
    if not isinstance(SPEC, types.StringLiteral):
        raise errors.RequireLiteralValue("shapes are compiled in")
    return Shape(*ast.literal_eval(SPEC.literal_value))
