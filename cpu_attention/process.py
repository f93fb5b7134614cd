"""An R-worker as a process of its own: flags, a line that says where it listens, signals, the end.

The first line on standard output is ``listening on ADDRESS``; whoever started the process reads it.
"""

from __future__ import annotations

import _thread
import argparse
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType

from cpu_attention import kernel, reference
from cpu_attention.machine import (
    check_budget,
    default_kv_cache_bytes,
    format_bytes,
    keep_to_cores,
    num_usable_cores,
    parse_bytes,
    parse_cores,
    pin_thread,
    raise_file_limit,
)
from cpu_attention.rworker import RWorker
from cpu_attention.serve import serve
from transport import AddressError, KeyFileError, keep_freed_memory, limited_handler, listen, read_keys

LISTENING = "listening on "
KERNELS = {"numba": kernel, "reference": reference}
_GRACE_S = 5.0
_REPEAT_S = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bind",
        required=True,
        metavar="ADDRESS",
        help="shm://PATH (shared memory: the fastest), ipc://PATH, tcp://127.0.0.1:PORT (port 0: a free one); with a "
        "key also tcp://10.0.0.5:PORT, the one address of the network that S-workers come over; with `fastdecode "
        "rworker` also mpi://, as one rank of an mpirun",
    )
    parser.add_argument(
        "--key-file",
        metavar="FILE",
        default=None,
        help="tcp:// for holders of this key alone, and encrypted; `fastdecode keygen` makes one",
    )
    parser.add_argument(
        "--insecure-network",
        action="store_true",
        help="listen on an address of a network without a key, open to everybody on it",
    )
    parser.add_argument(
        "--kv-cache-memory",
        metavar="BYTES",
        type=_bytes,
        default=None,
        help="KV budget, like 4GiB (default: half of the memory that is free)",
    )
    parser.add_argument(
        "--threads",
        type=_positive,
        default=None,
        metavar="N",
        help="attention threads (default: one for each core it runs on)",
    )
    parser.add_argument(
        "--cores",
        type=_cores,
        default=None,
        metavar="LIST",
        help="run on these alone, a thread pinned to each, like 0-7,16 (default: where the system likes). Give each "
        "R-worker the cores of one NUMA node: its memory is then taken there",
    )
    parser.add_argument("--kernel", choices=sorted(KERNELS), default="numba", help="reference: plain numpy, slow")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    parser.add_argument(
        "--exit-with-parent",
        action="store_true",
        help="end when standard input or the process that started it does, so that no worker outlives it",
    )


def run(args: argparse.Namespace) -> int:
    """Serves until SIGTERM, SIGINT, SIGHUP or the parent's end.  Returns the exit code."""
    if args.bind.startswith("mpi:"):  # which rank is what is not known here
        print("error: --bind: start R-workers of an mpirun with: fastdecode rworker --bind mpi://", file=sys.stderr)
        return 2
    parent = _open_parent() if args.exit_with_parent else None
    start_logging(args)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, _exit)
    _handle_signals()
    if args.cores:
        try:
            keep_to_cores(args.cores)  # before anything starts a thread
        except ValueError as error:
            print(f"error: --cores: {error}", file=sys.stderr)
            return 2
    keep_freed_memory()
    raise_file_limit()
    kv_cache_bytes = args.kv_cache_memory if args.kv_cache_memory is not None else default_kv_cache_bytes()
    num_threads = args.threads or num_usable_cores()
    if not args.exit_with_parent:  # or whoever started this has counted, for all that it started
        try:
            check_budget(args.kv_cache_memory)
        except ValueError as error:
            print(f"error: --kv-cache-memory: {error}", file=sys.stderr)
            return 2
    try:
        keys = None if args.key_file is None else read_keys(args.key_file)
        listener = listen(args.bind, keys, args.insecure_network)
    except (AddressError, KeyFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    worker = RWorker(
        kv_cache_bytes=kv_cache_bytes, num_threads=num_threads, kernel=KERNELS[args.kernel], cores=args.cores or ()
    )
    if args.exit_with_parent:
        threading.Thread(target=_follow_parent, args=(parent,), daemon=True).start()
    try:
        print(LISTENING + listener.address, flush=True)
        logging.info("%s of KV, %d threads, %s kernel", format_bytes(kv_cache_bytes), num_threads, args.kernel)
        if args.cores:
            pin_thread(args.cores[0])  # this one attends too; those of the transport stay free
        serve(listener, worker)
    finally:
        worker.close()
        listener.close()
    return 0


def start_logging(args: argparse.Namespace) -> None:
    line = "r-worker %(process)d: %(message)s"
    logging.basicConfig(level=args.log_level.upper(), format=line, handlers=[limited_handler()])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cpu_attention", description="Run one FastDecode R-worker.")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _handle_signals() -> None:
    signal.signal(signal.SIGTERM, _exit)
    signal.signal(signal.SIGINT, _exit)
    sys.unraisablehook = _once_more_if_swallowed


def _once_more_if_swallowed(found: sys.UnraisableHookArgs) -> None:
    """Python lets no exception out of a __del__, nor the one that a signal raises there."""
    if found.exc_type is SystemExit:
        _handle_signals()
        # Not by `threading`, of whose locks this thread may be holding one.
        _thread.start_new_thread(_terminate_soon, ())
    else:
        sys.__unraisablehook__(found)


def _terminate_soon() -> None:
    time.sleep(_REPEAT_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _exit(signum: int, frame: FrameType | None) -> None:
    """Once; the clean-up that follows is not to be interrupted by a second one."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise SystemExit(0)


def _open_parent() -> int | None:
    """A file descriptor that is readable once the parent has ended; None where the system has none such."""
    try:
        return os.pidfd_open(os.getppid())
    except (OSError, AttributeError):
        return None


def _follow_parent(parent: int | None) -> None:
    """Standard input is a pipe from the parent: its end is the parent's end, however that came.

    But a child of the parent's may hold the pipe open, and outlive it; so the parent itself is watched, too.
    """
    watched = [0] if parent is None else [0, parent]
    while parent not in (ready := select.select(watched, [], [])[0]) and (0 not in ready or os.read(0, 4096)):
        pass
    # A signal that comes between Python's last check and the system call that waits is not seen until the
    # wait ends, so it is repeated.  A main thread that never reacts would keep its memory for ever.
    pause, deadline = threading.Event(), time.monotonic() + _GRACE_S
    while time.monotonic() < deadline:
        os.kill(os.getpid(), signal.SIGTERM)
        pause.wait(_REPEAT_S)
    os._exit(1)


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _cores(text: str) -> tuple[int, ...]:
    try:
        cores = parse_cores(text)
    except ValueError:
        cores = ()
    if not cores:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of cores; write it like 0-7,16")
    return cores


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)
