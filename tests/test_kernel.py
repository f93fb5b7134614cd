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

from cpu_attention import STORAGE_DTYPES, AttentionRule, kernel, reference
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


@pytest.mark.parametrize("dtype", STORAGE_DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("kv_heads, group", [(1, 1), (2, 1), (1, 7), (2, 4), (3, 8), (1, 16)])
def test_shapes(dtype: str, head_dim: int, kv_heads: int, group: int) -> None:
    """Lengths 1, block-1, block, block+1 and several blocks, in one call."""
    block = 16
    rule = AttentionRule(head_dim**-0.5)
    lengths = [1, block - 1, block, block + 1, 5 * block + 3]
    out, expected = both(
        random_case(
            head_dim,
            kv_heads=kv_heads,
            group=group,
            head_dim=head_dim,
            block=block,
            lengths=lengths,
            dtype=dtype,
            rule=rule,
        )
    )
    np.testing.assert_allclose(out, expected, atol=TOLERANCE, rtol=TOLERANCE)


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
    for kind, dtype in ((kernel._F16, np.dtype(np.float16)), (kernel._BF16, STORAGE_DTYPES["bfloat16"])):
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
    """The kernels' and the R-worker's tests again, compiled with numba's bounds checks, which are off otherwise."""
    tests = Path(__file__).parent
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not out_of_bounds",
         tests / "test_kernel.py", tests / "test_kvstore.py", tests / "test_rworker.py"],
        env=os.environ | {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}, cwd=tests.parent,
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert out.returncode == 0, out.stdout[-3000:]
