"""Decode attention over paged KV: bytes per second beside the roof of this machine, measured in the same run.

    python bench/attention.py                                     16 x 1024 tokens, head_dim 128, G = 1, 4, 8
    python bench/attention.py --lengths 65536 --threads 2         one long sequence
    python bench/attention.py --q-heads 32 --kv-heads 8 --dtype float16 --json out.json

Decode attention reads every K and V once, so its roof is the streaming read bandwidth; with G query heads per
KV head it also does 4·G FLOP per K-V pair of numbers, so at high G the FMA units may bind first.  Kernel, roof
and peers take turns inside each repeat, because machines drift; medians of the repeats are printed.  Errors are
against the plain reference in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
# torch's OpenMP threads go on spinning after a call, which would slow whatever is measured next.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from cpu_attention import STORAGE_DTYPES, AttentionRule, available_cores, cpu_name, kernel, reference
from cpu_attention.bandwidth import ReadBandwidth
from cpu_attention.threads import ThreadedAttend

SHAPES = {1: (32, 32), 4: (32, 8), 8: (64, 8)}  # G -> (query heads, KV heads), when none are given


@dataclass(frozen=True)
class Shape:
    q_heads: int
    kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]  # KV tokens of each sequence
    dtype: str
    block_tokens: int

    @property
    def kv_bytes(self) -> int:
        """What one attention call has to read."""
        return 2 * sum(self.lengths) * self.kv_heads * self.head_dim * STORAGE_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Result:
    shape: Shape
    threads: int
    what: str
    seconds: float  # median
    gb_per_s: float  # of K and V
    percent_of_roof: float
    tokens_per_s: float  # sequences per call and layer
    max_abs_error: float | None


@dataclass(frozen=True)
class Problem:
    """Random K and V in shuffled blocks, a query per sequence."""

    q: np.ndarray
    k_blocks: np.ndarray
    v_blocks: np.ndarray
    tables: np.ndarray
    positions: np.ndarray
    rule: AttentionRule


def make_problem(shape: Shape) -> Problem:
    generator = np.random.default_rng(0)
    storage, block = STORAGE_DTYPES[shape.dtype], shape.block_tokens
    counts = [-(-length // block) for length in shape.lengths]
    num_blocks = sum(counts)

    def numbers(*axes: int) -> np.ndarray:
        return generator.standard_normal(axes, dtype=np.float32).astype(storage)

    order = generator.permutation(num_blocks).astype(np.int32)
    tables = np.zeros((len(counts), max(counts)), np.int32)
    for row, count in enumerate(counts):
        tables[row, :count], order = order[:count], order[count:]
    return Problem(
        q=generator.standard_normal((len(counts), shape.q_heads, shape.head_dim), dtype=np.float32),
        k_blocks=numbers(num_blocks, shape.kv_heads, shape.head_dim, block),
        v_blocks=numbers(num_blocks, shape.kv_heads, block, shape.head_dim),
        tables=tables,
        positions=np.array(shape.lengths, np.int32) - 1,
        rule=AttentionRule(shape.head_dim**-0.5),
    )


def kernel_call(problem: Problem, threads: int) -> tuple[Callable[[], None], np.ndarray]:
    out, attend = np.empty_like(problem.q), ThreadedAttend(kernel.attend, threads)
    p = problem
    return lambda: attend(p.q, p.k_blocks, p.v_blocks, p.tables, p.positions, p.rule, out), out


def sdpa_call(problem: Problem, shape: Shape, threads: int) -> Callable[[], None] | None:
    """torch's own attention over the same numbers, contiguous and padded to the longest: equal lengths only."""
    if len(set(shape.lengths)) > 1:
        return None
    import torch

    torch.set_num_threads(threads)
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[shape.dtype]
    keys, values = (
        torch.randn(len(shape.lengths), shape.kv_heads, shape.lengths[0], shape.head_dim).to(dtype) for _ in "kv"
    )
    q = torch.from_numpy(problem.q)[:, :, None].to(dtype)
    attention = torch.nn.functional.scaled_dot_product_attention

    def call() -> None:
        with torch.inference_mode():
            attention(q, keys, values, enable_gqa=shape.q_heads != shape.kv_heads)

    return call


def timed(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(shape: Shape, threads: int, repeats: int, with_sdpa: bool) -> list[Result]:
    problem = make_problem(shape)
    call, out = kernel_call(problem, threads)
    roof = ReadBandwidth(threads)
    calls = {"kernel": call}
    if with_sdpa and (sdpa := sdpa_call(problem, shape, threads)):
        calls["torch SDPA"] = sdpa
    for warm_up in calls.values():
        warm_up()
    roofs, seconds = [], {name: [] for name in calls}
    for _ in range(repeats):
        roofs.append(roof.measure())
        for name, timed_call in calls.items():
            seconds[name].append(timed(timed_call))
    expected = np.empty_like(problem.q)
    p = problem
    reference.attend(p.q, p.k_blocks, p.v_blocks, p.tables, p.positions, p.rule, expected)
    results = []
    for name, taken in seconds.items():
        median = statistics.median(taken)
        rate = shape.kv_bytes / median
        error = float(np.abs(out - expected).max()) if name == "kernel" else None
        percent = 100 * rate / statistics.median(roofs)
        results.append(Result(shape, threads, name, median, rate / 1e9, percent, len(shape.lengths) / median, error))
    roof_row = Result(shape, threads, "streaming read", 0.0, statistics.median(roofs) / 1e9, 100.0, 0.0, None)
    return [roof_row, *results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024] * 16, help="KV tokens of each sequence")
    parser.add_argument("--q-heads", type=int, help="with --kv-heads: one shape instead of G = 1, 4, 8")
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument(
        "--dtype", nargs="+", choices=sorted(STORAGE_DTYPES), default=["float32", "float16", "bfloat16"]
    )
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, len(available_cores())}))
    parser.add_argument("--block-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-sdpa", action="store_true", help="leave torch's attention out (it is slow in bf16)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if (args.q_heads is None) != (args.kv_heads is None):
        parser.error("--q-heads and --kv-heads go together")
    heads = [(args.q_heads, args.kv_heads)] if args.q_heads else list(SHAPES.values())
    results = []
    header = ("G", "dtype", "threads", "what", "GB/s", "% of roof", "tokens/s", "max error")
    print("{:>3} {:9} {:>7}  {:15} {:>7} {:>9} {:>10} {:>10}".format(*header))
    for q_heads, kv_heads in heads:
        for dtype in args.dtype:
            for threads in args.threads:
                shape = Shape(q_heads, kv_heads, args.head_dim, tuple(args.lengths), dtype, args.block_tokens)
                for r in measure(shape, threads, args.repeats, not args.no_sdpa):
                    error = "" if r.max_abs_error is None else f"{r.max_abs_error:.1e}"
                    tokens = f"{r.tokens_per_s:.0f}" if r.seconds else ""
                    print(
                        f"{q_heads // kv_heads:>3} {dtype:9} {threads:>7}  {r.what:15} {r.gb_per_s:7.1f} "
                        f"{r.percent_of_roof:9.1f} {tokens:>10} {error:>10}",
                        flush=True,
                    )
                    results.append(asdict(r))
    if args.json:
        machine = {"processor": cpu_name(), "cores": len(available_cores())}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
