"""The neighbours' published figures from this project's scheduler, in virtual time.

    python bench/paper_figures.py [--out bench/results/paper_figures.json] [--plot docs.png]

Load stabilising (He & Zhai, figures 11 and 12): 1024 sequences on an A10 and eight Epyc sockets, all at once against
a stream, in steps' milliseconds.  SplitFuse (DeepSpeed-FastGen, figures 4 and 5): OPT-66B on four A100 by DistServe's
published fit, closed loop, prompts of about 2600 tokens; chunks of 768 tokens against whole prompts first.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastdecode.modelling.simulation.cost import PROFILES
from fastdecode.modelling.simulation.latency import effective_throughput, inter_token_gaps
from fastdecode.modelling.simulation.simulator import Simulation, simulate
from fastdecode.modelling.simulation.workload import Arrivals, Job, make_jobs
from fastdecode.observe.plots import plot_steps
from fastdecode.scheduling.config import SchedulerConfig
from fastdecode.scheduling.predictor import MaxTokens
from fastdecode.scheduling.scheduler import Scheduler

SEQUENCES = 1024  # B


@dataclass(frozen=True)
class Published:
    """Milliseconds of a step, read off the figures."""

    profile: str
    length: int  # S
    start: float  # all at once: the first steps
    peak: float  # the last one
    mean: float
    steady: float  # with load stabilising


FIGURES = (
    Published("a10-8xepyc-llama-7b", 1024, 310, 622, 411, 414),
    Published("a10-8xepyc-llama-13b", 1024, 563, 897, 671, 638),
    Published("a10-8xepyc-llama-7b", 768, 309, 493, 360, 373),
)


def run_starts(figure: Published, start_policy: str, fillings: float = 3.0) -> Simulation:
    """`fillings` batches of sequences of equal length; F = S/16, as far as the figures tell."""
    length, interval = figure.length, figure.length // 16
    count = SEQUENCES if start_policy == "at-once" else int(fillings * SEQUENCES)
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=SEQUENCES,
            max_num_batched_tokens=4096,
            num_lanes=2,
            block_tokens=16,
            capacity_blocks=(2 * SEQUENCES * length // 8 // 16,) * 8,
            start_policy=start_policy,
            start_interval=interval,
            max_kv_load=SEQUENCES * (length + interval) // 2 if start_policy == "steady" else None,
        ),
        MaxTokens(),
    )
    jobs = [Job(1, length, length)] * count
    return simulate(scheduler, jobs, Arrivals((0.0,) * count), PROFILES[figure.profile], 8)


def load_stabilising(figure: Published, fillings: float = 3.0) -> tuple[dict[str, float], dict[str, Simulation]]:
    """The same numbers as published, simulated; and the steps they come from."""
    runs = {policy: run_starts(figure, policy, fillings) for policy in ("at-once", "steady")}
    at_once = np.array([record.seconds for record in runs["at-once"].steps]) * 1e3
    steady = np.array([record.seconds for record in runs["steady"].steps]) * 1e3
    settled = steady[int(1.1 * figure.length) : int(fillings * figure.length * 0.99)]
    loads = [max(record.load for record in runs[policy].steps) for policy in ("steady", "at-once")]
    return {
        "start": float(at_once[1]),
        "peak": float(at_once.max()),
        "mean": float(at_once.mean()),
        "steady": float(settled.mean()),
        "steady_to_peak": float(settled.mean() / at_once.max()),
        "load_ratio": loads[0] / loads[1],
    }, runs


def run_clients(num_clients: int, output_tokens: int, *, split_fuse: bool, requests: int = 384) -> Simulation:
    generator = np.random.default_rng(42)
    jobs = make_jobs(requests, "normal:2600:0.3:4000", f"normal:{output_tokens}:0.3:4000", None, generator)
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=512,
            max_num_batched_tokens=768 if split_fuse else 4096,
            num_lanes=1,
            block_tokens=128,
            capacity_blocks=(78496 // 128,),
            start_policy="eager",
            split_fuse=split_fuse,
        ),
        MaxTokens(),
    )
    return simulate(scheduler, jobs, Arrivals(None, num_clients), PROFILES["a100-tp4-opt-66b"], 1)


def splitfuse(client_counts: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)) -> dict[str, object]:
    """Effective throughput (requests/s that keep 2, 4, 6 tokens/s; best client count) and gaps at 16 clients, ms."""
    result: dict[str, object] = {}
    for name, split_fuse in (("prefill-first", False), ("splitfuse", True)):
        runs = [run_clients(count, 60, split_fuse=split_fuse) for count in client_counts]
        gaps = inter_token_gaps(run_clients(16, 128, split_fuse=split_fuse).served) * 1e3
        result[name] = {
            "effective_throughput": {
                str(rate): max(effective_throughput(run, rate) for run in runs) for rate in (2, 4, 6)
            },
            "gap_ms": dict(zip(("p50", "p90", "p95"), np.percentile(gaps, [50, 90, 95]).tolist(), strict=True)),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="bench/results/paper_figures.json")
    parser.add_argument("--plot", help="of figure 11's steps, a .png")
    args = parser.parse_args()
    stabilised = []
    print(f"{'milliseconds a step':34}{'start':>12}{'peak':>12}{'mean':>12}{'steady':>12}{'steady/peak':>14}")
    for figure in FIGURES:
        simulated, runs = load_stabilising(figure)
        stabilised.append({"profile": figure.profile, "length": figure.length, "simulated": simulated})
        name = f"{figure.profile.removeprefix('a10-8xepyc-')}, S = {figure.length}"
        columns = ("start", "peak", "mean", "steady")
        print(f"{name + ', simulated':34}" + "".join(f"{simulated[c]:12.0f}" for c in columns), end="")
        print(f"{simulated['steady_to_peak']:14.2f}   peak load {simulated['load_ratio']:.3f} of all at once")
        print(f"{'   published':34}" + "".join(f"{getattr(figure, c):12.0f}" for c in columns), end="")
        print(f"{figure.steady / figure.peak:14.2f}")
        if args.plot and figure is FIGURES[0]:
            steps = {name: run.steps for name, run in runs.items()}
            plot_steps(steps, args.plot, title=f"{name}: 1024 sequences on an A10 and 8 Epyc sockets (simulated)")
    fused = splitfuse()
    for name, figures in fused.items():
        print(name, json.dumps(figures))
    Path(args.out).write_text(json.dumps({"load_stabilising": stabilised, "splitfuse": fused}, indent=1) + "\n")


if __name__ == "__main__":
    main()
