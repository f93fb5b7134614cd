"""One query each of many sequences over a paged store: against attention of each sequence alone, and the Triton kernel
against that.

There is no device here that Triton compiles for.  Its interpreter runs the kernel, in a process of its own, because
a kernel is for one or the other from its import on; and the compiler compiles it for devices that are not there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from gpu_sworker import AttentionSpec, DeviceKV, PartialState, attend_tokens_plainly
from gpu_sworker import paged_attention as paged
from gpu_sworker.device_kv import token_bytes
from gpu_sworker.paged_attention import PagedAttention, attend_paged_plainly, paged_kernel

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

# (num_kv_heads, group, head_dim), window, soft cap
HEADS = [(2, 1, 64), (2, 4, 80), (1, 8, 128), (3, 3, 37)]
RULES = [(None, None), (None, 5.0), (1, None), (50, None), (50, 5.0), (10_000, None)]
LAYERS = tuple(
    AttentionSpec(num_kv_heads * group, num_kv_heads, head_dim, head_dim**-0.5, window, softcap, None)
    for (num_kv_heads, group, head_dim), (window, softcap) in zip(HEADS, RULES[:4], strict=True)
)


class Paged:
    """Sequences of these lengths in shuffled blocks; what is not theirs is NaN."""

    def __init__(
        self, lengths: list[int], spec: AttentionSpec, dtype: torch.dtype, block_tokens: int = 16, seed: int = 0
    ) -> None:
        generator, self.spec = torch.Generator().manual_seed(seed), spec
        counts = [-(-length // block_tokens) for length in lengths]
        shuffled = torch.randperm(sum(counts) + 3, generator=generator).to(torch.int32)
        self.q = torch.randn(len(lengths), spec.num_q_heads, spec.head_dim, generator=generator).to(dtype)
        self.data = torch.full((2, len(shuffled), block_tokens, spec.num_kv_heads, spec.head_dim), torch.nan).to(dtype)
        self.tables = torch.zeros((len(lengths), max(counts) + 1), dtype=torch.int32)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.sequences = []  # [K or V, num_tokens, num_kv_heads, head_dim] each
        slots = self.data.flatten(1, 2)
        for row, (length, blocks) in enumerate(zip(lengths, shuffled.split([*counts, 3]), strict=False)):
            self.tables[row, : len(blocks)] = blocks
            tokens = torch.randn(2, length, spec.num_kv_heads, spec.head_dim, generator=generator).to(dtype)
            own = (blocks[:, None] * block_tokens + torch.arange(block_tokens)).flatten()[:length]
            slots[:, own] = tokens
            self.sequences.append(tokens)

    def attend(self, attend: PagedAttention) -> PartialState:
        return attend(self.q, self.data, self.tables, self.lengths, self.spec)

    def expected(self) -> PartialState:
        """Of each sequence alone."""
        pairs = zip(self.q.split(1), self.sequences, strict=True)
        states = [attend_tokens_plainly(q, keys, values, self.spec) for q, (keys, values) in pairs]
        return PartialState(torch.cat([state.o for state in states]), torch.cat([state.lse for state in states]))


def assert_equal(state: PartialState, expected: PartialState) -> None:
    assert state.o.dtype == expected.o.dtype and state.lse.dtype == expected.lse.dtype
    tolerance = TOLERANCE[state.o.dtype]
    torch.testing.assert_close(state.o, expected.o, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(state.lse, expected.lse, atol=tolerance, rtol=tolerance)


def make_spec(heads: tuple[int, int, int], window: int | None, softcap: float | None) -> AttentionSpec:
    num_kv_heads, group, head_dim = heads
    scale = head_dim**-0.5 if softcap is None else 1.0  # scores that a cap cuts
    return AttentionSpec(num_kv_heads * group, num_kv_heads, head_dim, scale, window, softcap, (9.0,) * 8)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window, softcap", RULES)
@pytest.mark.parametrize("heads", HEADS)
def test_attention_is_that_of_each_sequence(
    heads: tuple[int, int, int], window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    generator = np.random.default_rng(heads[2])
    lengths = [1, *generator.integers(1, 120, 3).tolist(), 64]
    case = Paged(lengths, make_spec(heads, window, softcap), dtype, block_tokens=int(generator.integers(1, 40)))
    assert_equal(case.attend(attend_paged_plainly), case.expected())


@pytest.mark.parametrize("window", [None, 5])
def test_over_no_keys(window: int | None) -> None:
    check_no_keys(attend_paged_plainly, window)


def check_no_keys(attend: PagedAttention, window: int | None) -> None:
    case = Paged([0, 3], make_spec((1, 2, 16), window, None), torch.float32)
    state = case.attend(attend)
    assert not state.o[0].any() and (state.lse[0] == -torch.inf).all()
    assert state.o[1].all() and state.lse[1].isfinite().all()


def test_the_store_attends_to_decodes_in_one_call() -> None:
    check_store(attend_paged_plainly)


def check_store(attend: PagedAttention) -> None:
    """Sequences that grew beside one another, and so in blocks among one another; one is a fork, one has a prompt."""
    budget = 40 * 8 * token_bytes(LAYERS, torch.float32)
    store = DeviceKV(LAYERS, dtype=torch.float32, device=CPU, budget_bytes=budget, block_tokens=8)
    for seq_id in range(5):
        store.admit(seq_id, 80)
    for counts in ({0: 5, 1: 30}, {2: 9, 0: 11}, {3: 1, 1: 40}):
        store.extend(counts)
        write(store, counts)
    store.fork([4], [1], [20])
    store.extend({4: 3})
    write(store, {4: 3})
    for queries, is_one_call in (([1, 1, 1, 1, 1], True), ([0, 1, 0, 1, 0], True), ([1, 2, 1, 1, 1], False),
                                 ([0, 1, 0, 0, 0], False), ([0, 2, 0, 0, 0], False)):  # fmt: skip
        rows = store.rows(range(5), [0] * 5, queries)
        for layer, spec in enumerate(LAYERS):
            generator = torch.Generator().manual_seed(layer)
            q = torch.randn(sum(queries), spec.num_q_heads, spec.head_dim, generator=generator)
            expected = store.attend(layer, rows, q)
            counted = mock.Mock(side_effect=attend)
            with mock.patch("gpu_sworker.device_kv.paged_kernel", lambda *_, kernel=counted: kernel):
                assert_equal(store.attend(layer, rows, q), expected)
            assert counted.call_count == is_one_call


def write(store: DeviceKV, counts: dict[int, int]) -> None:
    rows = store.rows(list(counts), list(counts.values()), [0] * len(counts))
    for layer, spec in enumerate(LAYERS):
        store.write(layer, rows, *torch.randn(2, rows.num_tokens, spec.num_kv_heads, spec.head_dim))


def test_there_is_no_kernel_for_processors_and_odd_kinds() -> None:
    spec = make_spec((1, 2, 16), None, None)
    assert paged_kernel(CPU, torch.float32, spec) is None
    for dtype, heads in ((torch.float64, (1, 2, 16)), (torch.float32, (1, 2, 512)), (torch.float32, (1, 128, 16))):
        with mock.patch.object(paged, "attend_by_kernel", attend_paged_plainly):
            assert paged_kernel(torch.device("cuda"), dtype, make_spec(heads, None, None)) is None


def test_a_kernel_that_is_wrong_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    def wrong(*arguments: torch.Tensor) -> PartialState:
        state = attend_paged_plainly(*arguments)
        return PartialState(state.o, state.lse + 1)

    def missing(*_: object) -> PartialState:
        raise RuntimeError("no C compiler")

    def is_right(kernel: Callable[..., PartialState]) -> bool:
        with mock.patch.object(paged, "attend_by_kernel", kernel):
            return paged._is_right.__wrapped__(CPU, torch.float32, 2, 2, 24, True)

    assert is_right(attend_paged_plainly)
    assert not is_right(wrong) and "gives other numbers" in caplog.text
    assert not is_right(missing) and "no C compiler" in caplog.text


@needs_triton
def test_the_kernel_in_the_interpreter(tmp_path: Path) -> None:
    code = "import sys; sys.path[:0] = ['.', 'tests']; import test_paged_attention; test_paged_attention.check_kernel()"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("all equal\n")


def check_kernel() -> None:
    """Where TRITON_INTERPRET is 1."""
    from gpu_sworker import paged_kernel as kernel  # not without Triton

    lengths = [1, 2, 37, 64, 300]
    with mock.patch.object(kernel, "_PART_TOKENS", 64):
        for dtype, heads, (window, softcap) in product(kernel._DTYPES, HEADS, RULES):
            print(dtype, heads, window, softcap, flush=True)  # the last one is the one that failed
            case = Paged(lengths, make_spec(heads, window, softcap), dtype)
            assert_equal(case.attend(kernel.attend_by_kernel), case.attend(attend_paged_plainly))
        print("no keys")
        check_no_keys(kernel.attend_by_kernel, None)
        check_no_keys(kernel.attend_by_kernel, 5)
    print("the store")
    check_store(kernel.attend_by_kernel)
    print("parts: one, fewer than wanted, one more or less")
    for part_tokens, max_parts in ((512, 64), (16, 3), (299, 64), (300, 64), (301, 64)):
        with mock.patch.multiple(kernel, _PART_TOKENS=part_tokens, _MAX_PARTS=max_parts):
            for window in (None, 100):
                case = Paged(lengths, make_spec((1, 2, 64), window, None), torch.float32, block_tokens=7)
                assert_equal(case.attend(kernel.attend_by_kernel), case.expected())
    print("alone and beside others, to the bit")
    case = Paged([700, 1300], make_spec((1, 2, 64), None, None), torch.float16)
    both = case.attend(kernel.attend_by_kernel)
    case.q, case.tables, case.lengths = case.q[:1], case.tables[:1, :44].contiguous(), case.lengths[:1]
    alone = case.attend(kernel.attend_by_kernel)
    assert torch.equal(alone.o, both.o[:1]) and torch.equal(alone.lse, both.lse[:1])
    print("the trial before use")
    assert all(paged._is_right(CPU, dtype, 2, 2, 64, True) for dtype in kernel._DTYPES)
    print("all equal")


@needs_triton
@pytest.mark.parametrize("dtype, head_dim, group, is_capped", [("bf16", 128, 4, False), ("fp16", 80, 1, True),
                                                               ("fp32", 256, 8, False)])  # fmt: skip
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles(
    capability: int, dtype: str, head_dim: int, group: int, is_capped: bool,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The interpreter looks at no types and at no limits of shared memory."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from gpu_sworker import paged_kernel as kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    q_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    padded = 1 << (head_dim - 1).bit_length()
    common = {"HEAD_DIM": head_dim, "PADDED_HEAD_DIM": padded, "PART_TOKENS": 512, "MAX_PARTS": 64}
    types = {"q": dtype, "keys": dtype, "values": dtype, "tables": "i32", "lengths": "i32", "o": "fp32", "lse": "fp32",
             "merged_o": dtype, "merged_lse": "fp32", "scale": float, "softcap": float}  # fmt: skip
    of_part = {"NUM_KV_HEADS": 8, "GROUP": group, "PADDED_GROUP": 16, "BLOCK_TOKENS": 64,
               "TILE": kernel._TILE_BYTES // (padded * q_dtype.itemsize), "MULTIPLIED": kernel._multiplied(q_dtype),
               "IS_CAPPED": is_capped}  # fmt: skip
    of_merge = {"NUM_Q_HEADS": 8, "PADDED_PARTS": 64}
    for function, own in ((kernel._attend_part, of_part), (kernel._merge_parts, of_merge)):
        constants = {**common, **own}
        signature, aligned = {}, {}
        for place, name in enumerate(function.arg_names):
            if name in constants:
                signature[name] = "constexpr"
            elif name in types and types[name] is not float:
                signature[name], aligned[(place,)] = f"*{types[name]}", [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if name in types else "i32"
        source = ASTSource(function, signature, constants, aligned)
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 2})
        assert compiled.asm["cubin"] and compiled.metadata.shared <= 99 << 10
