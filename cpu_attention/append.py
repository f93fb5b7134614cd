"""K and V of new tokens into their blocks, compiled for one layout at a time.

A token's K goes to one lane of many rows, so what costs is the cache lines it touches; see `layout.py` for why
they are few.  Rounding and quantising run over vectors of channels first.  `reference.append` says the same slowly.
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

from cpu_attention import emit
from cpu_attention.compiling import compiled
from cpu_attention.emit import I8
from cpu_attention.job import JOB
from cpu_attention.layout import LANES, HeadFormat, Part
from cpu_attention.native import Entry, entry_of, pointer
from cpu_attention.wire import widen

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}  # by itemsize


@cache
def make_append(head: HeadFormat) -> Entry:
    """append(job, share): stores the share's tokens; see `reference.append` and `Job`."""
    K_SPEC, V_SPEC = repr((*astuple(head), "k")), repr((*astuple(head), "v"))
    D, BLOCK, UNIT, K, V = head.stored_dim, head.block_tokens, head.nbytes, head.k, head.v
    K_ITEM, K_PACKED, K_NUMBERS, K_NUM_SCALES, K_SCALES = K.itemsize, K.packed, K.numbers, K.num_scales, K.begin
    V_ITEM, V_PACKED, V_NUMBERS, V_NUM_SCALES, V_SCALES = V.itemsize, V.packed, V.numbers, V.num_scales, V.begin
    K_TILE, V_ROW = D // K_PACKED * LANES * K_ITEM, D * V_ITEM
    K_WORD, V_WORD = _WORDS[K_ITEM], _WORDS[V_ITEM]

    @compiled
    def append(job, share):  # type: ignore[no-untyped-def]
        j = carray(pointer(job), 1, JOB)[0]
        num_kv_heads, num_tokens = j.num_kv_heads, j.num_tokens
        bounds = carray(pointer(j.append_bounds), (j.num_append_shares + 1,), np.int64)
        blocks = carray(pointer(j.blocks), (num_tokens,), np.int32)
        offsets = carray(pointer(j.offsets), (num_tokens,), np.int32)
        data = carray(pointer(j.data), (j.data_bytes,), np.uint8)
        k_words, v_words, halves = data.view(K_WORD), data.view(V_WORD), data.view(np.uint16)
        # Of one token and head: as floats, and as they are stored.
        floats, numbers, scales = np.empty(D, np.float32), np.empty(D * 4, np.uint8), np.empty(D, np.uint8)
        k_items, v_items, scale_items = numbers.view(K_WORD), numbers.view(V_WORD), scales.view(np.uint16)
        end = bounds[share + 1]
        for token in range(bounds[share], end):
            block, offset = np.int64(blocks[token]), np.int64(offsets[token])
            # V's scales that somebody left behind it might be NaN, which no weight of zero takes away, and a vector of
            # them is read as a whole.
            is_last = token + 1 == end or blocks[token + 1] != block
            num_behind = LANES - 1 - offset % LANES if is_last else 0
            for head_index in range(num_kv_heads):
                unit = (block * num_kv_heads + head_index) * UNIT
                # What the next head will write, asked for now: all of it misses the caches in a decode step.
                ahead, place = unit + UNIT, offset
                if head_index + 1 == num_kv_heads:
                    following = min(token + 1, num_tokens - 1)
                    ahead, place = np.int64(blocks[following]) * num_kv_heads * UNIT, np.int64(offsets[following])
                _ask_for(data, ahead + K_NUMBERS + place // LANES * K_TILE, K_TILE)
                _ask_for(data, ahead + V_NUMBERS + place // V_PACKED * D * V_ITEM, V_ROW)

                widen(j.k + token * j.k_token_bytes + head_index * j.k_head_bytes, j.head_dim, j.k_wire, floats, 0)
                _store_numbers(floats, numbers, scales, K_SPEC)
                _store_scales(halves, (unit + K_SCALES) // 2 + offset, scale_items, K_NUM_SCALES, BLOCK, 0)
                at = (unit + K_NUMBERS) // K_ITEM + offset // LANES * LANES * (D // K_PACKED) + offset % LANES
                for row in range(D // K_PACKED):
                    item = k_items[K_PACKED * row]
                    if K_PACKED == 2:
                        item |= k_items[2 * row + 1] << 4
                    k_words[at + row * LANES] = item

                widen(j.v + token * j.v_token_bytes + head_index * j.v_head_bytes, j.head_dim, j.v_wire, floats, 0)
                _store_numbers(floats, numbers, scales, V_SPEC)
                _store_scales(halves, (unit + V_SCALES) // 2 + offset, scale_items, V_NUM_SCALES, BLOCK, num_behind)
                at = (unit + V_NUMBERS) // V_ITEM + offset // V_PACKED * D
                if offset % V_PACKED == 0:
                    for d in range(D):
                        v_words[at + d] = v_items[d]
                else:
                    for d in range(D):
                        v_words[at + d] = v_words[at + d] & 15 | v_items[d] << 4  # the old one's bits are still there

    return entry_of(append)


@numba.njit(inline="always")
def _store_scales(halves, at, items, count, block_tokens, num_behind):  # type: ignore[no-untyped-def]
    for index in range(count):
        place = at + index * block_tokens
        halves[place] = items[index]
        for behind in range(place + 1, place + 1 + num_behind):
            halves[behind] = 0


@intrinsic
def _ask_for(typing_context, data, at, NUM_BYTES):  # type: ignore[no-untyped-def]
    if not isinstance(NUM_BYTES, types.IntegerLiteral):
        raise errors.RequireLiteralValue("sizes are compiled in")

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        base = b.bitcast(context.make_array(signature.args[0])(context, b, arguments[0]).data, I8.as_pointer())
        emit.prefetch(b, base, arguments[1], NUM_BYTES.literal_value)
        return context.get_dummy_value()

    return types.void(data, at, NUM_BYTES), generate


@intrinsic
def _store_numbers(typing_context, floats, numbers, scales, SPEC):  # type: ignore[no-untyped-def]
    """A token's numbers for one head, [stored_dim], in the storage dtype (int4: one in a byte)."""
    if not isinstance(SPEC, types.StringLiteral):
        raise errors.RequireLiteralValue("shapes are compiled in, so they must be constants")
    dtype, head_dim, block_tokens, which = ast.literal_eval(SPEC.literal_value)
    head = HeadFormat(dtype, head_dim, block_tokens)
    part: Part = getattr(head, which)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        floats_p, numbers_p, scales_p = (
            b.bitcast(context.make_array(kind)(context, b, array).data, I8.as_pointer())
            for kind, array in zip(signature.args[:3], arguments, strict=False)
        )
        vectors = [emit.load(b, floats_p, first * 4) for first in range(0, part.stored_dim, LANES)]
        if not part.is_quantised:
            for index, vector in enumerate(vectors):
                emit.store_numbers(b, vector, numbers_p, index * LANES * part.itemsize, part.dtype)
        elif part is head.k:
            vectors = emit.rotate(b, vectors, head.rotation)
        for group in range(part.num_groups):
            first = group * part.group // LANES
            scale, minimum, items = _quantised(b, vectors[first : first + part.group // LANES], part)
            emit.store_item(b, scale, scales_p, group * 2)
            if part.has_minima:
                emit.store_item(b, minimum, scales_p, (part.num_groups + group) * 2)
            for index, item in enumerate(items, first):
                b.store(item, emit.at(b, numbers_p, index * LANES, item.type), align=1)
        return context.get_dummy_value()

    return types.void(floats, numbers, scales, SPEC), generate


def _quantised(b: Any, vectors: list[Any], part: Part) -> tuple[Any, Any, list[Any]]:
    """Bits of scale and minimum, and the integers, of one group of channels; see `reference.quantise`."""
    zero, one = emit.constant(0.0), emit.constant(1.0)

    def over_all(values: list[Any], combine: Any) -> Any:
        return emit.splat(b, emit.reduce(b, emit.combine(b, values, combine), combine))

    def rounded(value: Any) -> tuple[Any, Any]:
        largest = emit.constant(65504.0)
        bits = emit.to_half(b, emit.maximum(b, b.fneg(largest), emit.minimum(b, largest, value)))
        return bits, emit.from_half(b, bits)

    nothing = over_all([b.fmul(vector, zero) for vector in vectors], emit.add)  # NaN if any is not finite
    if part.has_minima:
        minimum_bits, minimum = rounded(over_all(vectors, emit.minimum))
        width = b.fsub(over_all(vectors, emit.maximum), minimum)
        low, high, shifted = 0.0, 15.0, [b.fsub(vector, minimum) for vector in vectors]
    else:
        minimum_bits = None
        width = over_all([emit.maximum(b, vector, b.fneg(vector)) for vector in vectors], emit.maximum)
        low, high, shifted = -127.0, 127.0, vectors
    scale_bits, scale = rounded(b.fadd(b.fdiv(width, emit.constant(high)), nothing))
    divisor = b.select(b.fcmp_ordered(">", scale, zero), scale, one)
    items = []
    for vector in shifted:
        whole = emit.call(b, "rint", b.fdiv(vector, divisor))
        whole = emit.maximum(b, emit.minimum(b, whole, emit.constant(high)), emit.constant(low))
        items.append(b.trunc(b.fptosi(whole, emit.WORDS), emit.BYTES))
    return scale_bits, minimum_bits, items
