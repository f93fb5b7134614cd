"""The numba kernels against the plain ones, over shapes, storage types and rules."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpu_attention import STORAGE_DTYPES, AttentionRule, kernel, reference, vector
from cpu_attention.threads import ThreadedAttend, share_rows

# Against float64; the online softmax in fp32 stays well inside it on standard normal K and V.
TOLERANCE = 5e-6


def random_case(
    seed: int,
    *,
    kv_heads: int,
    group: int,
    head_dim: int,
    block: int,
    lengths: list[int],
    dtype: str,
    rule: AttentionRule,
) -> tuple[np.ndarray, ...]:
    """Arguments of `attend` without `out`: sequences in shuffled blocks, whose unused places hold rubbish."""
    generator = np.random.default_rng(seed)
    storage = STORAGE_DTYPES[dtype]
    blocks_each = [-(-length // block) for length in lengths]
    num_blocks = sum(blocks_each) + 2
    shape = (num_blocks, kv_heads, head_dim, block)
    k_blocks = generator.standard_normal(shape).astype(storage)
    v_blocks = generator.standard_normal((num_blocks, kv_heads, block, head_dim)).astype(storage)
    order = generator.permutation(num_blocks).astype(np.int32)
    tables = np.zeros((len(lengths), max(blocks_each)), np.int32)
    for row, count in enumerate(blocks_each):
        tables[row, :count], order = order[:count], order[count:]
    q = generator.standard_normal((len(lengths), kv_heads * group, head_dim)).astype(np.float32)
    positions = np.array(lengths, np.int32) - 1
    return q, k_blocks, v_blocks, tables, positions, rule


def both(arguments: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
    outs = np.empty_like(arguments[0]), np.empty_like(arguments[0])
    kernel.attend(*arguments, outs[0])
    reference.attend(*arguments, outs[1])
    return outs


# Every head_dim and every group at least once; each is a compilation of its own.
HEADS = [
    (64, 2, 4), (80, 1, 1), (96, 2, 1), (112, 1, 2), (128, 3, 8), (128, 1, 7), (192, 1, 3), (256, 2, 2), (64, 1, 16),
]  # fmt: skip


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("head_dim, kv_heads, group", HEADS)
def test_shapes(dtype: str, head_dim: int, kv_heads: int, group: int) -> None:
    """Lengths 1, block-1, block, block+1 and several blocks, in one call; plain, with a window, with sinks."""
    block = 16
    sinks = np.random.default_rng(0).normal(0, 2, kv_heads * group).astype(np.float32)
    for rule in (
        AttentionRule(head_dim**-0.5),
        AttentionRule(0.1, window=21),
        AttentionRule(0.1, window=3, sinks=sinks),
    ):
        arguments = random_case(
            head_dim, kv_heads=kv_heads, group=group, head_dim=head_dim, block=block,
            lengths=[1, block - 1, block, block + 1, 5 * block + 3], dtype=dtype, rule=rule,
        )  # fmt: skip
        out, expected = both(arguments)
        np.testing.assert_allclose(out, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("block", [32, 64])
def test_vector_code_over_whole_blocks(dtype: str, block: int) -> None:
    """The blocks that are used; lengths around their borders."""
    lengths = [1, block - 1, block, block + 1, 3 * block, 300]
    arguments = random_case(
        1, kv_heads=2, group=3, head_dim=64, block=block, lengths=lengths, dtype=dtype, rule=AttentionRule(0.125)
    )
    assert vector.can_vectorise(kernel._STORAGE[dtype][0], 3, 64, block) or dtype == "float16"
    out, expected = both(arguments)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_what_lies_beyond_a_sequence_is_never_read() -> None:
    """The unused places of its last block hold whatever an earlier sequence left, NaN too."""
    q, k, v, tables, positions, rule = random_case(
        2, kv_heads=1, group=4, head_dim=64, block=32, lengths=[5, 40], dtype="float32", rule=AttentionRule(0.125)
    )
    for block, used in ((tables[0, 0], 5), (tables[1, 1], 8)):
        k[block, :, :, used:] = v[block, :, used:] = np.nan
    out, expected = both((q, k, v, tables, positions, rule))
    np.testing.assert_allclose(out, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_the_exponential() -> None:
    """Against float64 over the whole range, through the kernel: two keys, one of which weighs e^-x beside 1."""
    x = np.linspace(0, 80, 4001, dtype=np.float32)
    q = np.zeros((len(x), 1, 16), np.float32)
    q[:, 0, 0] = -x
    k, v = np.zeros((1, 1, 16, 16), np.float32), np.zeros((1, 1, 16, 16), np.float32)
    k[0, 0, 0, 1] = v[0, 0, 1, 0] = 1  # scores 0 and -x; value 1 for the second
    out = np.empty_like(q)
    tables, positions = np.zeros((len(x), 1), np.int32), np.ones(len(x), np.int32)
    kernel.attend(q, k, v, tables, positions, AttentionRule(1.0), out)
    weight = np.exp(-x.astype(np.float64))
    np.testing.assert_allclose(out[:, 0, 0], weight / (1 + weight), rtol=5e-7)


def test_without_vectors_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The portable loops serve the same shapes where the machine has no vectors for them."""
    arguments = random_case(
        3, kv_heads=2, group=4, head_dim=64, block=32, lengths=[70, 1], dtype="float16", rule=AttentionRule(0.125)
    )
    out = both(arguments)[0]
    monkeypatch.setattr(kernel, "can_vectorise", lambda *shape: False)
    np.testing.assert_allclose(both(arguments)[0], out, atol=TOLERANCE, rtol=TOLERANCE)


