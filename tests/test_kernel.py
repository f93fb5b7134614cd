"""The compiled kernels against the plain ones, over shapes, storage types and rules."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cpu_attention import KV_DTYPES, NUMBER_DTYPES, AttentionRule, HeadFormat, kernel, reference
from cpu_attention.block import MASKED
from cpu_attention.job import address
from cpu_attention.multicore import Attention, Kernel
from cpu_attention.state import State, merge
from cpu_attention.work import NewTokens, cut_work

# Both read the same stored numbers, so this is fp32 arithmetic against float64, whatever the storage type.
TOLERANCE = 2e-6


@dataclass(frozen=True)
class Case:
    """Sequences in shuffled blocks, whose unused places hold rubbish."""

    q: np.ndarray
    data: np.ndarray
    head: HeadFormat
    tables: np.ndarray
    positions: np.ndarray
    rule: AttentionRule

    def attend(self, which: Kernel, num_threads: int = 1) -> np.ndarray:
        attention = Attention(num_threads, which)
        work = attention.cut(self.positions, self.rule.window, self.head.block_tokens)
        try:
            return attention.attend(self.q, self.data, self.head, self.tables, work, self.rule)
        finally:
            attention.close()

    def agree(self, tolerance: float = TOLERANCE, num_threads: int = 1) -> None:
        out, expected = self.attend(kernel, num_threads), self.attend(reference)
        np.testing.assert_allclose(out, expected, atol=tolerance, rtol=tolerance)


def make_case(
    seed: int,
    *,
    dtype: str,
    lengths: list[int],
    kv_heads: int = 2,
    group: int = 1,
    head_dim: int = 64,
    block: int = 16,
    rule: AttentionRule | None = None,
    values: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray] = np.random.Generator.standard_normal,
) -> Case:
    generator = np.random.default_rng(seed)
    head = HeadFormat(dtype, head_dim, block)
    blocks_each = [-(-length // block) for length in lengths]
    num_blocks = sum(blocks_each) + 2
    data = generator.integers(0, 256, (num_blocks, kv_heads, head.nbytes), np.uint8)
    order = generator.permutation(num_blocks).astype(np.int32)
    tables = np.zeros((len(lengths), max(blocks_each)), np.int32)
    for row, count in enumerate(blocks_each):
        tables[row, :count], order = order[:count], order[count:]
    for row, length in enumerate(lengths):
        k, v = (values(generator, (length, kv_heads, head_dim)).astype(np.float32) for _ in "kv")
        positions = np.arange(length, dtype=np.int32)
        kernel.append(k, v, tables[row][positions // block], positions % block, data, head)
    q = generator.standard_normal((len(lengths), kv_heads * group, head_dim)).astype(np.float32)
    return Case(q, data, head, tables, np.array(lengths, np.int32) - 1, rule or AttentionRule(head_dim**-0.5))


@pytest.mark.parametrize("dtype", NUMBER_DTYPES)
def test_address(dtype: str) -> None:
    """Of arrays that are written and read alone, whole and parts, while memory is taken and given back."""
    kept = []
    for size in range(1, 200):
        array = np.zeros((size, 3, 8), NUMBER_DTYPES[dtype])
        array.flags.writeable = size % 2 > 0
        for part in (array, array[size // 2 :], array[:, 1:], array[::2]):
            assert address(part) == part.__array_interface__["data"][0]
        kept.append(array)
        del kept[: size % 3]


# Every head_dim and kind of group at least once; each is a compilation of its own.
HEADS = [
    (64, 2, 4), (80, 1, 1), (96, 2, 1), (112, 1, 2), (128, 3, 8), (128, 1, 7), (192, 1, 3), (256, 2, 2), (64, 1, 16),
    (40, 1, 13),
]  # fmt: skip


# Each storage type with every other one of them, and with every fourth where nothing is said of slow ones.
SHAPES = {
    (dtype, *heads): (j + i // 2) % 2 > 0  # whether it is slow
    for i, dtype in enumerate(KV_DTYPES)
    for j, heads in enumerate(HEADS[i % 2 :: 2])
}


@pytest.mark.parametrize(
    "dtype, head_dim, kv_heads, group",
    [pytest.param(*shape, marks=pytest.mark.slow if is_slow else []) for shape, is_slow in SHAPES.items()],
)
def test_shapes(dtype: str, head_dim: int, kv_heads: int, group: int) -> None:
    """Lengths 1, block-1, block, block+1 and several blocks, in one call; plain, with a window, with sinks."""
    block = 16
    sinks = np.random.default_rng(0).normal(0, 2, kv_heads * group).astype(np.float32)
    case = make_case(
        head_dim, kv_heads=kv_heads, group=group, head_dim=head_dim, block=block, dtype=dtype,
        lengths=[1, block - 1, block, block + 1, 5 * block + 3],
    )  # fmt: skip
    case.agree()
    replace(case, rule=AttentionRule(0.1, window=21)).agree()
    replace(case, rule=AttentionRule(0.1, window=3, sinks=sinks)).agree()


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("block", [48, pytest.param(128, marks=pytest.mark.slow)])
def test_block_sizes(dtype: str, block: int) -> None:
    """Lengths around the borders of blocks and of what one step of the loops takes."""
    lengths = [1, 15, 16, 17, 33, block - 1, block, block + 1, 3 * block, 300]
    make_case(1, group=3, block=block, lengths=lengths, dtype=dtype).agree()


# (group, head_dim, block_tokens, storage): those of the tests above, which are compiled by now, and one more.
COMPILED_SHAPES = [
    *((group, head_dim, 16, dtype) for dtype, head_dim, _, group in SHAPES if head_dim <= 128),
    *((3, 64, 48, dtype) for dtype in KV_DTYPES),
    (9, 1, 16, "float32"),
]
ODD_SHAPES = [*product((1, 5, 9), (1, 40), (16, 48), KV_DTYPES)]


@pytest.mark.parametrize("shapes", [COMPILED_SHAPES, pytest.param(ODD_SHAPES, marks=pytest.mark.slow)], ids=len)
@settings(max_examples=60)
@given(
    data=st.data(),
    seed=st.integers(0, 2**31),
    kv_heads=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 130), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 140),
    softcap=st.none() | st.floats(0.5, 50),
    has_sinks=st.booleans(),
    scale=st.floats(-2, 2),
    num_threads=st.sampled_from([1, 3]),
)
def test_any_shape_and_rule(
    shapes: list[tuple[int, int, int, str]],
    data: st.DataObject,
    seed: int,
    kv_heads: int,
    lengths: list[int],
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    scale: float,
    num_threads: int,
) -> None:
    group, head_dim, block, dtype = data.draw(st.sampled_from(shapes))
    sinks = np.random.default_rng(seed).normal(0, 3, kv_heads * group).astype(np.float32) if has_sinks else None
    case = make_case(
        seed, kv_heads=kv_heads, group=group, head_dim=head_dim, block=block, lengths=lengths, dtype=dtype,
        rule=AttentionRule(scale, window, softcap, sinks),
    )  # fmt: skip
    # Scores reach |scale|·|q||k|, about 50 here, and fp32 rounds them before the exponential.
    case.agree(5e-5, num_threads)


ADVERSARIAL: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "equal keys": lambda g, shape: np.broadcast_to(g.standard_normal((1, *shape[1:])), shape),
    "zeros": lambda g, shape: np.zeros(shape),
    "one key far ahead": lambda g, shape: (
        np.where(np.arange(shape[0]) == shape[0] // 2, 20.0, 0.01)[:, None, None] * np.ones(shape)
    ),
    "growing keys": lambda g, shape: np.linspace(0, 8, shape[0])[:, None, None] * np.ones(shape),
    "tiny": lambda g, shape: 1e-20 * g.standard_normal(shape),
    "large values": lambda g, shape: 1000 + g.standard_normal(shape),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_adversarial_numbers(name: str, dtype: str) -> None:
    """Relative to the largest value: what cancels is lost by any sum in fp32."""
    case = make_case(5, dtype=dtype, lengths=[1, 100, 300], group=4, values=ADVERSARIAL[name])
    out, expected = case.attend(kernel), case.attend(reference)
    scale = max(1e-30, np.abs(expected).max())
    np.testing.assert_allclose(out / scale, expected / scale, atol=TOLERANCE)


def test_large_scores_do_not_overflow() -> None:
    """Logits of ±10⁴: fp32 has 10⁻³ left of them, and so much of the weights."""
    case = make_case(3, group=2, lengths=[40, 3], dtype="float32", rule=AttentionRule(500.0))
    out = case.attend(kernel)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, case.attend(reference), atol=2e-2)


def test_the_exponential() -> None:
    """Against float64 over the whole range, through the kernel: two keys, one of which weighs e^-x beside 1."""
    x = np.linspace(0, 80, 4001, dtype=np.float32)
    head = HeadFormat("float32", 16, 16)
    data = np.zeros((1, 1, head.nbytes), np.uint8)
    k, v = np.zeros((2, 1, 16), np.float32), np.zeros((2, 1, 16), np.float32)
    k[1, 0, 0] = v[1, 0, 0] = 1  # scores 0 and -x; value 1 for the second
    kernel.append(k, v, np.zeros(2, np.int32), np.arange(2, dtype=np.int32), data, head)
    q = np.zeros((len(x), 1, 16), np.float32)
    q[:, 0, 0] = -x
    case = Case(q, data, head, np.zeros((len(x), 1), np.int32), np.ones(len(x), np.int32), AttentionRule(1.0))
    weight = np.exp(-x.astype(np.float64))
    np.testing.assert_allclose(case.attend(kernel)[:, 0, 0], weight / (1 + weight), rtol=5e-7)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_parts_make_the_whole(dtype: str) -> None:
    """A prefix and the rest, each attended alone, merge into attention over both: what splits a sequence."""
    case = make_case(9, dtype=dtype, lengths=[200, 65], group=4, block=32)
    attention, whole = Attention(), case.attend(reference)
    for border in (1, 31, 32, 64):
        parts = []
        for begins, ends in ((np.zeros(2, np.int64), np.full(2, border)), (np.full(2, border), case.positions + 1)):
            work = cut_work(begins.astype(np.int64), ends.astype(np.int64), 1, 32)
            parts.append(attention.attend_part(case.q, case.data, case.head, case.tables, work, case.rule))
        np.testing.assert_allclose(merge(*parts).out, whole, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_sums_and_maxima(dtype: str) -> None:
    case = make_case(9, dtype=dtype, lengths=[40, 5, 16], group=4)
    states = []
    for which in (kernel, reference):
        attention = Attention(1, which)
        work = attention.cut(case.positions, None, 16)
        states.append(attention.attend_part(case.q, case.data, case.head, case.tables, work, case.rule))
    np.testing.assert_allclose(states[0].maxima, states[1].maxima, atol=TOLERANCE)
    np.testing.assert_allclose(states[0].sums, states[1].sums, rtol=TOLERANCE)


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_what_lies_beyond_a_sequence_does_not_matter(dtype: str) -> None:
    """The unused places of its last block hold what an earlier sequence left there, NaN too."""
    head = HeadFormat(dtype, 64, 32)
    data = np.zeros((1, 1, head.nbytes), np.uint8)
    places = np.zeros(32, np.int32), np.arange(32, dtype=np.int32)
    earlier = np.full((32, 1, 64), np.nan, np.float32)
    fresh = np.random.default_rng(0).standard_normal((5, 1, 64)).astype(np.float32)
    q = np.ones((1, 2, 64), np.float32)
    outs = []
    for before in (earlier, np.zeros_like(earlier)):
        kernel.append(before, before, *places, data, head)
        kernel.append(fresh, fresh, places[0][:5], places[1][:5], data, head)
        case = Case(q, data, head, np.zeros((1, 1), np.int32), np.array([4], np.int32), AttentionRule(0.125))
        outs.append(case.attend(kernel))
    assert np.isfinite(outs[0]).all() and np.array_equal(*outs)


@settings(max_examples=15)
@example(turns=[(5, 2, False), (2, 1, False)], seed=0)
@example(turns=[(9, 4, True), (2, 0, False)], seed=0)
@given(
    turns=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 24), st.booleans()), min_size=2, max_size=6),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("which", [kernel, reference], ids=["kernel", "reference"])
def test_tokens_that_come_again_leave_nothing_of_the_old_ones(
    dtype: str, which: Kernel, turns: list[tuple[int, int, bool]], seed: int
) -> None:
    """Turns of (tokens to append, how many to go back after it, whether these are NaN): what is stored then, and read
    by attention, is to the bit what a fresh store holds that was given the tokens that stayed."""
    generator, head, tokens = np.random.default_rng(seed), HeadFormat(dtype, 32, 32), np.empty((0, 1, 32), np.float32)
    blocks = np.array([2, 0, 3, 1], np.int32)
    stores = [generator.integers(0, 256, (4, 1, head.nbytes), np.uint8) for _ in "ab"]

    def append(data: np.ndarray, new: np.ndarray, start: int) -> None:
        positions = np.arange(start, start + len(new), dtype=np.int32)
        which.append(new, -new, blocks[positions // 32], positions % 32, data, head)

    for count, back, is_nan in turns:
        new = generator.standard_normal((count, 1, 32)).astype(np.float32)
        new[max(0, count - back) :] += np.float32(np.nan if is_nan else 0)
        append(stores[0], new, len(tokens))
        tokens = np.concatenate([tokens, new])[: max(0, len(tokens) + count - back)]
    last = generator.standard_normal((1, 1, 32)).astype(np.float32)
    append(stores[0], last, len(tokens))
    tokens = np.concatenate([tokens, last])
    append(stores[1], tokens, 0)
    held = [[part.reshape(-1, 32)[: len(tokens)] for part in reference.read(s[blocks], head)] for s in stores]
    assert np.array_equal(held[0], held[1])
    q, end = generator.standard_normal((1, 2, 32)).astype(np.float32), np.array([len(tokens) - 1], np.int32)
    outs = [Case(q, data, head, blocks[None], end, AttentionRule(0.2)).attend(which) for data in stores]
    assert np.isfinite(outs).all() and np.array_equal(*outs)


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_show(dtype: str, bad: float) -> None:
    """A model that gives NaN must not look healthy because its KV is quantised."""
    k = np.ones((20, 1, 64), np.float32)
    k[3, 0, 7] = bad
    v = k.copy()
    head = HeadFormat(dtype, 64, 32)
    data = np.zeros((1, 1, head.nbytes), np.uint8)
    kernel.append(k, v, np.zeros(20, np.int32), np.arange(20, dtype=np.int32), data, head)
    case = Case(
        np.ones((1, 1, 64), np.float32), data, head, np.zeros((1, 1), np.int32), np.array([19]), AttentionRule(1)
    )
    assert not np.isfinite(case.attend(kernel)).all()


def test_window_reads_only_the_window() -> None:
    """Keys before it may be anything, NaN too."""
    case = make_case(5, kv_heads=1, head_dim=16, lengths=[64], dtype="float32", rule=AttentionRule(0.25, window=24))
    expected = case.attend(reference)
    case.data[case.tables[0, :2]] = 0xFF  # tokens 0..31: NaN in every storage type; the window begins at 40
    np.testing.assert_allclose(case.attend(kernel), expected, atol=TOLERANCE)


WIRES = ["float32", "float16", "bfloat16"]


@pytest.mark.parametrize("shapes", [COMPILED_SHAPES, pytest.param(ODD_SHAPES, marks=pytest.mark.slow)], ids=len)
@settings(max_examples=40)
@given(
    data=st.data(),
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(1, 130), min_size=1, max_size=5),
    wires=st.tuples(*[st.sampled_from(WIRES)] * 4),
    window=st.none() | st.integers(1, 140),
    softcap=st.none() | st.floats(0.5, 50),
    has_sinks=st.booleans(),
    is_decode=st.booleans(),
    num_threads=st.sampled_from([1, 3]),
)
def test_a_layer_with_any_wire(
    shapes: list[tuple[int, int, int, str]],
    data: st.DataObject,
    seed: int,
    lengths: list[int],
    wires: tuple[str, ...],
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    is_decode: bool,
    num_threads: int,
) -> None:
    """New tokens stored, attended to, answered: to the bit what it is with everything in float32 and numpy's casts
    around it, and the reference's answer; on the way for decodes, in shares of their own for others."""
    group, head_dim, block, dtype = data.draw(st.sampled_from(shapes))
    sinks = np.random.default_rng(seed).normal(0, 3, 2 * group).astype(np.float32) if has_sinks else None
    rule = AttentionRule(head_dim**-0.5, window, softcap, sinks)
    case = make_case(seed, group=group, head_dim=head_dim, block=block, lengths=lengths, dtype=dtype, rule=rule)
    generator = np.random.default_rng(seed)
    q_wire, k_wire, v_wire, out_wire = (NUMBER_DTYPES[wire] for wire in wires)
    q = case.q.astype(q_wire)
    k, v = (generator.normal(0, 2, (len(lengths), 2, head_dim)).astype(wire) for wire in (k_wire, v_wire))
    for array in (q, k, v):
        array.setflags(write=False)  # as it comes from a frame
    blocks = case.tables[np.arange(len(lengths)), case.positions // block]
    attention = Attention(num_threads)
    work = attention.cut(case.positions, window, block)
    shares = None if is_decode else attention.cut_append(blocks)

    def attend(which: Kernel, out_wire: np.dtype, *arrays: np.ndarray) -> tuple[np.ndarray, State]:
        stored, state = case.data.copy(), State.empty(*q.shape, out_wire)
        new = NewTokens(arrays[1], arrays[2], blocks, case.positions % block, shares)
        which.attend(arrays[0], stored, case.head, case.tables, work, rule, state, new, attention._team)
        return stored, state

    stored, state = attend(kernel, out_wire, q, k, v)
    widened = [array.astype(np.float32) for array in (q, k, v)]
    wide_stored, wide = attend(kernel, np.dtype(np.float32), *widened)
    assert np.array_equal(stored, wide_stored)
    assert wide.out.astype(out_wire).tobytes() == state.out.tobytes()
    assert np.array_equal(wide.maxima, state.maxima) and np.array_equal(wide.sums, state.sums)
    expected = attend(reference, np.dtype(np.float32), *widened)[1]
    np.testing.assert_allclose(wide.out, expected.out, atol=5e-5, rtol=5e-5)
    np.testing.assert_allclose(wide.maxima, expected.maxima, atol=5e-5, rtol=5e-5)
    np.testing.assert_allclose(wide.sums, expected.sums, rtol=5e-4)
    attention.close()


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("head_dim", [128, 40])
def test_rounding_of_answers(wire: str, head_dim: int) -> None:
    """Ties and their neighbours in every binade, subnormals, what overflows, infinities and NaN, as `astype` has it:
    attention over one key is its value."""
    mantissas = 1 + np.arange(2**12) / 2**12
    numbers = np.concatenate([2.0**exponent * mantissas for exponent in [*range(-28, 18), -133, -126, 100, 127]])
    rest = [0.0, np.inf, np.nan, 65519.99, 65520, 3.4e38]
    numbers = np.resize(np.append(rest, numbers).astype(np.float32), (len(numbers) // head_dim + 1, 1, head_dim))
    numbers[1::2] *= -1
    numbers[:2, 0, : len(rest)] = rest, np.negative(rest)
    head, count = HeadFormat("float32", head_dim, 16), len(numbers)
    data = np.zeros((count, 1, head.nbytes), np.uint8)
    tables, zeros = np.arange(count, dtype=np.int32)[:, None], np.zeros(count, np.int32)
    kernel.append(np.zeros_like(numbers), numbers, tables[:, 0], zeros, data, head)
    attention, state = Attention(), State.empty(count, 1, head_dim, NUMBER_DTYPES[wire])
    work = attention.cut(zeros, None, 16)
    kernel.attend(np.zeros_like(numbers), data, head, tables, work, AttentionRule(1.0), state)
    with np.errstate(over="ignore"):
        expected = (numbers + 0.0).astype(NUMBER_DTYPES[wire])  # a sum never begins with a negative zero
    is_nan = np.isnan(numbers)
    assert np.isnan(state.out[is_nan]).all() and np.isnan(expected[is_nan]).all()
    words = f"u{expected.itemsize}"
    assert np.array_equal(state.out.view(words)[~is_nan], expected.view(words)[~is_nan])


@pytest.mark.parametrize("wire", ["float16", "bfloat16"])
def test_every_half_of_q(wire: str) -> None:
    """All 65,536 of them: with a key of one and zeros the score is that channel of q."""
    halves = np.arange(65536, dtype=np.uint16).view(NUMBER_DTYPES[wire]).reshape(-1, 8)
    q = np.zeros((len(halves), 8, 24), NUMBER_DTYPES[wire])
    q[:, :, 20] = halves
    head = HeadFormat("float32", 24, 16)
    data, zero = np.zeros((1, 1, head.nbytes), np.uint8), np.zeros(1, np.int32)
    key = np.zeros((1, 1, 24), np.float32)
    key[0, 0, 20] = 1
    kernel.append(key, key, zero, zero, data, head)
    attention, state = Attention(), State.empty(*q.shape)
    zeros = np.zeros(len(q), np.int32)
    kernel.attend(q, data, head, zeros[:, None], attention.cut(zeros, None, 16), AttentionRule(1.0), state)
    with np.errstate(invalid="ignore"):
        floats = halves.astype(np.float32)
    is_nan = np.isnan(floats)
    assert np.isnan(state.out[is_nan]).all()
    assert np.array_equal(state.maxima[~is_nan], np.maximum(floats[~is_nan], MASKED))


def test_views_are_read_where_they_lie() -> None:
    """Transposed, reversed, repeated and unaligned arrays, as a model or a frame may have them."""
    generator = np.random.default_rng(0)
    case = make_case(3, dtype="float32", lengths=[20, 7, 33], group=2, head_dim=40)
    blocks, offsets = case.tables[np.arange(3), case.positions // 16], case.positions % 16
    attention = Attention()
    work = attention.cut(case.positions, None, 16)

    def unaligned(array: np.ndarray) -> np.ndarray:
        return np.frombuffer(b"x" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)

    ways: list[Callable[[np.ndarray], np.ndarray]] = [
        np.ascontiguousarray, np.asfortranarray, unaligned,
        lambda array: np.ascontiguousarray(array.swapaxes(0, 1)).swapaxes(0, 1),
        lambda array: np.ascontiguousarray(array[::-1])[::-1], lambda array: np.repeat(array, 2, axis=2)[:, :, ::2],
    ]  # fmt: skip
    q, k, v = (generator.standard_normal((3, heads, 40)).astype(np.float16) for heads in (4, 2, 2))
    answers = []
    for way in ways:
        data = case.data.copy()
        new = NewTokens(way(k), way(v), blocks, offsets)
        out = attention.attend(way(q), data, case.head, case.tables, work, case.rule, new)
        answers.append((out.tobytes(), data.tobytes()))
    assert len(set(answers)) == 1


def test_numbers_of_other_types_are_refused() -> None:
    case = make_case(3, dtype="float32", lengths=[20])
    for dtype in (np.float64, np.int32, np.dtype(np.float32).newbyteorder()):
        with pytest.raises(ValueError, match="float32, float16, bfloat16"):
            replace(case, q=case.q.astype(dtype)).attend(kernel)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("storage", KV_DTYPES)
def test_append(wire: str, storage: str) -> None:
    """The very bytes of the reference, over tokens that begin, continue and fill blocks, whatever was there."""
    generator = np.random.default_rng(0)
    k, v = (generator.normal(0, 3, (40, 2, 40)).astype(NUMBER_DTYPES[wire]) for _ in range(2))
    k[5], v[6], k[7, 0, 3] = 0, 1e-6, 60000
    k.setflags(write=False)  # as it comes from a frame
    head = HeadFormat(storage, 40, 16)
    blocks = np.array([3] * 16 + [0] * 16 + [1] * 8, np.int32)
    offsets = np.array([*range(16), *range(16), *range(8)], np.int32)
    stores = []
    for which in (kernel, reference):
        data = np.random.default_rng(1).integers(0, 256, (4, 2, head.nbytes), np.uint8)
        which.append(k, v, blocks, offsets, data, head)
        stores.append([part[[3, 0]].tobytes() for part in reference.read(data, head)])
        stores[-1].append(data[2].tobytes())  # another sequence's
    assert stores[0] == stores[1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_half_survives(dtype: str) -> None:
    """All 65,536 of them, subnormals, infinities and NaN included, widened and rounded back."""
    bits = np.arange(65536, dtype=np.uint16).reshape(512, 1, 128)
    head, wide = HeadFormat(dtype, 128, 16), HeadFormat("float32", 128, 16)
    blocks, offsets = np.arange(512, dtype=np.int32) // 16, np.arange(512, dtype=np.int32) % 16
    stored = np.zeros((32, 1, wide.nbytes), np.uint8)
    with np.errstate(invalid="ignore"):
        halves = bits.view(NUMBER_DTYPES[dtype])
        kernel.append(halves, halves, blocks, offsets, stored, wide)
        floats = reference.read(stored, wide)[1].astype(np.float32).reshape(512, 1, 128)
        np.testing.assert_array_equal(floats, halves.astype(np.float32))
        back = np.zeros((32, 1, head.nbytes), np.uint8)
        kernel.append(floats, floats, blocks, offsets, back, head)
        again = reference.read(back, head)[0].reshape(512, 1, 128)
        np.testing.assert_array_equal(again, halves.astype(np.float64))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("exponent", range(-26, 18))
def test_rounding_to_halves(dtype: str, exponent: int) -> None:
    """Ties and their neighbours in every binade, as numpy and ml_dtypes round them."""
    mantissas = 1 + np.arange(0, 2**12) / 2**12
    numbers = (2.0**exponent * mantissas).astype(np.float32).reshape(32, 1, 128)
    numbers[1::2] *= -1
    head = HeadFormat(dtype, 128, 16)
    data = np.zeros((2, 1, head.nbytes), np.uint8)
    index = np.arange(32, dtype=np.int32)
    kernel.append(numbers, numbers, index // 16, index % 16, data, head)
    with np.errstate(over="ignore"):
        expected = numbers.astype(NUMBER_DTYPES[dtype]).astype(np.float64)
    np.testing.assert_array_equal(reference.read(data, head)[1].reshape(32, 1, 128), expected)


@pytest.mark.parametrize("num_threads", [2, 3, 8])
@pytest.mark.parametrize("lengths", [[100, 1, 1, 1, 77, 5, 300], [5000], [3] * 500], ids=["mixed", "one", "many"])
def test_threads_agree(num_threads: int, lengths: list[int]) -> None:
    make_case(1, group=2, lengths=lengths, dtype="float16").agree(num_threads=num_threads)


def test_several_python_threads_at_once() -> None:
    """Calls share nothing: two engines in one process attend at the same time."""
    cases = [make_case(seed, group=2, lengths=[300, 20 + seed, 100], dtype="float16") for seed in range(4)]
    expected = [case.attend(kernel) for case in cases]
    attention, failures = Attention(3), []

    def attend_often(case: Case, wanted: np.ndarray) -> None:
        for _ in range(100):
            work = attention.cut(case.positions, None, case.head.block_tokens)
            out = attention.attend(case.q, case.data, case.head, case.tables, work, case.rule)
            if not np.allclose(out, wanted, atol=TOLERANCE):
                failures.append(case)

    callers = [threading.Thread(target=attend_often, args=pair) for pair in zip(cases, expected, strict=True)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    attention.close()
    assert not failures


OUT_OF_BOUNDS = """
import numpy as np
from cpu_attention import AttentionRule, HeadFormat, kernel
from cpu_attention.state import State
from cpu_attention.work import cut_work
head = HeadFormat("float32", 16, 16)
data, one = np.zeros((2, 1, head.nbytes), np.uint8), np.ones((1, 1, 16), np.float32)
def attend(block):
    work, state = cut_work(np.zeros(1, np.int64), np.full(1, 5), 1, 16), State.empty(1, 1, 16)
    kernel.attend(one, data, head, np.array([[block]], np.int32), work, AttentionRule(1.0), state)
def append(block):
    kernel.append(one, one, np.array([block], np.int32), np.zeros(1, np.int32), data, head)
for call in (attend, append):
    call(1)
    try:
        call(3)
    except IndexError:
        continue
    raise SystemExit(f"{call.__name__} went beyond the store unseen")
"""


def test_bounds_checks_see_the_emitted_code(tmp_path: Path) -> None:
    """The intrinsics have none of their own, so this is what makes running the tests with them mean something."""
    out = subprocess.run(
        [sys.executable, "-c", OUT_OF_BOUNDS],
        env=os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert out.returncode == 0, out.stderr[-2000:]


TARGETS = {
    "generic": {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": ""},
    "avx2": {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"},
    "bounds": {"NUMBA_BOUNDSCHECK": "1"},
}


ALL_STORAGE = "parts_make or sums_and or test_append or rounding or half or halves or not_finite or store or worker"
SOME_STORAGE = "parts_make and (float16 or k8v4) and not bfloat16 or int4-float16 or prompt_then_decodes"


@pytest.mark.parametrize(
    "chosen", [SOME_STORAGE, pytest.param(ALL_STORAGE, marks=pytest.mark.slow)], ids=["some", "all"]
)
@pytest.mark.parametrize("target", TARGETS)
def test_other_targets(target: str, chosen: str, tmp_path: Path) -> None:
    """Tests of storage types, compiled for lesser processors (no F16C, no FMA, 128-bit vectors) and with numba's
    bounds checks, which are off otherwise; with these the store and the R-worker as well."""
    if target != "bounds" and platform.machine() != "x86_64":
        pytest.skip("names of x86 processors")
    tests = Path(__file__).parent
    names = ("kernel", "kvstore", "rworker") if target == "bounds" else ("kernel",)
    out = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen,
            *(["--noconftest"] if chosen == SOME_STORAGE else []),  # which would import torch
            *(tests / f"test_{name}.py" for name in names),
        ],
        env=os.environ | TARGETS[target] | {"NUMBA_CACHE_DIR": str(tmp_path)},
        cwd=tests.parent,
        capture_output=True,
        text=True,
        timeout=280,
    )  # fmt: skip
    assert out.returncode == 0 and " passed" in out.stdout, out.stdout[-3000:]
