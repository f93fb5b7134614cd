"""Rows that attend jointly: a block that several of them share is read from memory once for all.

Their query heads are one batch against a KV head's part of the block, r rows times the heads of a group.  Up to `_FEW`
of them take one pass over what is stored, as a row's own heads do (`block.py`); more go over what has been widened
(`wide.py`), while the next block is asked for, a part of it in each pass.

KV heads come one after the other, with all blocks of one in between, so that the heads' queries and sums stay in
cache; a row's own heads go block by block, in the order of memory.
"""

from __future__ import annotations

from dataclasses import astuple
from functools import cache
from typing import Any

import numpy as np
from numba import carray, types
from numba.core import errors
from numba.extending import intrinsic

from cpu_attention import block as block_code
from cpu_attention.block import Shape
from cpu_attention.compiling import compiled
from cpu_attention.emit import I8
from cpu_attention.job import JOB
from cpu_attention.native import Entry, entry_of, pointer
from cpu_attention.vector import attend_head, inside, rotate, shape_of
from cpu_attention.wide import Tiles, WideCode, Widening, num_turns
from cpu_attention.wire import widen

_FEW = 8  # query heads; widening for so few takes as long as it saves
_HALF = 4  # in a pass, where no more are left


@cache
def make_joint(shape: Shape) -> Entry:
    """attend_jointly(job, piece): the rows that do it with this one, into the parts they have there; see `Job`.

    shape: its group is of no meaning.
    """
    SPEC = repr(astuple(shape))
    BLOCK, UNIT, D = shape.block_tokens, shape.head.nbytes, shape.head_dim
    LEAST = np.float32(block_code.MASKED)
    CHANNELS, NUM_SUMS = shape.head.k.group, shape.num_query_sums
    IS_ROTATED, IS_WIDE = shape.head.rotation > 1, shape.dtype == "float32"
    NUM_FOLDED, NUM_SCALES = shape.head.v.num_groups, shape.head.v.num_scales * BLOCK
    PASS, HALF, FEW, TURNS = Tiles.of(BLOCK).heads, _HALF, _FEW, num_turns(shape)
    NUM_WIDE = 0 if IS_WIDE else 2 * BLOCK * D
    NUM_FEW_SCRATCH = FEW * (BLOCK * (1 + NUM_FOLDED) + NUM_FOLDED + 1)

    @compiled
    def attend_jointly(job, piece):  # type: ignore[no-untyped-def]
        j = carray(pointer(job), 1, JOB)[0]
        num_q_heads, num_kv_heads, num_pieces = j.num_q_heads, j.num_kv_heads, j.num_pieces
        group = num_q_heads // num_kv_heads
        data = carray(pointer(j.data), (j.data_bytes,), np.uint8)
        tables = carray(pointer(j.tables), (j.num_rows, j.max_blocks), np.int32)
        rows = carray(pointer(j.rows), (num_pieces,), np.int64)
        begins = carray(pointer(j.begins), (num_pieces,), np.int64)
        ends = carray(pointer(j.ends), (num_pieces,), np.int64)
        places = carray(pointer(j.places), (num_pieces,), np.int64)
        jointly = carray(pointer(j.jointly), (num_pieces,), np.int64)
        parts = carray(pointer(j.parts), (j.num_parts, num_q_heads, D), np.float32)
        part_maxima = carray(pointer(j.part_maxima), (j.num_parts, num_q_heads), np.float32)
        part_sums = carray(pointer(j.part_sums), (j.num_parts, num_q_heads), np.float32)
        num_rows = jointly[piece]
        num_heads = num_rows * group
        padded = (num_heads + FEW - 1) // FEW * FEW
        num_passes = (num_heads + PASS - 1) // PASS
        num_full = (num_heads + PASS - HALF - 1) // PASS  # the last one may be half as wide
        stride = (UNIT + TURNS * num_passes - 1) // (TURNS * num_passes)
        # One piece of memory; what vectors are made of begins with a cache line, so that each lies in one.
        num_scratch = max(NUM_FEW_SCRATCH, num_passes * PASS * (BLOCK + 1))
        memory = np.empty(NUM_WIDE + padded * (2 * D + 2 + NUM_SUMS) + NUM_SCALES + num_scratch + 16, np.float32)
        at = (-memory.ctypes.data % 64) // 4
        wide, at = memory[at : at + NUM_WIDE].view(np.uint8), at + NUM_WIDE
        queries, at = memory[at : at + padded * D], at + padded * D
        out, at = memory[at : at + padded * D], at + padded * D
        scales, at = memory[at : at + NUM_SCALES], at + NUM_SCALES
        scratch, at = memory[at : at + num_scratch], at + num_scratch
        maxima, at = memory[at : at + padded], at + padded
        sums, at = memory[at : at + padded], at + padded
        query_sums = memory[at : at + padded * NUM_SUMS]
        queries[num_heads * D :] = np.float32(0)
        query_sums[num_heads * NUM_SUMS :] = np.float32(0)
        row, first, end = rows[piece], begins[piece] // BLOCK, ends[piece] // BLOCK
        for kv_head in range(num_kv_heads):
            for head in range(num_heads):
                q_head = kv_head * group + head % group
                address = j.q + rows[piece + head // group] * j.q_row_bytes + q_head * j.q_head_bytes
                widen(address, j.head_dim, j.q_wire, queries, head * D)
                if IS_ROTATED:
                    rotate(queries, head, SPEC)
                for channels in range(NUM_SUMS):
                    total = np.float32(0)
                    for d in range(channels * CHANNELS, min((channels + 1) * CHANNELS, D)):
                        total += queries[head * D + d]
                    query_sums[head * NUM_SUMS + channels] = total
            out[:] = np.float32(0)
            maxima[:] = LEAST
            sums[:] = np.float32(0)
            unit = (np.int64(tables[row, first]) * num_kv_heads + kv_head) * UNIT
            for index in range(first, end):
                ahead = unit
                if index + 1 < end:
                    ahead = (np.int64(tables[row, index + 1]) * num_kv_heads + kv_head) * UNIT
                elif kv_head + 1 < num_kv_heads:
                    ahead = (np.int64(tables[row, first]) * num_kv_heads + kv_head + 1) * UNIT
                inside(data, unit, ahead + UNIT - 1)  # for numba's bounds checks, when they are on
                if num_heads <= HALF:
                    attend_head(
                        queries, 0, data, unit, ahead, 0, BLOCK, j.scale, j.softcap,
                        query_sums, scratch, out, maxima, sums, 0, SPEC, HALF,
                    )  # fmt: skip
                elif num_heads <= FEW:
                    attend_head(
                        queries, 0, data, unit, ahead, 0, BLOCK, j.scale, j.softcap,
                        query_sums, scratch, out, maxima, sums, 0, SPEC, FEW,
                    )  # fmt: skip
                else:
                    source, source_at = data, unit
                    if not IS_WIDE:
                        _widen_unit(data, unit, wide, scales, SPEC)
                        source, source_at = wide, 0
                    _attend_wide(
                        queries, 0, num_full, source, source_at, data, ahead, stride,
                        j.scale, j.softcap, scratch, out, maxima, sums, SPEC, PASS,
                    )  # fmt: skip
                    if num_full < num_passes:
                        rest_ahead = ahead + num_full * TURNS * stride
                        _attend_wide(
                            queries, num_full * PASS, 1, source, source_at, data, rest_ahead, stride,
                            j.scale, j.softcap, scratch, out, maxima, sums, SPEC, HALF,
                        )  # fmt: skip
                unit = ahead
            for head in range(num_heads):
                place, q_head = places[piece + head // group], kv_head * group + head % group
                part_maxima[place, q_head], part_sums[place, q_head] = maxima[head], sums[head]
                for d in range(D):
                    parts[place, q_head, d] = out[head * D + d]

    return entry_of(attend_jointly)


@intrinsic
def _widen_unit(typing_context, data, unit, wide, scales, SPEC):  # type: ignore[no-untyped-def]
    """K and V of the KV head at byte `unit`; see `Widening`."""
    shape, kinds = shape_of(SPEC), (data, unit, wide, scales)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        def base(index: int) -> Any:
            return b.bitcast(context.make_array(kinds[index])(context, b, arguments[index]).data, I8.as_pointer())

        if shape.dtype != "float32":
            Widening(b, shape, base(0), arguments[1], base(2), base(3)).emit()
        return context.get_dummy_value()

    return types.void(*kinds, SPEC), generate


_ARRAYS = ("q", "data", "source", "scratch", "out", "maxima", "sums")


@intrinsic
def _attend_wide(  # type: ignore[no-untyped-def]
    typing_context, q, head, num_passes, data, unit, source, ahead, stride, scale, softcap,
    scratch, out, maxima, sums, SPEC, COUNT,
):  # fmt: skip
    """All tokens of the float32 K and V at byte `unit` of data, for num_passes passes of COUNT query heads, from the
    head-th on; what comes next is at byte `ahead` of source."""
    if not isinstance(COUNT, types.IntegerLiteral):
        raise errors.RequireLiteralValue("COUNT is compiled in")
    stored = shape_of(SPEC)
    given = {
        "q": q, "head": head, "num_passes": num_passes, "data": data, "unit": unit, "source": source, "ahead": ahead,
        "stride": stride, "scale": scale, "softcap": softcap, "scratch": scratch, "out": out, "maxima": maxima,
        "sums": sums,
    }  # fmt: skip

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        values = dict(zip(given, arguments, strict=False))
        for name in _ARRAYS:
            array = context.make_array(given[name])(context, b, values[name])
            values[name] = b.bitcast(array.data, I8.as_pointer())
        shape = Shape("float32", stored.head_dim, stored.block_tokens, stored.group, stored.is_capped)
        WideCode(b, shape, stored, COUNT.literal_value, values).emit()
        return context.get_dummy_value()

    return types.void(*given.values(), SPEC, COUNT), generate
