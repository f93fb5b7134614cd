"""R-workers started, found and ended: as threads of this process, or as processes of this machine."""

from __future__ import annotations

import logging
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from cpu_attention import (
    LISTENING,
    RWorker,
    available_cores,
    format_cores,
    pin_thread,
    serve,
)
from fastdecode import TORCH_THREADS_SPIN
from fastdecode.errors import ConfigError, RWorkerUnreachable
from fastdecode.rpool import RWorkerHandle
from transport import AddressError, connect, listen

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0


class RWorkers:
    """R-workers that somebody has to end; `handles` is what a pool needs.  Close it after the pool."""

    def __init__(self) -> None:
        self.handles: list[RWorkerHandle] = []
        self._cleanup = ExitStack()

    def connect(self, name: str, address: str) -> None:
        """Raises AddressError."""
        channel = connect(address)
        self.at_close(channel.close)
        self.handles.append(RWorkerHandle(name, channel))

    def at_close(self, action: Callable[[], object]) -> None:
        """Runs `action` at the end; what was added last runs first."""
        self._cleanup.callback(action)

    def close(self) -> None:
        self._cleanup.close()


def start_r_workers(
    *, transport: str, num_workers: int, threads_each: int | None, kv_cache_bytes_each: int
) -> RWorkers:
    """`num_workers` on this machine.  transport: inproc, shm, ipc or tcp.  Raises RWorkerUnreachable."""
    if TORCH_THREADS_SPIN:
        logger.warning(
            "torch was imported before fastdecode, so its threads spin on the cores that R-workers here want: import "
            "fastdecode first, or set GOMP_SPINCOUNT=3000"
        )
    num_threads = threads_each or max(1, len(available_cores()) // num_workers)
    workers = RWorkers()
    try:
        if transport == "inproc":
            for index in range(num_workers):
                cores = _cores(index, num_workers, num_threads)
                _start_thread(workers, index, num_threads, cores, kv_cache_bytes_each)
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
            workers.connect(f"R-worker {index} ({address})", address)
    except AddressError as error:
        workers.close()
        raise ConfigError(str(error)) from error
    return workers


def _cores(index: int, num_workers: int, num_threads: int) -> tuple[int, ...]:
    """For the threads of one of several R-workers on this machine; none if there are not enough for all."""
    cores = available_cores()
    share = len(cores) // num_workers
    return cores[index * share :][:num_threads] if num_threads <= share else ()


def _start_thread(workers: RWorkers, index: int, num_threads: int, cores: tuple[int, ...], kv_cache_bytes: int) -> None:
    address = f"inproc://r-worker-{index}-{uuid.uuid4().hex[:8]}"
    listener = listen(address)
    worker = RWorker(kv_cache_bytes=kv_cache_bytes, num_threads=num_threads, cores=cores)

    def run() -> None:
        try:
            if cores:
                pin_thread(cores[0])
            serve(listener, worker)
        finally:
            listener.close()  # so that the S-worker learns of a thread that fails
            worker.close()

    thread = threading.Thread(target=run, name=f"r-worker-{index}", daemon=True)
    thread.start()
    workers.at_close(partial(thread.join, STOP_TIMEOUT_S))
    workers.at_close(listener.close)
    workers.connect(f"R-worker {index} (a thread)", address)


def _start_processes(
    workers: RWorkers, transport: str, num_workers: int, num_threads: int, kv_cache_bytes: int
) -> None:
    directory = Path(tempfile.mkdtemp(prefix="fastdecode-"))  # for this user alone
    workers.at_close(partial(shutil.rmtree, directory, ignore_errors=True))
    processes: list[subprocess.Popen[bytes]] = []
    workers.at_close(partial(_stop_processes, processes))
    for index in range(num_workers):
        cores = _cores(index, num_workers, num_threads)
        placement = ["--cores", format_cores(cores)] if cores else []
        bind = "tcp://127.0.0.1:0" if transport == "tcp" else f"{transport}://{directory}/{index}"
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
                    *placement,
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
        workers.connect(f"R-worker {index} (process {process.pid}, {address})", address)


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