@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**31),
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 8),
    head_dim=st.integers(1, 40),
    block=st.integers(1, 40),
    lengths=st.lists(st.integers(1, 130), min_size=1, max_size=5),
    dtype=st.sampled_from(sorted(STORAGE_DTYPES)),
    window=st.none() | st.integers(1, 140),
    softcap=st.none() | st.floats(0.5, 50),
    has_sinks=st.booleans(),
    scale=st.floats(-2, 2),
)
def test_any_shape_and_rule(
    seed: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    block: int,
    lengths: list[int],
    dtype: str,
    window: int | None,
    softcap: float | None,
    has_sinks: bool,
    scale: float,
) -> None:
    sinks = np.random.default_rng(seed).normal(0, 3, kv_heads * group).astype(np.float32) if has_sinks else None
    out, expected = both(
        random_case(
            seed,
            kv_heads=kv_heads,
            group=group,
            head_dim=head_dim,
            block=block,
            lengths=lengths,
            dtype=dtype,
            rule=AttentionRule(scale, window, softcap, sinks),
        )
    )
    # Scores reach |scale|·|q||k|, and fp32 rounds them before the exponential.
    np.testing.assert_allclose(out, expected, atol=2e-4, rtol=1e-4)


def test_large_scores_do_not_overflow() -> None:
    arguments = random_case(
        3, kv_heads=1, group=2, head_dim=64, block=16, lengths=[40, 3], dtype="float32", rule=AttentionRule(50.0)
    )
    out, expected = both(arguments)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out, expected, atol=2e-3)


def test_every_half_is_widened_exactly() -> None:
    """All 65,536 of them, subnormals, infinities and NaN included."""
    bits = np.arange(65536, dtype=np.uint16)[None]
    for kind, dtype in ((vector.F16, np.dtype(np.float16)), (vector.BF16, STORAGE_DTYPES["bfloat16"])):
        tile = np.empty(bits.shape, np.float32)
        kernel._widen(bits, kind, tile, tile.view(np.uint32))
        np.testing.assert_array_equal(tile, bits.view(dtype).astype(np.float32))


@pytest.mark.parametrize("wire", STORAGE_DTYPES)
@pytest.mark.parametrize("storage", STORAGE_DTYPES)
def test_append(wire: str, storage: str) -> None:
    generator = np.random.default_rng(0)
    k, v = (generator.standard_normal((7, 2, 24)).astype(STORAGE_DTYPES[wire]) for _ in range(2))
    k.setflags(write=False)  # as it comes from a frame
    blocks = np.array([3, 3, 3, 0, 0, 1, 1], np.int32)
    offsets = np.array([5, 6, 7, 0, 1, 0, 7], np.int32)
    stores = []
    for implementation in (kernel, reference):
        k_blocks = np.zeros((4, 2, 24, 8), STORAGE_DTYPES[storage])
        v_blocks = np.zeros((4, 2, 8, 24), STORAGE_DTYPES[storage])
        implementation.append(k, v, blocks, offsets, k_blocks, v_blocks)
        stores.append((k_blocks.tobytes(), v_blocks.tobytes()))
    assert stores[0] == stores[1]


@pytest.mark.parametrize("num_threads", [1, 2, 3, 8])
def test_threads_change_nothing(num_threads: int) -> None:
    arguments = random_case(
        1,
        kv_heads=2,
        group=2,
        head_dim=64,
        block=16,
        lengths=[100, 1, 1, 1, 77, 5, 300],
        dtype="float16",
        rule=AttentionRule(0.125),
    )
    outs = [np.empty_like(arguments[0]) for _ in range(2)]
    threaded = ThreadedAttend(kernel.attend, num_threads)
    threaded(*arguments, outs[0])
    threaded.close()
    kernel.attend(*arguments, outs[1])
    assert np.array_equal(*outs)


@given(st.lists(st.integers(1, 1000), max_size=50), st.integers(1, 9))
def test_share_rows(lengths: list[int], num_shares: int) -> None:
    """Contiguous, complete, and no share over its part by more than the longest row."""
    cuts = share_rows(np.array(lengths, np.int64), num_shares)
    assert cuts == sorted(cuts) and cuts[0] == 0 and cuts[-1] == len(lengths) and len(cuts) == num_shares + 1
    for begin, end in itertools.pairwise(cuts):
        assert sum(lengths[begin:end]) <= sum(lengths) / num_shares + max(lengths, default=0)


def test_window_reads_only_the_window() -> None:
    """Keys before it may be anything, NaN too."""
    q, k, v, tables, positions, rule = random_case(
        5, kv_heads=1, group=1, head_dim=16, block=8, lengths=[64], dtype="float32", rule=AttentionRule(0.25, window=8)
    )
    expected = both((q, k, v, tables, positions, rule))[1]
    k[tables[0, 0]] = v[tables[0, 0]] = np.nan
    out = np.empty_like(q)
    kernel.attend(q, k, v, tables, positions, replace(rule), out)
    np.testing.assert_allclose(out, expected, atol=TOLERANCE)


def test_nothing_is_out_of_bounds(tmp_path: Path) -> None:
    """The tests of portable kernels, store and R-worker again, compiled with numba's bounds checks, off otherwise."""
    tests = Path(__file__).parent
    files = [tests / f"test_{name}.py" for name in ("kernel", "kvstore", "rworker")]
    chosen = "not out_of_bounds and not test_shapes and not whole_blocks"  # vector code has no checks to switch on
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files],
        env=os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)},
        cwd=tests.parent,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert out.returncode == 0, out.stdout[-3000:]
