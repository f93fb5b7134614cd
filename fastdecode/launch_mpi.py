"""One mpirun, many ranks: rank 0 is the S-worker, every other rank an R-worker.

rank 0      table of roles ─► main() ──────────────────────► dismiss the others ─► exit code
rank 1…     table of roles ─► serve an R-worker … until dismissed ───────────────► exit code 0
any rank    an exception: the message, then MPI_Abort, which ends all of them
rank 0      one that does not end when it is dismissed: its name, then MPI_Abort
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

import msgspec
import numpy as np

from cpu_attention import (
    RWorker,
    available_cores,
    available_memory_bytes,
    default_kv_cache_bytes,
    format_bytes,
    format_cores,
    numa_nodes,
    serve,
    share_of_cores,
)
from fastdecode.errors import ConfigError
from transport import AddressError, Goodbye, TransportError, connect, import_mpi, keep_freed_memory, listen

logger = logging.getLogger(__name__)

_DISMISS_TIMEOUT_S = 10.0
_ROLE_BYTES = 512
_MAX_CORES = 4096
_END_TAG = 7103  # what a rank says last
_LOOK_S = 0.002


def mpi_addresses() -> list[str]:
    """Every rank but this one, which must be rank 0 of at least two.  Raises ConfigError."""
    comm = _world()
    if comm.Get_size() < 2:
        raise ConfigError(
            "transport 'mpi' wants one rank for the S-worker and one or more for R-workers; start it "
            "with, for example, mpirun -n 3 fastdecode generate MODEL --transport mpi"
        )
    if comm.Get_rank() != 0:
        raise ConfigError(
            "only rank 0 runs the S-worker; start scripts through fastdecode.mpi_main, which makes the "
            "other ranks R-workers"
        )
    return [f"mpi://{rank}" for rank in range(1, comm.Get_size())]


def mpi_main(main: Callable[[], int], *, kv_cache_bytes: int | None = None, num_threads: int | None = None) -> int:
    """Runs `main` on rank 0 and an R-worker on every other rank, until `main` returns.  Returns the exit code.

    A rank that fails ends the whole job with a non-zero code: MPI has no recovery.  The other way round, when
    rank 0 ends, well or not, the R-workers are dismissed.  Raises ConfigError without MPI.

    kv_cache_bytes, num_threads: of each R-worker; None: a share of what its host has.
    """
    comm = _world()
    rank = comm.Get_rank()
    try:
        num_sharing, cores = _place(comm)
        _print_roles(comm, cores)
        if rank == 0:
            try:
                code = main()
            except Exception:
                raise  # told below, and all are ended
            except BaseException:
                _dismiss(comm)
                raise
            _dismiss(comm)
            return code
        keep_freed_memory()
        kv_cache_bytes = kv_cache_bytes or default_kv_cache_bytes() // num_sharing
        num_threads = num_threads or max(1, len(cores))
        if cores:
            os.sched_setaffinity(0, cores)  # before the KV is touched: memory is taken where its first user runs
        pinned = cores[:num_threads] if num_threads <= len(cores) else ()
        worker = RWorker(kv_cache_bytes=kv_cache_bytes, num_threads=num_threads, cores=pinned)
        with listen("mpi://") as listener:
            serve(listener, worker, dismissable=True)
        worker.close()
        comm.Isend(np.empty(0, np.uint8), dest=0, tag=_END_TAG).Free()
        return 0
    except Exception:
        print(f"rank {rank} on {platform.node()} failed and ends the job:", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
        comm.Abort(1)
        raise


def _world() -> Any:
    try:
        return import_mpi().COMM_WORLD
    except AddressError as error:
        raise ConfigError(str(error)) from error


class _Role(msgspec.Struct):
    rank: int
    host: str
    role: str
    pid: int
    cores: str
    memory_bytes: int


def _print_roles(comm: Any, cores: tuple[int, ...]) -> None:
    """A table of who does what, printed by rank 0 before anything is loaded."""
    rank, size = comm.Get_rank(), comm.Get_size()
    own = _Role(
        rank,
        platform.node()[:200],
        "S-worker" if rank == 0 else "R-worker",
        os.getpid(),
        format_cores(cores or available_cores())[:100],
        available_memory_bytes(),
    )
    sent = np.zeros(_ROLE_BYTES, np.uint8)
    encoded = msgspec.json.encode(own)
    sent[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    received = np.zeros((size, _ROLE_BYTES), np.uint8) if rank == 0 else None
    comm.Gather(sent, received, root=0)
    if received is None:
        return
    print(f"{'rank':>4}  {'role':8}  {'host':20}  {'pid':>8}  {'cores':>9}  free memory", file=sys.stderr)
    for row in received:
        role = msgspec.json.decode(row.tobytes().rstrip(b"\0"), type=_Role)
        print(
            f"{role.rank:>4}  {role.role:8}  {role.host:20}  {role.pid:>8}  {role.cores:>9}  "
            f"{format_bytes(role.memory_bytes)}",
            file=sys.stderr,
            flush=True,
        )

    print("if a rank ends, mpirun ends the whole job: MPI has no recovery", file=sys.stderr, flush=True)


def _place(comm: Any) -> tuple[int, tuple[int, ...]]:
    """How many R-workers there are on this host, and the cores of this rank; none: wherever the system likes.

    Ranks that mpirun or srun has bound, each to cores of its own, stay there.  Otherwise R-workers share what all of
    them may use, a NUMA node each where there is one for all.
    """
    local = comm.Split_type(import_mpi().COMM_TYPE_SHARED)
    own = np.zeros(1 + _MAX_CORES, np.uint8)
    own[0] = comm.Get_rank() != 0
    own[[1 + core for core in available_cores() if core < _MAX_CORES]] = 1
    rows = np.zeros((local.Get_size(), 1 + _MAX_CORES), np.uint8)
    local.Allgather(own, rows)
    is_r_worker, masks = rows[:, 0] == 1, rows[:, 1:]
    num_sharing = max(1, int(is_r_worker.sum()))
    if comm.Get_rank() == 0:
        return num_sharing, ()
    if not (masks[is_r_worker] == own[1:]).all():
        return num_sharing, available_cores()
    index = int(is_r_worker[: local.Get_rank()].sum())
    return num_sharing, share_of_cores(index, num_sharing, available_cores(), numa_nodes())


def _dismiss(comm: Any) -> None:
    """Every rank but this one; who does not end is named, and made to, because MPI would wait for it for ever."""
    staying = set(range(1, comm.Get_size()))
    for rank in staying:
        try:
            with connect(f"mpi://{rank}") as channel:
                channel.send(Goodbye(dismiss=True), timeout_s=_DISMISS_TIMEOUT_S)
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
