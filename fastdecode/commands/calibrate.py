"""``fastdecode calibrate MODEL``: measures T(B) and R here, keeps them, and says what they mean."""

from __future__ import annotations

import argparse
import sys

import fastdecode
from fastdecode.commands.engine_flags import add_engine_flags, engine_options, run_on_s_worker
from fastdecode.engine.config import EngineConfig
from fastdecode.errors import ConfigError
from fastdecode.modelling.calibration import Calibration, write_calibration
from fastdecode.modelling.perf_model import sls_peak
from fastdecode.scheduling.times import LaneWork


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face model directory (config.json, *.safetensors)")
    parser.add_argument("-o", "--output", default="calibration.json", metavar="FILE", help="where to keep it")
    parser.add_argument("--largest-batch", type=int, default=256, help="tokens of a micro-batch to measure up to")
    parser.add_argument("--length", type=int, default=1024, help="of a sequence, for the advice")
    add_engine_flags(
        parser,
        ("dtype", "device", "kv_cache_dtype", "kv_cache_memory", "num_r_workers", "r_worker_threads", "transport",
         "key_file", "worker_timeout_s"),
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    return run_on_s_worker(args, lambda: _calibrate(args))


def _calibrate(args: argparse.Namespace) -> int:
    """Raises FastDecodeError."""
    try:
        if not 1 <= args.largest_batch <= 1 << 16 or args.length < 1:
            raise ConfigError("--largest-batch must be from 1 to 65536, and --length 1 or more")
        config = EngineConfig.from_options({"model": args.model} | engine_options(args))
        calibration = fastdecode.calibrate_model(
            config, args.largest_batch, lambda line: print(line, file=sys.stderr, flush=True)
        )
        write_calibration(calibration, args.output)
    except OSError as error:
        print(f"error: cannot write {args.output}: {error}", file=sys.stderr)
        return 2
    _print_advice(calibration, args.output, args.length)
    return 0


def _print_advice(calibration: Calibration, output: str, length: int) -> None:
    """What the performance model makes of it, for sequences of so many tokens."""
    model, workers = calibration.perf_model, calibration.num_r_workers
    batch, interval = model.saturating_batch(), max(1, length // 16)
    peak = sls_peak(2 * batch, length, interval)
    seconds = model.step_seconds([LaneWork(batch, peak / 2)] * 2, workers)
    r_ns, fixed_us = model.kv_token_seconds * 1e9, model.r_fixed_seconds * 1e6
    print(f"{output}: {calibration.model} on {calibration.device}, {workers} R-workers")
    print(f"R = {r_ns:.1f} ns per KV token, block and R-worker, and {fixed_us:.0f} us for the wire")
    print(f"S-Part: {model.efficiency(batch):.0f} tokens/s through a block at B = {batch}, 0.9 of the best or more")
    print(f"for sequences of {length} tokens {model.r_workers(batch, length):.1f} such R-workers keep up with it")
    print(
        f"two micro-batches of {batch}, of which {2 * batch * interval / length:.1f} start every {interval} steps: the "
        f"load comes to {peak:.0f} KV tokens, a step to {seconds * 1e3:.1f} ms, {2 * batch / seconds:.0f} tokens/s"
    )
