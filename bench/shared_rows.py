"""Attention of r rows over one read of K and V, r = 1, 2, 4, ..., 64, beside the roofs of this machine.

    python bench/shared_rows.py                                    G = 1, 8 KV heads, head_dim 128
    python bench/shared_rows.py --q-heads 32                       G = 4: r rows are 4 r query heads for each KV head
    python bench/shared_rows.py --json bench/results/shared_rows.json

Families of r sequences each begin with the same tokens, in shuffled blocks; each sequence has one token of its own
behind them, which is attended to as well.  Reading distinct bytes of K and V takes a time, multiplying takes another:
until r* = FMA rate / (FLOP per byte and row · read rate) rows are free, above it the multiply-adds bind.

One thread, and its processor time by its own clock, of the kernel as of both roofs, which run right before it in each
repeat: so others on the machine disturb less.  All r and storage types take turns; medians are shown.  What *alone*
is, each row reads for itself, as far as --alone rows.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numba
import numpy as np

from bench.attention import Problem, Shape
from cpu_attention import KV_DTYPES, available_cores, cpu_name, pin_thread
from cpu_attention.roofs import ThreadRoofs
from cpu_attention.sharing import Tables

ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 64)


@dataclass(frozen=True)
class Result:
    dtype: str
    group: int
    rows: int
    milliseconds: float  # median, like all that follows
    gb_per_s: float  # of distinct K and V
    of_read_roof: float
    gflop_per_s: float
    of_fma_roof: float
    of_binding_roof: float  # of the one that takes longer
    read_roof_gb_per_s: float
    fma_roof_gflop_per_s: float
    alone_over_jointly: float | None  # time of each row by itself over this


class Family(Problem):
    """Rows of several families over one store, which all r use."""

    def __init__(self, args: argparse.Namespace, dtype: str) -> None:
        most = max(args.rows)
        lengths = (args.tokens,) * args.families + (1,) * (args.families * most)
        super().__init__(Shape(args.q_heads, args.kv_heads, args.head_dim, lengths), dtype, args.block_tokens, 1)
        self.args = args
        self.prefixes, self.own = np.split(self.tables, [args.families])

    def call(self, rows: int, is_joint: bool) -> Callable[[], None]:
        args, block = self.args, self.head.block_tokens
        count = args.families * rows
        prefixes = np.repeat(self.prefixes, rows, axis=0)
        tables = np.ascontiguousarray(np.concatenate([prefixes, self.own[:count, :1]], axis=1))
        shared = Tables(tables, np.arange(count)) if is_joint else None
        work = self.attention.cut(np.full(count, args.tokens), None, block, shared=shared)
        q = np.random.default_rng(rows).standard_normal((count, args.q_heads, args.head_dim), np.float32)
        return lambda: self.keep(self.attention.attend(q, self.data, self.head, tables, work, self.rule))

    def keep(self, out: np.ndarray) -> None:
        self.out = out

    def num_bytes(self, rows: int) -> float:
        """Distinct ones; of a sequence's own token what a vector of tokens takes of K, and a row of V."""
        head, args = self.head, self.args
        token = head.nbytes / head.block_tokens
        own = 16 * (head.k.end - head.k.begin) / head.block_tokens + (head.v.end - head.v.begin) / head.block_tokens
        return args.families * args.kv_heads * (args.tokens * token + rows * own)

    def flops(self, rows: int) -> float:
        return 4.0 * self.args.families * rows * (self.args.tokens + 1) * self.args.q_heads * self.args.head_dim


def thread_seconds(call: Callable[[], None]) -> float:
    started = time.thread_time()
    call()
    return time.thread_time() - started


def measure(args: argparse.Namespace, dtype: str) -> list[Result]:
    roofs, family = ThreadRoofs(), Family(args, dtype)
    calls = {rows: family.call(rows, True) for rows in args.rows}
    alone = {rows: family.call(rows, False) for rows in args.rows if rows <= args.alone}
    for call in (*calls.values(), *alone.values()):
        call()  # compiles, touches
    samples: dict[int, list[tuple[float, float, float, float | None]]] = {rows: [] for rows in calls}
    for _ in range(args.repeats):
        for rows, call in calls.items():
            read, fma = roofs.read_bandwidth(), roofs.fma_rate()
            seconds = thread_seconds(call)
            samples[rows].append((seconds, read, fma, thread_seconds(alone[rows]) / seconds if rows in alone else None))
    results = []
    for rows, taken in samples.items():
        num_bytes, flops = family.num_bytes(rows), family.flops(rows)
        results.append(
            Result(
                dtype, args.q_heads // args.kv_heads, rows,
                1e3 * statistics.median(s for s, *_ in taken),
                statistics.median(num_bytes / s for s, *_ in taken) / 1e9,
                statistics.median(num_bytes / s / read for s, read, *_ in taken),
                statistics.median(flops / s for s, *_ in taken) / 1e9,
                statistics.median(flops / s / fma for s, _, fma, _ in taken),
                statistics.median(max(num_bytes / read, flops / fma) / s for s, read, fma, _ in taken),
                statistics.median(read for _, read, *_ in taken) / 1e9,
                statistics.median(fma for *_, fma, _ in taken) / 1e9,
                statistics.median(ratio for *_, ratio in taken if ratio is not None) if rows in alone else None,
            )
        )  # fmt: skip
    return results


COLUMNS = "{:9} {:>3} {:>4} {:>8} {:>7} {:>8} {:>8} {:>8} {:>8} {:>7}"


def show(results: list[Result]) -> None:
    for r in results:
        print(
            COLUMNS.format(
                r.dtype, r.group, r.rows, f"{r.milliseconds:.2f}", f"{r.gb_per_s:.2f}", f"{100 * r.of_read_roof:.0f} %",
                f"{r.gflop_per_s:.1f}", f"{100 * r.of_fma_roof:.0f} %", f"{100 * r.of_binding_roof:.0f} %",
                "" if r.alone_over_jointly is None else f"{r.alone_over_jointly:.2f} x",
            ),
            flush=True,
        )  # fmt: skip
    read = statistics.median(r.read_roof_gb_per_s for r in results)
    fma = statistics.median(r.fma_roof_gflop_per_s for r in results)
    free = fma / (results[-1].gflop_per_s / results[-1].gb_per_s / results[-1].rows * read)
    print(f"    roofs: read {read:.1f} GB/s, multiply-add {fma:.0f} GFLOP/s; r* = {free:.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--families", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096, help="that a family has in common")
    parser.add_argument("--q-heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", nargs="+", choices=list(KV_DTYPES), default=list(KV_DTYPES))
    parser.add_argument("--block-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--alone", type=int, default=8, help="most rows that are also timed each by itself")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    cores = available_cores()
    pin_thread(cores[0])
    print(COLUMNS.format("dtype", "G", "r", "ms", "GB/s", "of read", "GFLOP/s", "of FMA", "of roof", "alone"))
    results: list[Result] = []
    for dtype in args.dtype:
        measured = measure(args, dtype)
        show(measured)
        results += measured
    if args.json:
        machine = {
            "processor": cpu_name(), "cores": len(cores), "python": platform.python_version(),
            "numba": numba.__version__, "numpy": np.__version__,
        }  # fmt: skip
        record = {"machine": machine, "arguments": vars(args), "results": [asdict(result) for result in results]}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
