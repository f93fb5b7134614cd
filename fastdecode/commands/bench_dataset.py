"""What a benchmark asks for: flags, and the requests they make; for ``bench throughput`` and ``bench serve``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import fastdecode
from fastdecode.benchmark.workload import (
    DATASETS,
    BenchRequest,
    Encode,
    custom_requests,
    random_requests,
    sharegpt_requests,
)
from fastdecode.errors import ConfigError


def add_dataset_flags(parser: argparse.ArgumentParser, *, num_prompts: int) -> None:
    work = parser.add_argument_group("workload")
    work.add_argument("--dataset-name", choices=DATASETS, default="random", help="random tokens, or read from a file")
    work.add_argument("--dataset-path", metavar="FILE", help="of sharegpt (JSON) or custom (JSON lines)")
    work.add_argument("--num-prompts", type=positive, default=num_prompts, help="requests")
    work.add_argument("--input-len", type=positive, default=128, help="prompt tokens of a random request")
    work.add_argument("--output-len", type=positive, default=64, help="new tokens; sharegpt: those of its answers")
    work.add_argument("--random-range-ratio", type=float, default=0.0, help="lengths vary by this share, both ways")
    work.add_argument("--seed", type=int, default=0, help="of the workload")


def read_dataset(args: argparse.Namespace, tokenizer: str) -> tuple[list[BenchRequest], dict[str, Any]]:
    """The requests, and what to say of them in a record.  tokenizer: a model directory.  Raises ConfigError."""
    if (args.dataset_path is None) != (args.dataset_name == "random"):
        raise ConfigError("sharegpt and custom read --dataset-path FILE; random reads none")
    workload: dict[str, Any] = {"dataset": args.dataset_name, "num_prompts": args.num_prompts}
    match args.dataset_name:
        case "random":
            if not 0 <= args.random_range_ratio < 1:
                raise ConfigError("--random-range-ratio is a share from 0 to below 1")
            workload |= {"input_len": args.input_len, "output_len": args.output_len, "seed": args.seed}
            workload["range_ratio"] = args.random_range_ratio
            requests = random_requests(
                args.num_prompts,
                args.input_len,
                args.output_len,
                vocab_size=vocab_size(tokenizer),
                range_ratio=args.random_range_ratio,
                seed=args.seed,
            )
        case "sharegpt":
            workload |= {"path": args.dataset_path, "seed": args.seed}
            requests = sharegpt_requests(
                args.dataset_path, args.num_prompts, _encode(tokenizer), output_len=None, seed=args.seed
            )
        case _:
            workload |= {"path": args.dataset_path, "output_len": args.output_len}
            requests = custom_requests(
                args.dataset_path, args.num_prompts, _encode(tokenizer), output_len=args.output_len
            )
    return requests, workload


def vocab_size(model: str) -> int:
    """Raises ConfigError."""
    try:
        config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
        return int((config.get("text_config") or config)["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{model} has no config.json that tells vocab_size: {error!r}") from error


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def _encode(tokenizer: str) -> Encode:
    return fastdecode.Tokenizer(tokenizer).encode
