"""R-workers started, found and ended: as threads of this process, or as processes of this machine."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from cpu_attention import RWorker, num_usable_cores, pin_thread, serve
from fastdecode import TORCH_THREADS_SPIN
from fastdecode.errors import ConfigError
from fastdecode.holders.processes import STOP_TIMEOUT_S, Processes, cores_of
from fastdecode.holders.rejoin import RWorkerHandle
from transport import AddressError, KeyFileError, Keys, connect, listen, read_keys

logger = logging.getLogger(__name__)


class RWorkers:
    """R-workers that somebody has to end; `handles` is what a pool needs.  Close it after the pool."""

    def __init__(self) -> None:
        self.handles: list[RWorkerHandle] = []
        self._cleanup = ExitStack()

    def add(self, handle: RWorkerHandle) -> None:
        self.at_close(handle.channel.close)
        self.handles.append(handle)

    def at_close(self, action: Callable[[], object]) -> None:
        """Runs `action` at the end; what was added last runs first."""
        self._cleanup.callback(action)

    def close(self) -> None:
        self._cleanup.close()


def read_key_file(key_file: str | None) -> Keys | None:
    """Raises ConfigError."""
    try:
        return None if key_file is None else read_keys(key_file)
    except KeyFileError as error:
        raise ConfigError(f"key_file: {error}") from error


def start_r_workers(
    *,
    transport: str,
    num_workers: int,
    threads_each: int | None,
    kv_cache_bytes_each: int,
    key_file: str | None = None,
) -> RWorkers:
    """`num_workers` on this machine.  transport: inproc, shm, ipc or tcp.  key_file: for tcp alone.

    Raises RWorkerUnreachable, ConfigError (the key file).
    """
    if TORCH_THREADS_SPIN:
        logger.warning(
            "torch was imported before fastdecode, so its threads spin on the cores that R-workers here want: import "
            "fastdecode first, or set GOMP_SPINCOUNT=3000"
        )
    num_threads = threads_each or max(1, num_usable_cores() // num_workers)
    workers = RWorkers()
    try:
        if transport == "inproc":
            for index in range(num_workers):
                cores = cores_of(index, num_workers, num_threads)
                _start_thread(workers, index, num_threads, cores, kv_cache_bytes_each)
        else:
            processes = Processes(
                transport=transport,
                num_workers=num_workers,
                num_threads=num_threads,
                kv_cache_bytes=kv_cache_bytes_each,
                key_file=key_file,
                keys=read_key_file(key_file),
            )
            workers.at_close(processes.close)
            for handle in processes.start():
                workers.add(handle)
    except BaseException:
        workers.close()
        raise
    return workers


def find_r_worker(index: int, address: str, keys: Keys | None = None) -> RWorkerHandle:
    """One that runs already; keys: for tcp://.  Raises AddressError."""
    channel = connect(address, keys if address.startswith("tcp://") else None)
    name = f"R-worker {index} ({address})"
    if address.startswith("mpi://"):
        return RWorkerHandle(name, channel, is_vital=True)
    return RWorkerHandle(name, channel, partial(find_r_worker, index, address, keys))


def find_r_workers(addresses: list[str], keys: Keys | None = None) -> RWorkers:
    """R-workers that run already; keys: of those over tcp://.  Raises ConfigError for an address that cannot be one."""
    workers = RWorkers()
    try:
        for index, address in enumerate(addresses):
            workers.add(find_r_worker(index, address, keys))
    except AddressError as error:
        workers.close()
        raise ConfigError(str(error)) from error
    return workers


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
    workers.add(RWorkerHandle(f"R-worker {index} (a thread)", connect(address)))
