"""Decode attention as vector code, for one shape at a time: what numba's own loops do not become.

The three inner steps are emitted as LLVM IR over vectors of 16 floats, which LLVM fits to the machine (one
AVX-512 register, two of AVX2, four of NEON).  Per block of a sequence and KV head, for all G query heads at once:

    scores[g, t] = Σ_d q[g, d] · K[d, t]         tokens in the lanes; a K number is loaded and widened once
                                                 for all G query heads, G · block/16 accumulators stay in registers
    softmax step   maximum, exponentials, sum    (online, Milakov & Gimelshein 2018)
    out[g, d]    = out[g, d] · shrink[g] + Σ_t p[g, t] · V[t, d]      head_dim in tiles, accumulators in registers

The exponential is Cephes' expf polynomial (relative error below 3e-7 on [-87, 0], see the tests); below -87 it
gives e^-87, about 1e-38.

`make_attend` compiles for a shape; its integers are literals to the emitted code, which is unrolled by them.
Everything that is compiled lives in this one file, because numba's disk cache looks at one file's time only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils, errors
from numba.extending import intrinsic

LANES = 16
F32, F16, BF16 = 0, 1, 2  # kinds of storage
REGISTERS = 24  # accumulators that may be live in one loop, of 32 vector registers

_FLOAT, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_MASKED = np.float32(-1e30)  # a score that counts for nothing, and still subtracts without becoming NaN


def can_vectorise(kind: int, group: int, head_dim: int, block_tokens: int) -> bool:
    """Whether `make_attend` takes this shape on this machine."""
    return (
        head_dim % LANES == 0
        and block_tokens % LANES == 0
        and group * (block_tokens // LANES) <= REGISTERS
        and (kind != F16 or _converts_half())
    )


@cache
def make_attend(kind: int, group: int, head_dim: int, block_tokens: int) -> Callable[..., None]:
    """attend(q, k, v, block_tables, positions, scale, window, sinks, out), compiled at its first call.

    q, out: [num_rows, num_q_heads, head_dim] float32; k, v: the store's blocks, flat, as float32 or uint16 bits;
    window: the most keys a row sees; sinks: [num_q_heads] float32 or empty.  The rest as in `reference.attend`.
    """
    G, D, BT, KIND = group, head_dim, block_tokens, kind
    TILE = max(1, min(D // LANES, REGISTERS // G, 8))  # vectors of head_dim whose accumulators are live together

    @numba.njit(nogil=True, cache=True)
    def attend(q, k, v, block_tables, positions, scale, window, sinks, out):  # type: ignore[no-untyped-def]
        num_rows, num_q_heads, _ = q.shape
        num_kv_heads = num_q_heads // G
        scores, outs, queries = np.empty(G * BT, np.float32), np.empty(G * D, np.float32), np.empty(G * D, np.float32)
        maxima, sums, shrinks = np.empty(G, np.float32), np.empty(G, np.float32), np.empty(G, np.float32)
        for row in range(num_rows):
            position = np.int64(positions[row])
            first = max(np.int64(0), position + 1 - window)
            for kv_head in range(num_kv_heads):
                query_head = kv_head * G
                for g in range(G):
                    for d in range(D):
                        queries[g * D + d] = q[row, query_head + g, d] * scale
                outs[:] = np.float32(0)
                maxima[:] = _MASKED
                sums[:] = np.float32(0)
                for index in range(first // BT, position // BT + 1):
                    begin = max(first - index * BT, 0)
                    end: Any = min(position + 1 - index * BT, BT)
                    offset = (np.int64(block_tables[row, index]) * num_kv_heads + kv_head) * (D * BT)
                    _scores(queries, k, offset, scores, G, D, BT, KIND)
                    if end - begin < BT:
                        for g in range(G):
                            for t in range(begin):
                                scores[g * BT + t] = _MASKED
                            for t in range(end, BT):
                                scores[g * BT + t] = _MASKED
                    _softmax_step(scores, maxima, sums, shrinks, G, BT)
                    # Places outside begin..end may hold anything, so they are not even multiplied by zero.
                    _add_values(scores, v, offset, outs, shrinks, begin, end, G, D, BT, KIND, TILE)
                for g in range(G):
                    factor, total = np.float32(1), sums[g]
                    if sinks.size:
                        maximum = max(maxima[g], sinks[query_head + g])
                        factor = np.exp(maxima[g] - maximum)
                        total = total * factor + np.exp(sinks[query_head + g] - maximum)
                    for d in range(D):
                        out[row, query_head + g, d] = outs[g * D + d] * (factor / total)

    return attend


@intrinsic
def _scores(typing_context, queries, k, offset, scores, G, D, BT, KIND):  # type: ignore[no-untyped-def]
    """scores[g*BT + t] = Σ_d queries[g*D + d] · k[offset + d*BT + t]"""
    group, head_dim, block, kind = _literals(G, D, BT, KIND)
    vectors, unroll = range(block // LANES), _unroll(head_dim)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        queries_p, k_p, scores_p = (_pointer(context, b, signature, arguments, i) for i in (0, 1, 3))
        offset_value = arguments[2]
        start = [[ir.Constant(_VECTOR, [0.0] * LANES) for _ in vectors] for _ in range(group)]

        def body(d, sums):  # type: ignore[no-untyped-def]
            base = b.add(offset_value, b.mul(d, _I64(block)))
            keys = [_load_stored(b, k_p, b.add(base, _I64(v * LANES)), kind) for v in vectors]
            for g in range(group):
                query = _splat(b, b.load(b.gep(queries_p, [b.add(_I64(g * head_dim), d)])), LANES)
                sums[g] = [_fma(b, query, key, total) for key, total in zip(keys, sums[g], strict=True)]
            return sums

        sums = _loop(b, _I64(0), _I64(head_dim), unroll, start, body)
        for g in range(group):
            for v in vectors:
                _store(b, sums[g][v], scores_p, _I64(g * block + v * LANES))
        return context.get_dummy_value()

    return types.void(queries, k, offset, scores, G, D, BT, KIND), generate


@intrinsic
def _softmax_step(typing_context, scores, maxima, sums, shrinks, G, BT):  # type: ignore[no-untyped-def]
    """scores <- exp(scores - new maximum), in place; maxima, sums brought up to date; shrinks = exp(old - new)"""
    group, block = _literals(G, BT)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        scores_p, maxima_p, sums_p, shrinks_p = (_pointer(context, b, signature, arguments, i) for i in range(4))
        for g in range(group):
            here = [_load(b, scores_p, _I64(g * block + v * LANES)) for v in range(block // LANES)]
            largest = here[0]
            for other in here[1:]:
                largest = _maximum(b, largest, other)
            old = b.load(b.gep(maxima_p, [_I64(g)]))
            new = _maximum(b, _reduce(b, largest, _maximum), old)
            b.store(new, b.gep(maxima_p, [_I64(g)]))
            weights = [_exp(b, b.fsub(vector, _splat(b, new, LANES))) for vector in here]
            total = weights[0]
            for other in weights[1:]:
                total = b.fadd(total, other)
            for v, weight in enumerate(weights):
                _store(b, weight, scores_p, _I64(g * block + v * LANES))
            shrink = b.extract_element(_exp(b, _splat(b, b.fsub(old, new), 4)), _I32(0))
            b.store(shrink, b.gep(shrinks_p, [_I64(g)]))
            sum_p = b.gep(sums_p, [_I64(g)])
            b.store(b.fadd(b.fmul(b.load(sum_p), shrink), _reduce(b, total, lambda b, x, y: b.fadd(x, y))), sum_p)
        return context.get_dummy_value()

    return types.void(scores, maxima, sums, shrinks, G, BT), generate


@intrinsic
def _add_values(  # type: ignore[no-untyped-def]
    typing_context, weights, v, offset, outs, shrinks, begin, end, G, D, BT, KIND, TILE
):
    """outs[g*D + d] = outs[g*D + d] · shrinks[g] + Σ_{begin <= t < end} weights[g*BT + t] · v[offset + t*D + d]"""
    group, head_dim, block, kind, tile = _literals(G, D, BT, KIND, TILE)

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        weights_p, v_p, outs_p, shrinks_p = (_pointer(context, b, signature, arguments, i) for i in (0, 1, 3, 4))
        offset_value, begin_value, end_value = arguments[2], arguments[5], arguments[6]

        def add(low, high, unroll):  # type: ignore[no-untyped-def]
            for first in range(0, head_dim, tile * LANES):
                vectors = range(min(tile, (head_dim - first) // LANES))
                start = []
                for g in range(group):
                    shrink = _splat(b, b.load(b.gep(shrinks_p, [_I64(g)])), LANES)
                    places = [_I64(g * head_dim + first + x * LANES) for x in vectors]
                    start.append([b.fmul(shrink, _load(b, outs_p, place)) for place in places])

                def body(t, sums, first=first, vectors=vectors):  # type: ignore[no-untyped-def]
                    base = b.add(offset_value, b.add(b.mul(t, _I64(head_dim)), _I64(first)))
                    values = [_load_stored(b, v_p, b.add(base, _I64(x * LANES)), kind) for x in vectors]
                    for g in range(group):
                        weight = _splat(b, b.load(b.gep(weights_p, [b.add(_I64(g * block), t)])), LANES)
                        sums[g] = [_fma(b, weight, value, total) for value, total in zip(values, sums[g], strict=True)]
                    return sums

                sums = _loop(b, low, high, unroll, start, body)
                for g in range(group):
                    for x in vectors:
                        _store(b, sums[g][x], outs_p, _I64(g * head_dim + first + x * LANES))

        is_whole = b.icmp_signed("==", b.sub(end_value, begin_value), _I64(block))
        with b.if_else(is_whole, likely=True) as (whole, part):
            with whole:
                add(_I64(0), _I64(block), _unroll(block))
            with part:
                add(begin_value, end_value, 1)
        return context.get_dummy_value()

    return types.void(weights, v, offset, outs, shrinks, begin, end, G, D, BT, KIND, TILE), generate


# What follows emits single pieces of IR; `b` is llvmlite's builder everywhere.


def _literals(*given: Any) -> Any:
    """Their values, known while compiling."""
    for value in given:
        if not isinstance(value, types.IntegerLiteral):
            raise errors.RequireLiteralValue("shapes are compiled in, so they must be constants")
    return [value.literal_value for value in given]


def _unroll(count: int) -> int:
    return max(factor for factor in (4, 2, 1) if count % factor == 0)


_Sums = list[list[Any]]  # per query head its accumulators


def _loop(b: Any, begin: Any, end: Any, unroll: int, start: _Sums, body: Callable[[Any, _Sums], _Sums]) -> _Sums:
    """for i in range(begin, end): sums = body(i, sums), at least once; the sums stay in registers."""
    before = b.block
    loop, after = b.append_basic_block("loop"), b.append_basic_block("after")
    b.branch(loop)
    b.position_at_end(loop)
    i = b.phi(_I64)
    i.add_incoming(begin, before)
    phis = [[b.phi(value.type) for value in values] for values in start]
    for row, values in zip(phis, start, strict=True):
        for phi, value in zip(row, values, strict=True):
            phi.add_incoming(value, before)
    sums = [list(row) for row in phis]
    for step in range(unroll):
        sums = body(b.add(i, _I64(step)), sums)
    following = b.add(i, _I64(unroll))
    i.add_incoming(following, b.block)
    for row, values in zip(phis, sums, strict=True):
        for phi, value in zip(row, values, strict=True):
            phi.add_incoming(value, b.block)
    b.cbranch(b.icmp_signed("<", following, end), loop, after)
    b.position_at_end(after)
    return sums


def _pointer(context: Any, b: Any, signature: Any, arguments: Any, index: int) -> Any:
    """To the first number of an array argument."""
    return context.make_array(signature.args[index])(context, b, arguments[index]).data


def _load_stored(b: Any, pointer: Any, index: Any, kind: int) -> Any:
    """LANES numbers of a storage dtype, widened to floats."""
    place = b.gep(pointer, [index])
    if kind == F32:
        return b.load(b.bitcast(place, _VECTOR.as_pointer()), align=4)
    if kind == F16:
        halves = ir.VectorType(ir.HalfType(), LANES)
        return b.fpext(b.load(b.bitcast(place, halves.as_pointer()), align=2), _VECTOR)
    bits = b.load(b.bitcast(place, ir.VectorType(_I16, LANES).as_pointer()), align=2)
    words = ir.VectorType(_I32, LANES)
    return b.bitcast(b.shl(b.zext(bits, words), ir.Constant(words, [16] * LANES)), _VECTOR)


def _load(b: Any, pointer: Any, index: Any) -> Any:
    return b.load(b.bitcast(b.gep(pointer, [index]), _VECTOR.as_pointer()), align=4)


def _store(b: Any, value: Any, pointer: Any, index: Any) -> None:
    b.store(value, b.bitcast(b.gep(pointer, [index]), value.type.as_pointer()), align=4)


def _splat(b: Any, value: Any, lanes: int) -> Any:
    one = b.insert_element(ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined), value, _I32(0))
    return b.shuffle_vector(one, one, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _call(b: Any, name: str, *values: Any) -> Any:
    """An LLVM intrinsic of values and result of one type."""
    kind = values[0].type
    suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
    function = ir.FunctionType(kind, [value.type for value in values])
    return b.call(cgutils.get_or_insert_function(b.module, function, f"llvm.{name}.{suffix}"), list(values))


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    return _call(b, "fma", x, y, z)


def _maximum(b: Any, x: Any, y: Any) -> Any:
    return _call(b, "maxnum", x, y)


def _reduce(b: Any, vector: Any, combine: Callable[..., Any]) -> Any:
    """All lanes by halves."""
    lanes = vector.type.count
    while lanes > 1:
        lanes //= 2
        low, high = (
            b.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, lanes), list(range(first, first + lanes))))
            for first in (0, lanes)
        )
        vector = combine(b, low, high)
    return b.extract_element(vector, _I32(0))


def _exp(b: Any, x: Any) -> Any:
    """e^x of a vector of numbers up to 0: x = n·ln 2 + r, a polynomial in r, n into the exponent."""
    lanes = x.type.count

    def constant(value: float) -> Any:
        return ir.Constant(x.type, [value] * lanes)

    x = _maximum(b, x, constant(-87.0))
    n = _call(b, "floor", _fma(b, x, constant(1.4426950408889634), constant(0.5)))
    r = _fma(b, n, constant(-0.693359375), x)
    r = _fma(b, n, constant(2.12194440e-4), r)
    y = constant(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = _fma(b, y, r, constant(coefficient))
    y = b.fadd(_fma(b, y, b.fmul(r, r), r), constant(1.0))
    words = ir.VectorType(_I32, lanes)
    exponent = b.add(b.fptosi(n, words), ir.Constant(words, [127] * lanes))
    return b.fmul(y, b.bitcast(b.shl(exponent, ir.Constant(words, [23] * lanes)), x.type))


@cache
def _converts_half() -> bool:
    """Whether the processor widens fp16 itself; elsewhere LLVM would call a function that numba does not have."""
    triple = llvmlite.binding.get_process_triple()
    return triple.startswith("aarch64") or bool(llvmlite.binding.get_host_cpu_features().get("f16c"))
