"""``fastdecode simulate``: the scheduler of the engine on a workload, in virtual time; figures, JSON and plots."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastdecode.errors import ConfigError, FastDecodeError
from fastdecode.modelling.calibration import read_calibration
from fastdecode.modelling.simulation.cost import PROFILES, Cost, SplitCost
from fastdecode.modelling.simulation.latency import summary
from fastdecode.modelling.simulation.simulator import Simulation, simulate
from fastdecode.modelling.simulation.workload import make_jobs, parse_arrivals
from fastdecode.observe.plots import check_plotting, plot_steps
from fastdecode.scheduling.config import SchedulerConfig
from fastdecode.scheduling.kv_credits import KV_POLICIES
from fastdecode.scheduling.load_control import START_POLICIES
from fastdecode.scheduling.predictor import PUBLISHED_ACCURACY, Learned, MaxTokens, NoisyOracle, Oracle, Predictor
from fastdecode.scheduling.scheduler import Scheduler
from fastdecode.scheduling.waiting import ORDERS

PREDICTORS = ("max-tokens", "oracle", "noisy", "learned")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    work = parser.add_argument_group("workload")
    work.add_argument("--requests", type=int, default=600, help="how many")
    work.add_argument(
        "--prompt-tokens",
        default="128",
        metavar="LENGTHS",
        help="512 | 128,256,512 | uniform:LOW:HIGH | normal:MEAN:RELATIVE_SPREAD:CAP | lognormal:MEDIAN:SIGMA:CAP",
    )
    work.add_argument("--output-tokens", default="256", metavar="LENGTHS", help="the same")
    work.add_argument("--max-tokens", type=int, help="what requests allow; without it, the length they come to")
    work.add_argument("--arrivals", default="offline", help="offline | poisson:REQUESTS_PER_SECOND | closed:CLIENTS")
    work.add_argument("--seed", type=int, default=0, help="of the workload")

    machine = parser.add_argument_group("machine")
    cost = machine.add_mutually_exclusive_group()
    cost.add_argument(
        "--profile", choices=sorted(PROFILES), default="a10-8xepyc-llama-7b", help="step times from the papers"
    )
    cost.add_argument("--calibration", metavar="FILE", help="step times of a machine, by `fastdecode calibrate`")
    machine.add_argument("--r-workers", type=int, default=8, help="how many; 0: all KV is on the S-worker's device")
    machine.add_argument("--device-kv-tokens", type=int, default=0, help="that the device holds, before R-workers do")
    machine.add_argument("--kv-tokens", type=int, default=65536, help="that each R-worker holds")

    policy = parser.add_argument_group("scheduler")
    policy.add_argument(
        "--start-policy",
        nargs="+",
        choices=START_POLICIES,
        default=["steady"],
        help="several are run one after the other, on the same requests",
    )
    policy.add_argument("--kv-policy", choices=KV_POLICIES, default=SchedulerConfig.kv_policy, help="when KV suffices")
    policy.add_argument(
        "--placement",
        choices=("planned", "device-first"),
        default="planned",
        help="what the device keeps, and over how many lanes steps go: by the step times, or as much as fits, and all",
    )
    policy.add_argument("--start-interval", type=int, default=1, help="steps between starts")
    policy.add_argument("--max-kv-load", type=int, help="KV tokens that a step may read; without it, what is held")
    policy.add_argument("--max-num-seqs", type=int, default=1024, help="sequences that run at most")
    policy.add_argument("--max-num-batched-tokens", type=int, default=4096, help="tokens of a step")
    policy.add_argument("--micro-batches", type=int, default=2, help="lanes that take turns")
    policy.add_argument("--block-tokens", type=int, default=16, help="tokens per KV block")
    policy.add_argument("--predictor", choices=PREDICTORS, default="learned", help="who tells output lengths")
    policy.add_argument("--accuracy", type=float, default=PUBLISHED_ACCURACY, help="of the noisy one")
    policy.add_argument(
        "--length-quantile", type=float, default=SchedulerConfig.length_quantile, help="not to outlive the KV reserved"
    )
    policy.add_argument("--order", choices=ORDERS, default=SchedulerConfig.order, help="who starts first")
    policy.add_argument("--order-window", type=int, default=SchedulerConfig.order_window, help="that all but fcfs sort")
    policy.add_argument(
        "--prefill-first", action="store_true", help="whole prompts in steps of their own, instead of SplitFuse"
    )

    out = parser.add_argument_group("output")
    out.add_argument("--json", metavar="FILE", help="figures and every step's record; - is standard output")
    out.add_argument("--plot", metavar="FILE.png", help="load, step time and queue over time")


def run(args: argparse.Namespace) -> int:
    try:
        if args.plot:
            check_plotting()
        cost = _cost(args)
        results = {name: _simulate(args, name, cost) for name in args.start_policy}
    except FastDecodeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    figures = {name: summary(simulation, args.max_kv_load) for name, simulation in results.items()}
    if args.json != "-":
        _print_table(figures)
    if args.json:
        _write_json(args, results, figures)
    if args.plot:
        plot_steps({name: simulation.steps for name, simulation in results.items()}, args.plot, args.max_kv_load)
        print(f"plot: {args.plot}", file=sys.stderr)
    return 0


def _cost(args: argparse.Namespace) -> Cost:
    if args.calibration:
        return SplitCost(read_calibration(args.calibration).perf_model)
    return PROFILES[args.profile]


def _simulate(args: argparse.Namespace, start_policy: str, cost: Cost) -> Simulation:
    least = {name: 1 for name in (
        "requests", "start_interval", "max_num_seqs", "max_num_batched_tokens", "micro_batches",
        "block_tokens", "order_window", "max_tokens", "max_kv_load",
    )} | {"kv_tokens": args.block_tokens, "r_workers": 0, "device_kv_tokens": 0}  # fmt: skip
    for name, low in least.items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise ConfigError(f"--{name.replace('_', '-')} must be {low} or more, got {getattr(args, name)}")
    if not 0 <= args.accuracy <= 1 or not 0 <= args.length_quantile <= 1:
        raise ConfigError("--accuracy and --length-quantile are shares from 0 to 1")
    if not args.r_workers and args.device_kv_tokens < args.block_tokens:
        raise ConfigError("with no R-workers all KV is on the device; give --device-kv-tokens")
    if args.device_kv_tokens and not (isinstance(cost, SplitCost) and cost.model.device_kv_token_seconds):
        raise ConfigError(f"{args.calibration or args.profile} does not tell how fast the device reads KV of its own")
    generator = np.random.default_rng(args.seed)
    jobs = make_jobs(args.requests, args.prompt_tokens, args.output_tokens, args.max_tokens, generator)
    arrivals = parse_arrivals(args.arrivals, generator, args.requests)
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=args.max_num_seqs,
            max_num_batched_tokens=args.max_num_batched_tokens,
            num_lanes=args.micro_batches,
            block_tokens=args.block_tokens,
            capacity_blocks=(args.kv_tokens // args.block_tokens,) * args.r_workers,
            device_blocks=args.device_kv_tokens // args.block_tokens,
            kv_policy=args.kv_policy,
            start_policy=start_policy,
            start_interval=args.start_interval,
            max_kv_load=args.max_kv_load,
            length_quantile=args.length_quantile,
            order=args.order,
            order_window=args.order_window,
            split_fuse=not args.prefill_first,
            times=cost.model if isinstance(cost, SplitCost) and args.placement == "planned" else None,
        ),
        _predictor(args),
    )
    began = time.monotonic()
    total = sum(job.output_tokens for job in jobs)
    with tqdm(total=total, desc=start_policy, unit="token", file=sys.stderr, disable=None) as bar:
        simulation = simulate(
            scheduler, jobs, arrivals, cost, args.r_workers, on_step=lambda record: bar.update(record.num_decodes)
        )
    print(f"{start_policy}: simulated in {time.monotonic() - began:.1f} s", file=sys.stderr)
    if all(one.refused for one in simulation.served):
        raise ConfigError("no request fits: prompt + output is more than the R-workers hold; raise --kv-tokens")
    return simulation


def _predictor(args: argparse.Namespace) -> Predictor:
    match args.predictor:
        case "max-tokens":
            return MaxTokens()
        case "oracle":
            return Oracle()
        case "noisy":
            return NoisyOracle(args.accuracy, args.seed)
        case _:
            return Learned()


def _print_table(figures: dict[str, dict[str, object]]) -> None:
    """One column per start policy; spreads become lines of their own, in milliseconds."""
    rows: dict[str, list[str]] = {}
    for figure in figures.values():
        for name, value in figure.items():
            if isinstance(value, dict):
                for part in ("mean", "p50", "p95", "p99"):
                    cell = "-" if value[part] is None else f"{value[part] * 1e3:.1f}"
                    rows.setdefault(f"{name.removesuffix('_s')} {part}, ms", []).append(cell)
            else:
                rows.setdefault(name.replace("_", " "), []).append(
                    f"{value:.2f}" if isinstance(value, float) else str(value)
                )
    print(f"{'':28}" + "".join(f"{name:>14}" for name in figures))
    for name, cells in rows.items():
        print(f"{name:28}" + "".join(f"{cell:>14}" for cell in cells))


def _write_json(
    args: argparse.Namespace, results: dict[str, Simulation], figures: dict[str, dict[str, object]]
) -> None:
    content = {
        "options": {name: value for name, value in vars(args).items() if name not in ("json", "plot")},
        "runs": {
            name: {"summary": figures[name], "steps": [asdict(record) for record in results[name].steps]}
            for name in results
        },
    }
    text = json.dumps(content, allow_nan=False)
    if args.json == "-":
        print(text)
    else:
        Path(args.json).write_text(text + "\n", encoding="utf-8")
