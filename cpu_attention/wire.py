"""Numbers of the wire to floats and back, inside compiled code, so that every core does its own rows.

numpy does it for a whole message on one core, under the interpreter's lock, and fp16 without the processor's own
conversions: that took longer than the attention between.  Here a row is widened when its turn comes and narrowed
while it is still in cache.  Narrowing rounds to the nearest, ties to even, and a NaN stays one; `astype` is the
reference of both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_attention import emit
from cpu_attention.emit import I8, I64, Sums
from cpu_attention.layout import LANES, NUMBER_DTYPES

WIRES = {"float32": 0, "float16": 1, "bfloat16": 2}  # dtype -> its number in compiled code


@intrinsic
def widen(typing_context, address, count, wire, floats, at):  # type: ignore[no-untyped-def]
    """The `count` numbers at `address` to floats[at:], with zeros behind them up to a whole vector."""

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        address, count, wire, *_ = arguments
        numbers, floats = b.inttoptr(address, I8.as_pointer()), _place(context, b, signature.args[3], *arguments[3:])

        def convert(source: Any, first: Any, dtype: str) -> None:
            [vector] = emit.load_numbers(b, source, 0, dtype)
            emit.store(b, vector, floats, b.mul(first, I64(4)))

        def whole(first: Any, dtype: str) -> None:
            convert(b.gep(numbers, [b.mul(first, I64(_itemsize(dtype)))]), first, dtype)

        def rest(first: Any, beside: Any, dtype: str) -> None:
            item = I64(_itemsize(dtype))
            cgutils.memset(b, beside, b.mul(item, I64(LANES)), 0)
            cgutils.raw_memcpy(b, beside, b.gep(numbers, [b.mul(first, item)]), b.sub(count, first), item, align=1)
            convert(beside, first, dtype)

        _each_vector(b, count, wire, whole, rest)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, floats, types.int64), generate


@intrinsic
def narrow(typing_context, floats, at, factor, count, wire, address):  # type: ignore[no-untyped-def]
    """floats[at : at + count] · factor to the numbers at `address`; nothing behind them is touched."""

    def generate(context, b, signature, arguments):  # type: ignore[no-untyped-def]
        _, _, factor, count, wire, address = arguments
        numbers, floats = b.inttoptr(address, I8.as_pointer()), _place(context, b, signature.args[0], *arguments[:2])

        def convert(first: Any, target: Any, dtype: str) -> None:
            vector = b.fmul(emit.load(b, floats, b.mul(first, I64(4))), emit.splat(b, factor))
            emit.store_numbers(b, vector, target, 0, dtype)

        def whole(first: Any, dtype: str) -> None:
            convert(first, b.gep(numbers, [b.mul(first, I64(_itemsize(dtype)))]), dtype)

        def rest(first: Any, beside: Any, dtype: str) -> None:
            item = I64(_itemsize(dtype))
            convert(first, beside, dtype)
            cgutils.raw_memcpy(b, b.gep(numbers, [b.mul(first, item)]), beside, b.sub(count, first), item, align=1)

        _each_vector(b, count, wire, whole, rest)
        return context.get_dummy_value()

    return types.void(floats, types.int64, types.float32, types.int64, types.int64, types.int64), generate


def _each_vector(
    b: Any, count: Any, wire: Any, whole: Callable[[Any, str], None], rest: Callable[[Any, Any, str], None]
) -> None:
    """Code for each dtype: `whole` for the numbers of a vector, `rest` for fewer, with room for a vector beside."""
    end = b.and_(count, I64(-LANES))
    for dtype, number in WIRES.items():

        def body(first: Any, nothing: Sums, dtype: str = dtype) -> Sums:
            whole(first, dtype)
            return nothing

        with b.if_then(b.icmp_signed("==", wire, I64(number))):
            with b.if_then(b.icmp_signed(">", end, I64(0))):
                emit.loop(b, I64(0), end, LANES, [], body)
            with b.if_then(b.icmp_signed("<", end, count), likely=False):
                beside = cgutils.alloca_once(b, ir.ArrayType(I8, LANES * _itemsize(dtype)))
                rest(end, b.bitcast(beside, I8.as_pointer()), dtype)


def _itemsize(dtype: str) -> int:
    return NUMBER_DTYPES[dtype].itemsize


def _place(context: Any, b: Any, kind: Any, array: Any, index: Any) -> Any:
    """Where an item of an array of floats lies."""
    base = b.bitcast(context.make_array(kind)(context, b, array).data, I8.as_pointer())
    return b.gep(base, [b.mul(index, I64(4))])
