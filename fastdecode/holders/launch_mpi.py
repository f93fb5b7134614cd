"""One mpirun, many ranks: one is the S-worker, every other rank an R-worker; `mpi_roles` says who is what.

S-worker    table of roles ─► main() ─► end its LLMs ──────► dismiss the others ─► exit code
R-workers   table of roles ─► serve an R-worker … until dismissed ───────────────► exit code 0
all ranks   roles that do not fit: rank 0 tells ─────────────────────────────────► exit code 2
any rank    an exception: the message, then MPI_Abort, which ends all of them
S-worker    one that does not end when it is dismissed: its name, then MPI_Abort
"""

from __future__ import annotations

import logging
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from cpu_attention import KERNELS, RWorker, default_kv_cache_bytes, format_bytes, num_usable_cores, serve
from fastdecode.ending import Ending, open_endings
from fastdecode.errors import ConfigError
from fastdecode.holders.mpi_roles import Roles, exchange_claims
from transport import AddressError, Goodbye, TransportError, connect, import_mpi, keep_freed_memory, listen

logger = logging.getLogger(__name__)

_DISMISS_TIMEOUT_S = 10.0
_END_TAG = 7103  # what a rank says last
_LOOK_S = 0.002

# Of this process, like COMM_WORLD, and only while `main` runs here: an LLM may be made in any thread of it.
_roles: Roles | None = None


def mpi_addresses() -> list[str]:
    """Of all R-workers, by rank, where `mpi_main` runs the S-worker.  Raises ConfigError."""
    if _world().Get_size() < 2:
        raise ConfigError(
            "transport 'mpi' wants one rank for the S-worker and one or more for R-workers; start it "
            "with, for example, mpirun -n 3 fastdecode generate MODEL --transport mpi"
        )
    if _roles is None:
        raise ConfigError(
            "only the S-worker's rank has R-workers; start scripts through fastdecode.mpi_main, which makes the "
            "other ranks R-workers"
        )
    return [f"mpi://{rank}" for rank in _roles.r_worker_ranks]


def mpi_main(
    main: Callable[[], int],
    *,
    s_worker_rank: int | None = None,
    kv_cache_bytes: int | None = None,
    num_threads: int | None = None,
) -> int:
    """Runs `main` on the S-worker's rank and an R-worker on every other one, until `main` returns.

    Returns the exit code: what `main` returns, 0 of an R-worker, 2 if the roles do not fit, which rank 0 tells.
    A rank that fails ends the whole job with a non-zero code: MPI has no recovery.  The other way round, when
    the S-worker ends, well or not, an LLM that `main` has not closed is, and the R-workers are dismissed.  Raises
    ConfigError without MPI.

    s_worker_rank: the same on every rank; None: 0, or the one rank not started by ``fastdecode rworker``.
    kv_cache_bytes, num_threads: of an R-worker on this rank; None: a share of what its host has.
    """
    return _take_part(main, s_worker_rank, kv_cache_bytes=kv_cache_bytes, num_threads=num_threads, kernel="numba")


def mpi_r_worker(*, kv_cache_bytes: int | None = None, num_threads: int | None = None, kernel: str = "numba") -> int:
    """Runs an R-worker on this rank, for the rank that calls `mpi_main`; as there, with a `kernel` of KERNELS."""
    return _take_part(None, None, kv_cache_bytes=kv_cache_bytes, num_threads=num_threads, kernel=kernel)


