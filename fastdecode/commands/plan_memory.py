"""``fastdecode plan-memory MODEL``: weights, KV per token, and how many sequences fit on a device and on R-workers."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

import fastdecode
from cpu_attention import KV_DTYPES, available_memory_bytes, format_bytes, parse_bytes
from fastdecode.errors import ConfigError, FastDecodeError
from fastdecode.modelling.memory_plan import DTYPE_BYTES, KVPlan, ModelSize, kv_room, plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a directory with a config.json; weights are not read")
    parser.add_argument("--dtype", choices=list(DTYPE_BYTES), help="of the weights; default: bfloat16")
    parser.add_argument("--device-memory", type=_bytes, help="like 24GiB; default: what is free of the GPU, or here")
    parser.add_argument(
        "--r-worker-memory", type=_bytes, help="of all together, like 256GiB; default: what is free here"
    )
    parser.add_argument("--sequences", type=int, default=256, help="that are to run at the same time")
    parser.add_argument("--tokens", type=int, help="of each, prompt and output; default: 4096, or all the model knows")
    parser.add_argument("--kv-cache-dtype", choices=list(KV_DTYPES), nargs="+", help="on R-workers; default: each")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    try:
        return _plan(args)
    except FastDecodeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _plan(args: argparse.Namespace) -> int:
    """Raises FastDecodeError."""
    if args.sequences < 1 or (args.tokens is not None and args.tokens < 1):
        raise ConfigError("--sequences and --tokens are at least 1")
    model, dtype = fastdecode.read_model_size(args.model), args.dtype or "bfloat16"
    tokens = args.tokens or min(4096, model.max_positions or 4096)
    device = args.device_memory or fastdecode.free_device_bytes()
    host = available_memory_bytes() if args.r_worker_memory is None else args.r_worker_memory
    weights = model.num_parameters * DTYPE_BYTES[dtype]
    if weights > device:
        raise ConfigError(
            f"{format_bytes(weights)} of {dtype} weights do not fit a device of {format_bytes(device)}; give another "
            "--device-memory or --dtype"
        )
    plans = plan(
        model, dtype=dtype, device_bytes=device, r_worker_bytes=host, sequences=args.sequences, tokens=tokens,
        kv_dtypes=tuple(args.kv_cache_dtype or ()),
    )  # fmt: skip
    if args.json:
        told: dict[str, Any] = {
            "model": asdict(model), "dtype": dtype, "weights_bytes": weights, "device_bytes": device,
            "r_worker_bytes": host, "tokens": tokens, "plans": [asdict(one) for one in plans],
        }  # fmt: skip
        print(json.dumps(told, indent=2))
    else:
        print("\n".join(_lines(model, dtype, weights, device, host, args.sequences, tokens, plans)))
    return 0


def _lines(
    model: ModelSize, dtype: str, weights: int, device: int, host: int, sequences: int, tokens: int, plans: list[KVPlan]
) -> list[str]:
    active = "" if model.num_active == model.num_parameters else f", {model.num_active / 1e9:.2f} of them for a token"
    room = kv_room(device, weights)
    columns = "{:10} {:>13} {:>18} {:>14} {:>14} {:>9}"
    lines = [
        f"{model.model_type}: {model.num_parameters / 1e9:.2f} billion parameters{active}; {model.num_layers} layers, "
        f"{model.num_q_heads} query and {model.num_kv_heads} KV heads of {model.head_dim}",
        f"device    {format_bytes(device)}: {format_bytes(weights)} of {dtype} weights, {format_bytes(room)} for KV, "
        f"{format_bytes(device - weights - room)} for all else",
        f"R-workers {format_bytes(host)}",
        "",
        f"{sequences} sequences of {tokens} tokens:",
        columns.format("R-workers'", "KV per token", "all KV there", "on the device", "on R-workers", "nowhere"),
    ]
    for one in plans:
        all_there = one.token_bytes * tokens * sequences
        lines.append(
            columns.format(
                one.kv_dtype, format_bytes(one.token_bytes), format_bytes(all_there), one.on_device, one.on_r_workers,
                one.missing,
            )
        )  # fmt: skip
    return [*lines, "", _verdict(plans)]


def _verdict(plans: list[KVPlan]) -> str:
    first = plans[0]
    if first.on_device == first.wanted:
        return "All of them fit on the device: R-workers are not needed for memory."
    best = next((one for one in plans if one.fits), None)
    if best is None:
        least = min(plans, key=lambda one: one.r_worker_bytes)
        return (
            f"They fit nowhere: with {least.kv_dtype} KV R-workers need {format_bytes(least.r_worker_bytes)} for what "
            "the device cannot hold."
        )
    return (
        f"{best.on_device} of {best.wanted} fit on the device; with {best.kv_dtype} KV on R-workers, "
        f"{format_bytes(best.r_worker_bytes)}, all do."
    )


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
