"""The rest of a prompt whose beginning is on an R-worker: attend there, or fetch the beginning's K and V?

    python bench/prompt_rest.py                             beginnings of 1k to 16k tokens, rests of 16 to 512
    python bench/prompt_rest.py --json bench/results/prompt_rest.json

    on the R-worker   q of the rest ► attention over beginning and rest, one read for all its queries ► o
    fetched           K and V of the beginning ► copied once, contiguous ► attention on the S-worker's device
    kept              as fetched, but they were on the device already

Of one layer, with as many threads for either side, in turns; medians.  What a fetch costs is one copy of K and V, which
is the least that any link takes; a link to another machine or to a GPU is told by its own rate (--link).

The rule.  With a beginning of p tokens, a rest of m ≪ p, H query and H_kv KV heads (G = H / H_kv) of d numbers of s
bytes, attention takes 4·m·p·H·d FLOP on either side, at rates F_R and F_S, and a fetch takes 2·p·H_kv·d·s bytes over a
link of w bytes per second.  Fetching pays where

    2·p·H_kv·d·s / w  <  4·m·p·H·d · (1 / F_R − 1 / F_S)      that is from      m* = s·F_R / (2·G·w·(1 − F_R / F_S))

tokens on, however long the beginning is; never, if the R-workers multiply as fast as the device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from bench.attention import TORCH_DTYPES, Problem, Shape
from cpu_attention import available_cores, cpu_name
from cpu_attention.sharing import Tables
from gpu_sworker.device_attention import attend_tokens
from gpu_sworker.probe import AttentionSpec

BEGINNINGS, RESTS, GROUPS = (1024, 4096, 16384), (16, 64, 256, 512), (1, 4, 8)
PAUSE_S = 0.02  # threads of one side go on spinning for a while


def pays_from(group: int, r_worker_flops: float, device_flops: float, link: float, number_bytes: int) -> float | None:
    """m*, in tokens of the rest; None: never.  Rates in FLOP/s and bytes/s."""
    if r_worker_flops >= device_flops:
        return None
    return number_bytes * r_worker_flops / (2 * group * link * (1 - r_worker_flops / device_flops))


class Rest:
    """Beginnings and rests of one length, on both sides."""

    def __init__(self, group: int, begin: int, rest: int, args: argparse.Namespace) -> None:
        heads, dim, total = args.kv_heads * group, args.head_dim, begin + rest
        self.flops = 4.0 * rest * (begin + (rest + 1) / 2) * heads * dim
        problem = Problem(Shape(heads, args.kv_heads, dim, (total,)), args.dtype, 64, args.threads)
        self.problem, self.generator = problem, np.random.default_rng(0)
        tables = np.ascontiguousarray(np.repeat(problem.tables, rest, axis=0))
        shared = Tables(problem.tables, np.zeros(rest, np.int64))
        positions = np.arange(begin, total, dtype=np.int32)
        work = problem.attention.cut(positions, None, 64, np.full(rest, total, np.int64), shared)
        self.q = self.generator.standard_normal((rest, heads, dim), np.float32)
        self._remote = lambda: problem.attention.attend(self.q, problem.data, problem.head, tables, work, problem.rule)
        spec = AttentionSpec(heads, args.kv_heads, dim, problem.rule.scale, None, None, None)
        dtype = getattr(torch, args.dtype)
        q, (k, v) = torch.from_numpy(self.q).to(dtype), (torch.randn(total, args.kv_heads, dim).to(dtype) for _ in "kv")
        self._local = lambda: attend_tokens(q, k, v, spec)
        there = torch.randn(begin, 2 * args.kv_heads * dim).to(dtype)
        here = torch.empty_like(there)
        self._fetch = lambda: here.copy_(there)
        self.fetched_bytes = there.nbytes

    def measure(self, repeats: int) -> dict[str, float]:
        calls: dict[str, Callable[[], Any]] = {"r_worker": self._remote, "device": self._local, "fetch": self._fetch}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(repeats + 1):
            for name, call in calls.items():
                time.sleep(PAUSE_S)
                began = time.perf_counter()
                call()
                if turn:
                    seconds[name].append(time.perf_counter() - began)
        return {name: statistics.median(taken) for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beginnings", type=int, nargs="+", default=list(BEGINNINGS))
    parser.add_argument("--rests", type=int, nargs="+", default=list(RESTS))
    parser.add_argument("--groups", type=int, nargs="+", default=list(GROUPS), help="query heads to a KV head")
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=TORCH_DTYPES, default="float32")
    parser.add_argument("--threads", type=int, default=len(available_cores()))
    parser.add_argument("--link", type=float, help="bytes/s of another link, for the rule")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    number_bytes = 4 if args.dtype == "float32" else 2
    columns = "{:>3} {:>9} {:>6} {:>12} {:>9} {:>9} {:>17} {:>17} {:>12}"
    print(
        columns.format(
            "G", "beginning", "rest", "R-worker ms", "device", "fetch", "R-worker/fetched", "R-worker/kept", "pays from"
        )
    )
    results = []
    for group in args.groups:
        for begin in args.beginnings:
            for rest in args.rests:
                case = Rest(group, begin, rest, args)
                s = case.measure(args.repeats)
                rates = case.flops / s["r_worker"], case.flops / s["device"]
                link = args.link or case.fetched_bytes / s["fetch"]
                start = pays_from(group, *rates, link, number_bytes)
                results.append(
                    {
                        "group": group, "beginning": begin, "rest": rest, **s, "r_worker_flops": rates[0],
                        "device_flops": rates[1], "link_bytes_per_s": link, "pays_from": start,
                    }
                )  # fmt: skip
                print(
                    columns.format(
                        group, begin, rest, *(f"{1e3 * s[name]:.2f}" for name in ("r_worker", "device", "fetch")),
                        f"{s['r_worker'] / (s['device'] + s['fetch']):.2f}", f"{s['r_worker'] / s['device']:.2f}",
                        "never" if start is None else f"{start:.0f} tokens",
                    ),
                    flush=True,
                )  # fmt: skip
    if args.json:
        record = {"machine": {"processor": cpu_name()}, "arguments": vars(args), "results": results}
        Path(args.json).write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