def _take_part(
    main: Callable[[], int] | None,
    s_worker_rank: int | None,
    *,
    kv_cache_bytes: int | None,
    num_threads: int | None,
    kernel: str,
) -> int:
    """main: None if this rank was started as an R-worker."""
    comm = _world()
    rank = comm.Get_rank()
    try:
        claims = exchange_claims(comm, is_r_worker=main is None, s_worker_rank=s_worker_rank)
        try:
            roles = Roles.of(claims)
        except ConfigError as error:
            if rank == 0:
                print(f"error: {error}", file=sys.stderr, flush=True)
            comm.Barrier()  # the first rank that ends may end the others
            return 2
        if main is None or rank != roles.s_worker_rank:
            _serve_r_worker(comm, roles, kv_cache_bytes=kv_cache_bytes, num_threads=num_threads, kernel=kernel)
            return 0
        return _run_s_worker(comm, roles, main)
    except Exception:
        print(f"rank {rank} on {platform.node()} failed and ends the job:", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
        comm.Abort(1)
        raise


def _run_s_worker(comm: Any, roles: Roles, main: Callable[[], int]) -> int:
    global _roles
    lines = [*roles.table(), "if a rank ends, mpirun ends the whole job: MPI has no recovery"]
    print("\n".join(lines), file=sys.stderr, flush=True)  # at once: R-workers may have a log of their own
    _roles, others = roles, open_endings()
    try:
        code = main()
    except Exception:
        raise  # told by who calls, and all are ended
    except BaseException:
        _end(comm, roles, others)
        raise
    finally:
        _roles = None
    _end(comm, roles, others)
    return code


def _serve_r_worker(
    comm: Any, roles: Roles, *, kv_cache_bytes: int | None, num_threads: int | None, kernel: str
) -> None:
    """Until it is dismissed."""
    rank = comm.Get_rank()
    cores = roles.cores(rank)
    keep_freed_memory()
    beside = len(roles.r_workers_beside(rank))
    kv_cache_bytes = kv_cache_bytes or default_kv_cache_bytes() // beside
    num_threads = num_threads or max(1, min(len(cores), num_usable_cores() // beside))
    if cores:
        os.sched_setaffinity(0, cores)  # before the KV is touched: memory is taken where its first user runs
    pinned = cores[:num_threads] if num_threads <= len(cores) else ()
    worker = RWorker(kv_cache_bytes=kv_cache_bytes, num_threads=num_threads, kernel=KERNELS[kernel], cores=pinned)
    logger.info("%s of KV, %d threads, %s kernel", format_bytes(kv_cache_bytes), num_threads, kernel)
    with listen("mpi://") as listener:
        serve(listener, worker, dismissable=True)
    worker.close()
    comm.Isend(np.empty(0, np.uint8), dest=roles.s_worker_rank, tag=_END_TAG).Free()


def _world() -> Any:
    try:
        return import_mpi().COMM_WORLD
    except AddressError as error:
        raise ConfigError(str(error)) from error


def _end(comm: Any, roles: Roles, others: set[Ending]) -> None:
    """others: what was there before `main`, and stays."""
    for ending in open_endings() - others:
        ending.close()
    _dismiss(comm, roles)


def _dismiss(comm: Any, roles: Roles) -> None:
    """Every R-worker; who does not end is named, and made to, because MPI would wait for it for ever."""
    staying = set(roles.r_worker_ranks)
    for rank in staying:
        try:
            with connect(f"mpi://{rank}") as channel:
                channel.send(Goodbye(dismiss=True), timeout_s=_DISMISS_TIMEOUT_S)
        except AddressError as error:  # this side's fault: a channel that `main` opened itself
            print(f"error: rank {rank} cannot be dismissed, and the job is ended: {error}", file=sys.stderr, flush=True)
            comm.Abort(1)
        except TransportError as error:
            logger.warning("rank %d takes no goodbye: %s", rank, error)
    deadline = time.monotonic() + _DISMISS_TIMEOUT_S
    while staying and time.monotonic() < deadline:
        gone = {rank for rank in staying if comm.Iprobe(source=rank, tag=_END_TAG)}
        for rank in gone:
            comm.Recv(np.empty(0, np.uint8), source=rank, tag=_END_TAG)
        staying -= gone
        time.sleep(0 if gone else _LOOK_S)
    if staying:
        told = " and ".join(f"rank {rank}" for rank in sorted(staying))
        print(f"error: {told} did not end within {_DISMISS_TIMEOUT_S:g} s: hung or stopped; the job is ended",
              file=sys.stderr, flush=True)  # fmt: skip
        comm.Abort(1)
