"""Single pieces of LLVM IR over vectors of floats, from which `block.py` and `append.py` build the kernels.

`b` is llvmlite's builder everywhere; integers given from Python become constants in the code.  A vector of 16 floats
is one AVX-512 register, two of AVX2, four of NEON or SSE: LLVM fits it to the machine that numba compiles for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba.core import cgutils, config

from cpu_attention.layout import LANES

FLOAT, HALF, I8, I16, I32, I64 = ir.FloatType(), ir.HalfType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
VECTOR, WORDS, SHORTS, BYTES = (ir.VectorType(kind, LANES) for kind in (FLOAT, I32, I16, I8))
_LINE = 64  # bytes of a cache line

Sums = list[list[Any]]  # per query head its accumulators


def converts_half() -> bool:
    """Whether the processor compiled for widens and narrows fp16 itself (x86's F16C, every 64-bit ARM)."""
    if llvmlite.binding.get_process_triple().startswith("aarch64"):
        return True
    if config.CPU_NAME or config.CPU_FEATURES is not None:  # numba was told to compile for another processor
        return "+f16c" in (config.CPU_FEATURES or "")
    return bool(llvmlite.binding.get_host_cpu_features().get("f16c"))


def has_wide_registers() -> bool:
    """Whether a register holds LANES floats, and there are 32 of them (AVX-512)."""
    if config.CPU_NAME or config.CPU_FEATURES is not None:
        return "+avx512f" in (config.CPU_FEATURES or "")
    return bool(llvmlite.binding.get_host_cpu_features().get("avx512f"))


@cache
def words(*values: int) -> Any:
    """A constant vector of 32-bit integers; one value stands for all lanes."""
    return ir.Constant(WORDS, list(values) * (LANES // len(values)))


def constant(value: float) -> Any:
    return ir.Constant(VECTOR, [value] * LANES)


def at(b: Any, base: Any, offset: Any, kind: Any) -> Any:
    """A pointer to a `kind` that lies `offset` bytes behind the byte pointer `base`."""
    return b.bitcast(b.gep(base, [I64(offset) if isinstance(offset, int) else offset]), kind.as_pointer())


def load(b: Any, base: Any, offset: Any, kind: Any = VECTOR, align: int = 4) -> Any:
    return b.load(at(b, base, offset, kind), align=align)


def store(b: Any, value: Any, base: Any, offset: Any) -> None:
    b.store(value, at(b, base, offset, value.type), align=4)


def from_half(b: Any, half: Any) -> Any:
    """The bits of LANES fp16 numbers, widened to floats."""
    if converts_half():
        return b.fpext(b.bitcast(half, ir.VectorType(HALF, LANES)), VECTOR)
    # Exponent and mantissa moved to their fp32 places, then multiplied by 2^112, which mends the exponent's bias and
    # the subnormals at once; infinities and NaN get their exponent back by hand.
    half = b.zext(half, WORDS)
    moved = b.shl(b.and_(half, words(0x7FFF)), words(13))
    number = b.bitcast(b.fmul(b.bitcast(moved, VECTOR), constant(2.0**112)), WORDS)
    is_special = b.icmp_unsigned("==", b.and_(half, words(0x7C00)), words(0x7C00))
    number = b.or_(number, b.select(is_special, words(0x7F800000), words(0)))
    return b.bitcast(b.or_(number, b.shl(b.and_(half, words(0x8000)), words(16))), VECTOR)


def to_half(b: Any, value: Any) -> Any:
    """LANES floats as the bits of fp16 numbers, to the nearest and ties to even."""
    if converts_half():
        return b.bitcast(b.fptrunc(value, ir.VectorType(HALF, LANES)), SHORTS)
    bits = b.bitcast(value, WORDS)
    sign, magnitude = b.and_(b.lshr(bits, words(16)), words(0x8000)), b.and_(bits, words(0x7FFFFFFF))
    half = b.sub(_round_off(b, magnitude, 13), words(112 << 10))
    # Below 2^-14 the last bit of a half is worth 2^-24, as that of a float just above 0.5 is.
    tiny = b.bitcast(b.fadd(b.bitcast(magnitude, VECTOR), constant(0.5)), WORDS)
    half = b.select(b.icmp_unsigned("<", magnitude, words(0x38800000)), b.sub(tiny, words(0x3F000000)), half)
    half = b.select(b.icmp_unsigned(">=", magnitude, words(0x47800000)), words(0x7C00), half)
    half = b.select(b.icmp_unsigned(">", magnitude, words(0x7F800000)), words(0x7E00), half)
    return b.trunc(b.or_(half, sign), SHORTS)


def _round_off(b: Any, bits: Any, count: int) -> Any:
    """Shifted right by `count` bits, to the nearest and ties to even."""
    odd = b.and_(b.lshr(bits, words(count)), words(1))
    return b.lshr(b.add(bits, b.add(odd, words((1 << (count - 1)) - 1))), words(count))


def load_halves(b: Any, base: Any, offset: Any) -> Any:
    return from_half(b, load(b, base, offset, SHORTS, 2))


def load_numbers(b: Any, base: Any, offset: Any, dtype: str) -> list[Any]:
    """LANES items of a storage dtype as floats: [vector], or for int4 [low halves, high halves]."""
    if dtype == "float32":
        return [load(b, base, offset)]
    if dtype == "float16":
        return [load_halves(b, base, offset)]
    if dtype == "bfloat16":
        return [b.bitcast(b.shl(b.zext(load(b, base, offset, SHORTS, 2), WORDS), words(16)), VECTOR)]
    items = load(b, base, offset, BYTES, 1)
    if dtype == "int8":
        return [b.sitofp(b.sext(items, WORDS), VECTOR)]
    pairs = b.zext(items, WORDS)
    return [b.sitofp(b.and_(pairs, words(15)), VECTOR), b.sitofp(b.lshr(pairs, words(4)), VECTOR)]


def store_item(b: Any, vector: Any, base: Any, offset: int) -> None:
    """The first lane alone."""
    item = b.extract_element(vector, I32(0))
    b.store(item, at(b, base, offset, item.type), align=2)


def store_numbers(b: Any, value: Any, base: Any, offset: Any, dtype: str) -> None:
    """LANES floats as float32, float16 or bfloat16, to the nearest and ties to even."""
    if dtype == "float32":
        store(b, value, base, offset)
        return
    if dtype == "float16":
        bits = to_half(b, value)
    else:
        is_nan = b.fcmp_unordered("uno", value, value)
        bits = b.trunc(b.select(is_nan, words(0x7FC0), _round_off(b, b.bitcast(value, WORDS), 16)), SHORTS)
    b.store(bits, at(b, base, offset, SHORTS), align=2)


def splat(b: Any, value: Any) -> Any:
    vector = ir.VectorType(value.type, LANES)
    one = b.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
    return b.shuffle_vector(one, one, words(0))


def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x·y + z: one instruction where there is one; two elsewhere, not a call of libm's exact one."""
    return call(b, "fmuladd", x, y, z)


def minimum(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.fcmp_ordered("<", x, y), x, y)


def maximum(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def call(b: Any, name: str, *values: Any) -> Any:
    """An LLVM intrinsic of values and result of one type."""
    kind = values[0].type
    suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
    function = ir.FunctionType(kind, [value.type for value in values])
    return b.call(cgutils.get_or_insert_function(b.module, function, f"llvm.{name}.{suffix}"), list(values))


def prefetch(b: Any, base: Any, offset: Any, num_bytes: int) -> None:
    """Asks for the cache lines of `num_bytes` bytes, to be read soon.

    Into the second level of cache: the first one would hold little else, and gets them in time from there.
    """
    pointer = I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    for line in range(0, num_bytes, _LINE):
        b.call(function, [b.gep(base, [b.add(offset, I64(line))]), I32(0), I32(2), I32(1)])  # read, to L2, data


def combine(b: Any, vectors: list[Any], how: Callable[[Any, Any, Any], Any]) -> Any:
    """One vector of several, lane by lane."""
    result = vectors[0]
    for vector in vectors[1:]:
        result = how(b, result, vector)
    return result


def reduce(b: Any, vector: Any, combine: Callable[[Any, Any, Any], Any]) -> Any:
    """One number of all lanes, halves against halves."""
    lanes = LANES
    while lanes > 1:
        lanes //= 2
        low, high = (
            b.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, lanes), list(range(first, first + lanes))))
            for first in (0, lanes)
        )
        vector = combine(b, low, high)
    return b.extract_element(vector, I32(0))


def add(b: Any, x: Any, y: Any) -> Any:
    return b.fadd(x, y)


def exp(b: Any, x: Any) -> Any:
    """e^x for x up to 0, Cephes' expf: x = n·ln 2 + r, a polynomial in r, n into the exponent.

    Relative error below 3e-7 on [-87, 0] (tested); below -87 it gives e^-87, about 1e-38.
    """
    x = maximum(b, constant(-87.0), x)  # in this order a NaN stays one
    n = call(b, "floor", fma(b, x, constant(1.4426950408889634), constant(0.5)))
    r = fma(b, n, constant(-0.693359375), x)
    r = fma(b, n, constant(2.12194440e-4), r)
    y = constant(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        y = fma(b, y, r, constant(coefficient))
    y = b.fadd(fma(b, y, b.fmul(r, r), r), constant(1.0))
    exponent = b.add(b.fptosi(n, WORDS), words(127))
    return b.fmul(y, b.bitcast(b.shl(exponent, words(23)), VECTOR))


def tanh(b: Any, x: Any) -> Any:
    """Eigen's rational approximation of degrees 13 and 6, good to a few units in the last place; ±1 beyond ±9."""
    clamped = maximum(b, constant(-7.90531110763549805), minimum(b, constant(7.90531110763549805), x))
    square = b.fmul(clamped, clamped)
    above = constant(-2.76076847742355e-16)
    for coefficient in (
        2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08, 1.48572235717979e-05,
        6.37261928875436e-04, 4.89352455891786e-03,
    ):  # fmt: skip
        above = fma(b, above, square, constant(coefficient))
    below = constant(1.19825839466702e-06)
    for coefficient in (1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03):
        below = fma(b, below, square, constant(coefficient))
    return b.fdiv(b.fmul(clamped, above), below)


def rotate(b: Any, vectors: list[Any], size: int) -> list[Any]:
    """Walsh-Hadamard transform of every `size` numbers, a power of two; see `reference.rotate`."""
    stride = 1
    while stride < min(size, LANES):
        swap = ir.Constant(WORDS, [lane ^ stride for lane in range(LANES)])
        signs = ir.Constant(VECTOR, [-1.0 if lane & stride else 1.0 for lane in range(LANES)])
        vectors = [fma(b, vector, signs, b.shuffle_vector(vector, vector, swap)) for vector in vectors]
        stride *= 2
    vectors = list(vectors)
    while stride < size:
        away = stride // LANES
        for i, (low, high) in enumerate(zip(vectors, vectors[away:], strict=False)):
            if not i & away:
                vectors[i], vectors[i + away] = b.fadd(low, high), b.fsub(low, high)
        stride *= 2
    return [b.fmul(vector, constant(size**-0.5)) for vector in vectors] if size > 1 else vectors


def loop(b: Any, begin: Any, end: Any, step: int, start: Sums, body: Callable[[Any, Sums], Sums]) -> Sums:
    """for i in range(begin, end, step): sums = body(i, sums), at least once; the sums stay in registers."""
    before = b.block
    inside, after = b.append_basic_block("loop"), b.append_basic_block("after")
    b.branch(inside)
    b.position_at_end(inside)
    i = b.phi(I64)
    i.add_incoming(begin, before)
    phis = [[b.phi(value.type) for value in values] for values in start]
    for row, values in zip(phis, start, strict=True):
        for phi, value in zip(row, values, strict=True):
            phi.add_incoming(value, before)
    sums = body(i, [list(row) for row in phis])
    following = b.add(i, I64(step))
    i.add_incoming(following, b.block)
    for row, values in zip(phis, sums, strict=True):
        for phi, value in zip(row, values, strict=True):
            phi.add_incoming(value, b.block)
    b.cbranch(b.icmp_signed("<", following, end), inside, after)
    b.position_at_end(after)
    return sums
