"""``fastdecode rworker``: the same process as ``python -m cpu_attention``; with ``--bind mpi://``, a rank of an mpirun:

mpirun -n 1 fastdecode serve MODEL --transport mpi : -n 4 fastdecode rworker --bind mpi:// --kv-cache-memory 64GiB
"""

from __future__ import annotations

import argparse
import logging

from cpu_attention import (
    add_process_arguments,
    check_budget,
    keep_to_cores,
    raise_file_limit,
    run_process,
    start_logging,
)
from fastdecode.errors import ConfigError
from fastdecode.holders.launch_mpi import mpi_r_worker
from fastdecode.signals import unhandled


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_process_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Raises ConfigError: what does not fit a rank."""
    if not args.bind.startswith("mpi:"):
        return run_process(args)
    if args.bind != "mpi://":
        raise ConfigError(f"--bind {args.bind}: write mpi:// alone; mpirun says which rank this is")
    for flag in ("key_file", "insecure_network", "exit_with_parent"):
        if getattr(args, flag):
            raise ConfigError(f"--{flag.replace('_', '-')} is not for --bind mpi://; leave it out")
    start_logging(args)
    raise_file_limit()
    if args.cores:
        try:
            keep_to_cores(args.cores)
        except ValueError as error:
            raise ConfigError(f"--cores: {error}") from error
    try:
        check_budget(args.kv_cache_memory)
    except ValueError as error:
        raise ConfigError(f"--kv-cache-memory: {error}") from error
    # MPI starts when every rank has asked for it, however long that takes, and nothing can be said meanwhile.
    logging.info("waits for all ranks: this command, or one with --transport mpi")
    with unhandled():
        return mpi_r_worker(kv_cache_bytes=args.kv_cache_memory, num_threads=args.threads, kernel=args.kernel)
