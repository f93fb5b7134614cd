"""Engine options as flags: names, types and help come from EngineConfig, which is the one place that describes them."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import fastdecode
from cpu_attention import KV_DTYPES, available_cores, num_usable_cores
from fastdecode.engine.config import DTYPE_NAMES, LENGTH_PREDICTORS, LINEAR_KERNELS, TRANSPORTS, EngineConfig
from fastdecode.errors import ConfigError, FastDecodeError
from fastdecode.scheduling.kv_credits import KV_POLICIES
from fastdecode.scheduling.load_control import START_POLICIES
from fastdecode.scheduling.waiting import ORDERS
from fastdecode.signals import handled, unhandled

_CHOICES: dict[str, Sequence[str]] = {
    "dtype": DTYPE_NAMES,
    "linear_kernel": LINEAR_KERNELS,
    "kv_cache_dtype": ("auto", *KV_DTYPES),
    "transport": TRANSPORTS,
    "kv_policy": KV_POLICIES,
    "start_policy": START_POLICIES,
    "length_predictor": LENGTH_PREDICTORS,
    "order": ORDERS,
}
_NOT_FLAGS = {"model", "seed", "skip_tokenizer_init", "r_worker_addresses"}  # given otherwise, or of the API alone


def add_engine_flags(
    parser: argparse.ArgumentParser, names: Sequence[str] | None = None, without: Sequence[str] = ()
) -> None:
    """Flags for these options, but for those `without`; None: for all that can be given so."""
    engine = parser.add_argument_group("engine")
    known = {field.name: field for field in fields(EngineConfig) if field.name not in _NOT_FLAGS}
    chosen = tuple(name for name in (known if names is None else names) if name not in without)
    for name in chosen:
        field = known[name]
        flag = "--" + name.replace("_", "-").removesuffix("-s")
        if str(field.type).startswith("bool"):
            engine.add_argument(
                flag, dest=name, action=argparse.BooleanOptionalAction, default=field.default, help=option_help(name)
            )
            continue
        engine.add_argument(
            flag,
            dest=name,
            type=_type(name, str(field.type)),
            choices=_CHOICES.get(name),
            default=field.default,
            help=option_help(name),
        )
    if "transport" in chosen:
        engine.add_argument(
            "--s-worker-rank", type=int, default=None, metavar="RANK",
            help="with --transport mpi: who is the S-worker; the same on all ranks (default: 0, or the one that is no "
            "fastdecode rworker)",
        )  # fmt: skip
    engine.add_argument(
        "--r-worker-address",
        action="append",
        dest="r_worker_addresses",
        metavar="ADDRESS",
        help="an R-worker that runs already; may be given several times",
    )
    parser.set_defaults(engine_flags=(*chosen, "r_worker_addresses"))


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """What those flags were set to."""
    return {name: getattr(args, name) for name in args.engine_flags}


def run_on_s_worker(args: argparse.Namespace, action: Callable[[], int]) -> int:
    """Exit code of `action`; with ``--transport mpi`` it runs on one rank, and the other ranks are its R-workers.

    What `action` raises for the user to mend is told here, with exit code 2: an exception would end an mpirun with a
    trace.  Raises ConfigError: no MPI, say.
    """

    try:
        tempfile.gettempdir()
    except OSError as error:
        raise ConfigError(
            "no temporary directory can be written, and torch needs one: set TMPDIR to a directory that this user can "
            f"write ({error})"
        ) from error
    # torch's threads are one for each core, also in a container that may use a few; read when torch is loaded.
    if (num_cores := num_usable_cores()) < len(available_cores()):
        os.environ.setdefault("OMP_NUM_THREADS", str(num_cores))

    def told() -> int:
        try:
            return action()
        except FastDecodeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    if args.transport != "mpi":
        if args.s_worker_rank is not None:
            raise ConfigError("--s-worker-rank is for --transport mpi; leave it out")
        return told()
    budget = EngineConfig.from_options({"model": args.model, "kv_cache_memory": args.kv_cache_memory})

    def told_here() -> int:
        with handled():
            return told()

    with unhandled():  # MPI waits for other ranks where Python's handlers do not come, and an R-worker unwinds nothing
        return int(
            fastdecode.mpi_main(
                told_here,
                s_worker_rank=args.s_worker_rank,
                kv_cache_bytes=budget.kv_cache_memory,
                num_threads=args.r_worker_threads,
            )
        )


def option_help(option: str) -> str:
    """The option's lines in EngineConfig's docstring."""
    lines = (EngineConfig.__doc__ or "").splitlines()
    start = next((i for i, line in enumerate(lines) if line.strip().startswith(f"{option}:")), None)
    if start is None:
        return ""  # docstrings were stripped (python -OO)
    text = [lines[start].split(":", 1)[1]]
    for line in lines[start + 1 :]:
        if not line.startswith(" " * 8):
            break
        text.append(line)
    return " ".join(" ".join(text).replace("`", "").split()).replace("%", "%%")


def _type(name: str, annotation: str) -> type:
    if name in ("kv_cache_memory", "prompt_kv_memory", "device_kv_memory"):
        return str  # "4GiB"
    return {"int": int, "float": float}.get(annotation.split(" ")[0], str)


def read_template(path: Path) -> str:
    """Of --chat-template.  Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the chat template: {error}") from error
