"""``fastdecode bench WHAT``: throughput beside other engines, latency, a server, the wire, grids of these, plots."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastdecode.benchmark.engines import BACKENDS, FastDecodeEngine, PeerPlaces, close_engines, open_engines
from fastdecode.benchmark.llamacpp import WEIGHT_TYPES
from fastdecode.benchmark.sweep import Sweep, read_records, run_process, run_sweep
from fastdecode.benchmark.throughput import (
    format_latency,
    format_table,
    latency_record,
    machine,
    measure_throughput,
)
from fastdecode.benchmark.wire import SCHEMES, measure_wire
from fastdecode.benchmark.workload import random_requests
from fastdecode.commands.bench_dataset import add_dataset_flags, positive, read_dataset, vocab_size
from fastdecode.commands.bench_serve import add_serve_arguments, run_serve
from fastdecode.commands.engine_flags import add_engine_flags, engine_options, run_on_s_worker
from fastdecode.errors import ConfigError, FastDecodeError
from fastdecode.observe.plots import plot_rates, plot_steps
from fastdecode.observe.step_log import read_step_log
from transport import FLOAT_DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whats = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, text, add, do in (
        ("throughput", "tokens/s of a batch, beside other engines", add_throughput_arguments, run_throughput),
        ("latency", "seconds of one batch from prompts to last tokens", add_latency_arguments, run_latency),
        ("serve", "a server under load: TTFT, TPOT, ITL, E2EL", add_serve_arguments, run_serve),
        ("transport", "round trips of a layer's q, k, v and o", add_transport_arguments, run_transport),
        ("sweep", "a grid of runs from a YAML file, which can be resumed", add_sweep_arguments, run_grid),
        ("plot", "draw records, or the load over a run's steps", add_plot_arguments, run_plot),
    ):
        one = whats.add_parser(name, help=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add(one)
        one.set_defaults(do=do)


def run(args: argparse.Namespace) -> int:
    try:
        return int(args.do(args))
    except FastDecodeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    add_engine_flags(parser)
    parser.set_defaults(enable_prefix_caching=False)
    parser.description = (
        "Prompts are the same in every round, and computed anew in each: the prefix cache is off, unless "
        "--enable-prefix-caching asks for it."
    )


def add_throughput_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face model directory (config.json, *.safetensors)")
    add_dataset_flags(parser, num_prompts=64)
    peers = parser.add_argument_group("engines")
    peers.add_argument(
        "--backend", nargs="+", choices=BACKENDS, default=["fastdecode"], help="in turns, round by round"
    )
    peers.add_argument("--repeats", type=positive, default=3, help="rounds, after one that warms up")
    peers.add_argument("--hf-python", default=sys.executable, help="interpreter with transformers")
    peers.add_argument("--vllm-python", help="interpreter with vLLM")
    peers.add_argument("--llamacpp-binary", help="llama-batched-bench")
    peers.add_argument(
        "--llamacpp-weights", nargs="+", choices=WEIGHT_TYPES, default=["f32", "f16"], help="one run each"
    )
    parser.add_argument("--output-json", metavar="FILE", help="appends a JSON line per engine")
    _add_engine_flags(parser)


def run_throughput(args: argparse.Namespace) -> int:
    return run_on_s_worker(args, lambda: _measure_throughput(args))


def _measure_throughput(args: argparse.Namespace) -> int:
    options = {"model": args.model} | engine_options(args)
    requests, workload = read_dataset(args, args.tokenizer or args.model)
    options["max_num_seqs"] = min(options["max_num_seqs"], len(requests))
    places = PeerPlaces(args.hf_python, args.vllm_python, args.llamacpp_binary, args.llamacpp_weights)
    engines = open_engines(args.backend, options, requests, places)
    try:
        records = measure_throughput(
            engines,
            requests,
            repeats=args.repeats,
            workload=workload,
            on_progress=lambda line: print(line, file=sys.stderr, flush=True),
        )
    finally:
        close_engines(engines)
    print(format_table(records))
    _append(args.output_json, records)
    return 0


def add_latency_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face model directory (config.json, *.safetensors)")
    parser.add_argument("--batch-size", type=positive, default=1, help="sequences")
    parser.add_argument("--input-len", type=positive, default=128, help="prompt tokens of each")
    parser.add_argument("--output-len", type=positive, default=64, help="new tokens of each")
    parser.add_argument("--num-iters", type=positive, default=10, help="batches, after one that warms up")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--output-json", metavar="FILE", help="appends a JSON line")
    _add_engine_flags(parser)


def run_latency(args: argparse.Namespace) -> int:
    return run_on_s_worker(args, lambda: _measure_latency(args))


def _measure_latency(args: argparse.Namespace) -> int:
    options = {"model": args.model} | engine_options(args)
    options["max_num_seqs"] = max(options["max_num_seqs"], args.batch_size)
    requests = random_requests(
        args.batch_size, args.input_len, args.output_len, vocab_size=vocab_size(args.model), seed=args.seed
    )
    engine = FastDecodeEngine(options)
    try:
        runs = [engine.run(requests) for _ in range(args.num_iters + 1)][1:]
    finally:
        engine.close()
    workload = {name: getattr(args, name) for name in ("batch_size", "input_len", "output_len", "seed")}
    record = latency_record(engine, runs, args.output_len, workload)
    print(format_latency(record))
    _append(args.output_json, [record])
    return 0


def add_transport_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scheme", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="one after another")
    parser.add_argument("--tokens", nargs="+", type=positive, default=[1, 16, 64, 256, 1024, 4096], help="each")
    for name, default in (("q-heads", 8), ("kv-heads", 8), ("head-dim", 128)):
        parser.add_argument(f"--{name}", type=positive, default=default, help="of the layer")
    parser.add_argument("--dtype", choices=FLOAT_DTYPES, default="float32", help="on the wire")
    parser.add_argument("--output-json", metavar="FILE", help="appends a JSON line per row")


def run_transport(args: argparse.Namespace) -> int:
    print(f"{'scheme':8} {'tokens':>7} {'KiB':>9} {'median us':>10} {'p99 us':>10} {'GB/s':>7}")
    records = []
    for scheme in args.scheme:
        shape = {"q_heads": args.q_heads, "kv_heads": args.kv_heads, "head_dim": args.head_dim, "dtype": args.dtype}
        for trip in measure_wire(scheme, args.tokens, **shape):
            print(
                f"{scheme:8} {trip.num_tokens:7} {trip.num_bytes / 1024:9.0f} {trip.median_s * 1e6:10.0f} "
                f"{trip.p99_s * 1e6:10.0f} {trip.bytes_per_s / 1e9:7.2f}",
                flush=True,
            )
            records.append({"kind": "transport", **shape, **asdict(trip), "machine": machine()})
    _append(args.output_json, records)
    return 0


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("grid", metavar="GRID.yaml", help="see fastdecode/benchmark/sweep.py and scripts/*.yaml")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.jsonl", help="a line per engine and point")
    parser.add_argument("--resume", action="store_true", help="go on with a file that is there: leave out what it has")


def run_grid(args: argparse.Namespace) -> int:
    """1 if a point failed."""
    num_failed = run_sweep(
        Sweep.read(args.grid),
        args.output,
        resume=args.resume,
        run=run_process,
        on_progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    return 1 if num_failed else 0


def add_plot_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--records", metavar="FILE.jsonl", help="of throughput or sweep: rates over the batch")
    source.add_argument("--step-log", metavar="FILE.jsonl", nargs="+", help="load and time of each step")
    parser.add_argument("-o", "--output", required=True, metavar="FILE.png", help="the picture")


def run_plot(args: argparse.Namespace) -> int:
    try:
        if args.records:
            plot_rates(read_records(args.records), args.output)
        else:
            plot_steps({Path(path).stem: list(read_step_log(path)) for path in args.step_log}, args.output)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"nothing to draw: {type(error).__name__}: {error}") from error
    return 0


def _append(path: str | None, records: list[dict[str, Any]]) -> None:
    if path is None:
        return
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
