"""``fastdecode generate MODEL``: prompts in, text out, and where the KV lived."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import fastdecode
from fastdecode.api.config_file import add_config_flags
from fastdecode.api.outputs import RequestOutput
from fastdecode.commands.engine_flags import add_engine_flags, engine_options, run_on_s_worker
from fastdecode.errors import ConfigError

_SAMPLING_FLAGS = ("n", "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="Hugging Face model directory (config.json, *.safetensors)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", action="append", dest="prompts", metavar="TEXT", help="may be given several times")
    source.add_argument(
        "--prompts-file",
        metavar="FILE",
        help='one prompt per line; lines of a .jsonl file are {"prompt": ...} or {"prompt_token_ids": ...}',
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt on standard output")

    add_engine_flags(parser)

    sampling = parser.add_argument_group("sampling")
    for name, kind, default, text in (
        ("n", int, 1, "continuations per prompt"),
        ("temperature", float, 0.0, "0: the most likely token"),
        ("top_p", float, 1.0, "keep the likeliest tokens with this mass"),
        ("top_k", int, 0, "keep this many likeliest tokens; 0: all"),
        ("min_p", float, 0.0, "keep tokens with at least this fraction of the likeliest one's probability"),
        ("seed", int, None, "of the random draws"),
        ("max_tokens", int, 64, "new tokens at most"),
    ):
        sampling.add_argument("--" + name.replace("_", "-"), type=kind, default=default, help=text)
    sampling.add_argument(
        "--stop", action="append", metavar="TEXT", help="ends a continuation; may be given several times"
    )
    sampling.add_argument("--ignore-eos", action="store_true", help="go on after the end-of-sequence token")
    add_config_flags(parser)


def run(args: argparse.Namespace) -> int:
    """0: every prompt was served.  1: one was not.  2: it could not start or go on."""
    return run_on_s_worker(args, lambda: _generate(args))


def _generate(args: argparse.Namespace) -> int:
    """0 if every prompt was served, 1 if one was not.  Raises FastDecodeError."""
    prompts = _read_prompts(args)
    stop = args.stop and [_as_utf8(text) for text in args.stop]
    flags = {name: getattr(args, name) for name in _SAMPLING_FLAGS}
    try:
        params = fastdecode.SamplingParams(**flags, stop=stop, ignore_eos=args.ignore_eos)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with fastdecode.LLM(args.model, **engine_options(args)) as llm:
        for line in llm.kv_places:
            print(line, file=sys.stderr)
        started = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - started
    for output in outputs:
        _print(output, as_json=args.json)
    num_tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    print(
        f"{len(outputs)} prompts, {num_tokens} new tokens in {seconds:.2f} s: {num_tokens / seconds:.1f} tokens/s",
        file=sys.stderr,
    )
    return 1 if any(output.error for output in outputs) else 0


def _read_prompts(args: argparse.Namespace) -> list[str | dict[str, object]]:
    if args.prompts is not None:
        return [_as_utf8(prompt) for prompt in args.prompts]
    path = Path(args.prompts_file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the prompts: {error}") from error
    if path.suffix != ".jsonl":
        return [line for line in lines if line]
    prompts: list[str | dict[str, object]] = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}, line {number} is no JSON object: {error}") from error
    return prompts


def _as_utf8(argument: str) -> str:
    """Where the locale knows ASCII alone, other bytes of a command line come as halves of surrogate pairs."""
    is_undecoded = any("\udc80" <= character <= "\udcff" for character in argument)
    return os.fsencode(argument).decode(errors="replace") if is_undecoded else argument


def _print(output: RequestOutput, *, as_json: bool) -> None:
    if as_json:
        print(
            json.dumps(
                {
                    "request_id": output.request_id,
                    "prompt": output.prompt,
                    "error": None
                    if output.error is None
                    else {"code": output.error.code, "message": output.error.message},
                    "outputs": [
                        {"text": c.text, "token_ids": c.token_ids, "finish_reason": c.finish_reason}
                        for c in output.outputs
                    ],
                }
            )
        )
    elif output.error:
        print(f"--- prompt refused ({output.error.code}): {output.error.message}")
    else:
        for completion in output.outputs:
            print(f"--- {completion.finish_reason}, {len(completion.token_ids)} tokens")
            print(f"{output.prompt or ''}{completion.text}")
