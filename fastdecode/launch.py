"""R-workers started, found and ended: as threads, as processes, or as the other ranks of an mpirun."""

from __future__ import annotations

import logging
import os
import platform
import selectors
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec
import numpy as np

from cpu_attention import (
    LISTENING,
    RWorker,
    available_cores,
    available_memory_bytes,
    default_kv_cache_bytes,
    format_bytes,
    serve,
)
from fastdecode.errors import ConfigError, RWorkerUnreachable
from fastdecode.rpool import RWorkerHandle
from transport import AddressError, Goodbye, TransportError, connect, import_mpi, listen

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0


class RWorkers:
    """R-workers that somebody has to end; `handles` is what a pool needs.  Close it after the pool."""

    def __init__(self) -> None:
        self.handles: list[RWorkerHandle] = []
        self._cleanup = ExitStack()

    def close(self) -> None:
        self._cleanup.close()


def start_r_workers(
    *, transport: str, num_workers: int, threads_each: int | None, kv_cache_bytes_each: int
) -> RWorkers:
    """`num_workers` on this machine.  transport: inproc, ipc or tcp.  Raises RWorkerUnreachable."""
    num_threads = threads_each or max(1, len(available_cores()) // num_workers)
    workers = RWorkers()
    try:
        if transport == "inproc":
            for index in range(num_workers):
                _start_thread(workers, index, num_threads, kv_cache_bytes_each)
        else:
            _start_processes(workers, transport, num_workers, num_threads, kv_cache_bytes_each)
    except BaseException:
        workers.close()
        raise
    return workers


def find_r_workers(addresses: list[str]) -> RWorkers:
    """R-workers that run already.  Raises ConfigError for an address that cannot be one."""
    workers = RWorkers()
    try:
        for index, address in enumerate(addresses):
            _connect(workers, f"R-worker {index} ({address})", address)
    except AddressError as error:
        workers.close()
        raise ConfigError(str(error)) from error
    return workers


def mpi_addresses() -> list[str]:
    """Every rank but this one, which must be rank 0 of at least two.  Raises ConfigError."""
    try:
        comm = import_mpi().COMM_WORLD
    except AddressError as error:
        raise ConfigError(str(error)) from error
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
    rank 0 ends, well or not, the R-workers are dismissed.
    """
    mpi = import_mpi()
    comm = mpi.COMM_WORLD
    rank = comm.Get_rank()
    try:
        _print_roles(comm)
        if rank == 0:
            try:
                return main()
            finally:
                _dismiss(range(1, comm.Get_size()))
        worker = RWorker(
            kv_cache_bytes=kv_cache_bytes or default_kv_cache_bytes() // max(1, _ranks_on_this_host(comm) - 1),
            num_threads=num_threads or max(1, len(available_cores()) // max(1, _ranks_on_this_host(comm) - 1)),
        )
        with listen("mpi://") as listener:
            serve(listener, worker, dismissable=True)
        worker.close()
        return 0
    except Exception:
        print(f"rank {rank} on {platform.node()} failed and ends the job:", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
        comm.Abort(1)
        raise


def _start_thread(workers: RWorkers, index: int, num_threads: int, kv_cache_bytes: int) -> None:
    address = f"inproc://r-worker-{index}-{uuid.uuid4().hex[:8]}"
    listener = listen(address)
    worker = RWorker(kv_cache_bytes=kv_cache_bytes, num_threads=num_threads)

    def run() -> None:
        try:
            serve(listener, worker)
        finally:
            listener.close()  # so that the S-worker learns of a thread that fails
            worker.close()

    thread = threading.Thread(target=run, name=f"r-worker-{index}", daemon=True)
    thread.start()
    workers._cleanup.callback(thread.join, STOP_TIMEOUT_S)
    workers._cleanup.callback(listener.close)
    _connect(workers, f"R-worker {index} (a thread)", address)


def _start_processes(
    workers: RWorkers, transport: str, num_workers: int, num_threads: int, kv_cache_bytes: int
) -> None:
    directory = Path(tempfile.mkdtemp(prefix="fastdecode-"))  # for this user alone
    workers._cleanup.callback(shutil.rmtree, directory, ignore_errors=True)
    processes: list[subprocess.Popen[bytes]] = []
    workers._cleanup.callback(_stop_processes, processes)
    for index in range(num_workers):
        bind = f"ipc://{directory}/{index}" if transport == "ipc" else "tcp://127.0.0.1:0"
        processes.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "cpu_attention",
                    "--bind",
                    bind,
                    "--kv-cache-memory",
                    str(kv_cache_bytes),
                    "--threads",
                    str(num_threads),
                    "--log-level",
                    "warning",
                    "--exit-with-parent",
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for us; we end them
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(filter(None, [_source_root(), os.environ.get("PYTHONPATH")]))},
            )
        )
    deadline = time.monotonic() + START_TIMEOUT_S
    for index, process in enumerate(processes):
        address = _read_address(index, process, deadline)
        _connect(workers, f"R-worker {index} (process {process.pid}, {address})", address)


def _connect(workers: RWorkers, name: str, address: str) -> None:
    channel = connect(address)
    workers._cleanup.callback(channel.close)
    workers.handles.append(RWorkerHandle(name, channel))


def _read_address(index: int, process: subprocess.Popen[bytes], deadline: float) -> str:
    """The address in the process's first line."""
    assert process.stdout is not None
    line = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            if not selector.select(max(0.0, deadline - time.monotonic())):
                raise RWorkerUnreachable(
                    f"R-worker {index} (process {process.pid}) did not start within {START_TIMEOUT_S:g} s"
                )
            chunk = os.read(process.stdout.fileno(), 4096)
            if not chunk:
                raise RWorkerUnreachable(
                    f"R-worker {index} (process {process.pid}) ended at its start with exit code {process.wait(5)}; "
                    "its message is above"
                )
            line += chunk
    return line.decode().strip().removeprefix(LISTENING)


def _stop_processes(processes: list[subprocess.Popen[bytes]]) -> None:
    """Their standard inputs end, so they end, side by side; one that does not is made to."""
    for process in processes:
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()
    deadline = time.monotonic() + STOP_TIMEOUT_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            logger.warning("R-worker process %d does not end by itself and is killed", process.pid)
            process.kill()
            process.wait()


def _source_root() -> str:
    """Where this project's packages lie, so that workers find them without being installed."""
    return str(Path(__file__).resolve().parents[1])


class _Role(msgspec.Struct):
    rank: int
    host: str
    role: str
    pid: int
    cores: int
    memory_bytes: int


_ROLE_BYTES = 512


def _print_roles(comm: object) -> None:
    """A table of who does what, printed by rank 0 before anything is loaded."""
    rank, size = comm.Get_rank(), comm.Get_size()  # type: ignore[attr-defined]
    own = _Role(
        rank,
        platform.node()[:200],
        "S-worker" if rank == 0 else "R-worker",
        os.getpid(),
        len(available_cores()),
        available_memory_bytes(),
    )
    sent = np.zeros(_ROLE_BYTES, np.uint8)
    encoded = msgspec.json.encode(own)
    sent[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    received = np.zeros((size, _ROLE_BYTES), np.uint8) if rank == 0 else None
    comm.Gather(sent, received, root=0)  # type: ignore[attr-defined]
    if received is None:
        return
    print(f"{'rank':>4}  {'role':8}  {'host':20}  {'pid':>8}  {'cores':>5}  free memory", file=sys.stderr)
    for row in received:
        role = msgspec.json.decode(row.tobytes().rstrip(b"\0"), type=_Role)
        print(
            f"{role.rank:>4}  {role.role:8}  {role.host:20}  {role.pid:>8}  {role.cores:>5}  "
            f"{format_bytes(role.memory_bytes)}",
            file=sys.stderr,
            flush=True,
        )


def _ranks_on_this_host(comm: object) -> int:
    for name in ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return int(comm.Get_size())  # type: ignore[attr-defined]


def _dismiss(ranks: range) -> None:
    for rank in ranks:
        try:
            with connect(f"mpi://{rank}") as channel:
                channel.send(Goodbye(dismiss=True), timeout_s=STOP_TIMEOUT_S)
        except TransportError as error:
            logger.warning("rank %d takes no goodbye: %s", rank, error)
