"""``fastdecode bench serve``: any OpenAI-compatible server under load, with the flags and the report of vLLM's."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

import fastdecode
from fastdecode.benchmark.serving import (
    ENDPOINTS,
    Call,
    due_times,
    format_serving,
    make_calls,
    read_goodput,
    serving_record,
)
from fastdecode.benchmark.throughput import machine
from fastdecode.commands.bench_dataset import add_dataset_flags, positive, read_dataset
from fastdecode.errors import ConfigError
from fastdecode.signals import StoppedBySignal, taken_over

_KEY_VARIABLE = "OPENAI_API_KEY"


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prompts are the same for the same --seed, and the first one's is the warm-ups', too: a server with a prefix "
        "cache finds what it had before. Start it with --no-enable-prefix-caching to measure what it computes; what it "
        "says of cached tokens is told."
    )
    server = parser.add_argument_group("server")
    server.add_argument(
        "--base-url", default="http://127.0.0.1:8000",
        help=f"where it is; its key, if it wants one, is taken from {_KEY_VARIABLE}",
    )  # fmt: skip
    server.add_argument("--endpoint", choices=ENDPOINTS, default=ENDPOINTS[0], help="prompts as token ids, or as chats")
    server.add_argument("--model", required=True, help="what the server calls the model")
    server.add_argument(
        "--tokenizer", metavar="DIR", help="model directory that prompts are made with (default: --model, if it is one)"
    )
    add_dataset_flags(parser, num_prompts=1000)
    load = parser.add_argument_group("load")
    load.add_argument("--request-rate", type=_above_zero, default=float("inf"), help="requests/s; inf: all at once")
    load.add_argument(
        "--burstiness", type=_above_zero, default=1.0, help="of a rate: 1 is Poisson, less in bursts, more evenly"
    )
    load.add_argument("--max-concurrency", type=positive, help="requests at the same time; others wait here")
    load.add_argument("--num-warmups", type=int, default=1, help="requests before, one by one, that do not count")
    load.add_argument("--ignore-eos", action="store_true", help="ask for all of --output-len, whatever is sampled")
    load.add_argument("--temperature", type=float, default=0.0, help="of the sampling")
    load.add_argument("--timeout", type=_above_zero, default=21600.0, metavar="SECONDS", help="of one request")
    result = parser.add_argument_group("result")
    result.add_argument(
        "--goodput", nargs="+", default=[], metavar="NAME:MS",
        help="what a good request keeps: ttft, tpot, e2el, like ttft:200 tpot:50",
    )  # fmt: skip
    result.add_argument("--save-result", action="store_true", help="write a JSON file, too")
    result.add_argument("--result-dir", default=".", help="where to")
    result.add_argument("--result-filename", help="default: made of rate, model and time")


def run_serve(args: argparse.Namespace) -> int:
    """1 if a request failed."""
    goodput, tokenizer = read_goodput(args.goodput), _tokenizer_directory(args)
    requests, workload = read_dataset(args, tokenizer)
    calls = make_calls(
        requests, endpoint=args.endpoint, model=args.model, decode=_decoder(args, tokenizer),
        fields={"temperature": args.temperature} | ({"ignore_eos": True} if args.ignore_eos else {}),
    )  # fmt: skip
    due = due_times(len(calls), args.request_rate, args.burstiness, args.seed)
    path = _result_path(args)
    for call in calls[:1] * args.num_warmups:
        (warm_up,) = _send(args, [call], [0.0], None)
        if warm_up.error:
            raise ConfigError(f"the server does not serve: {warm_up.error}")
    print(f"{len(calls)} requests to {args.base_url}{args.endpoint}", file=sys.stderr)
    outcomes = _send(args, calls, due, args.max_concurrency)
    seconds = max((outcome.began_s + outcome.whole_s for outcome in outcomes), default=0.0)
    settings = {
        "kind": "serve",
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "base_url": args.base_url,
        "endpoint": args.endpoint,
        "model_id": args.model,
        **workload,
        "request_rate": "inf" if args.request_rate == float("inf") else args.request_rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        "ignore_eos": args.ignore_eos,
        "goodput": goodput,
    }
    record = serving_record(outcomes, max(seconds, 1e-9), goodput, settings)
    print(format_serving(record))
    for error in record["errors"]:
        print(f"failed: {error}", file=sys.stderr)
    if path:
        _save(path, record | {"machine": machine()})
    return 1 if record["failed"] else 0


def _send(args: argparse.Namespace, calls: Sequence[Call], due: Sequence[float], max_concurrency: int | None) -> Any:
    try:
        send_all = fastdecode.send_all
    except ModuleNotFoundError as error:
        raise ConfigError(f"bench serve needs {error.name}: pip install 'fastdecode[bench]'") from error
    key = os.environ.get(_KEY_VARIABLE)
    sending = send_all(
        args.base_url.rstrip("/") + args.endpoint,
        calls,
        due,
        max_concurrency=max_concurrency,
        timeout_s=args.timeout,
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )
    with taken_over() as numbers:
        return asyncio.run(_until_signal(sending, numbers))


async def _until_signal(sending: Coroutine[Any, Any, Any], numbers: Iterable[int]) -> Any:
    """What it gives.  A signal cancels it, so that its connections are closed.  Raises StoppedBySignal then."""
    task, came = asyncio.ensure_future(sending), list[int]()

    def stop(number: int) -> None:
        came.append(number)
        task.cancel()

    for number in numbers:
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError:
        if came:
            raise StoppedBySignal(came[0]) from None
        raise


def _tokenizer_directory(args: argparse.Namespace) -> str:
    directory = str(args.tokenizer or args.model)
    if not Path(directory).is_dir():
        raise ConfigError(f"prompts are made here: give --tokenizer DIR of the model ({directory} is no directory)")
    return directory


def _decoder(args: argparse.Namespace, directory: str) -> Callable[[Sequence[int]], str] | None:
    if args.endpoint == ENDPOINTS[0]:
        return None
    tokenizer = fastdecode.Tokenizer(directory)
    return lambda token_ids: str(tokenizer.decode(token_ids, skip_special_tokens=True))


def _result_path(args: argparse.Namespace) -> Path | None:
    """Made now, so that a place that cannot be written costs nobody a run.  Raises ConfigError."""
    if not args.save_result:
        return None
    name = f"serve-{args.request_rate:g}qps-{Path(args.model).name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path = Path(args.result_dir) / (args.result_filename or name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    return path


def _save(path: Path, record: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value
