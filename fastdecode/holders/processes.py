"""R-workers as processes of this machine: started, read the address of, started again when lost, ended."""

from __future__ import annotations

import logging
import os
import selectors
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import cpu_attention
from cpu_attention import LISTENING, available_cores, format_cores, numa_nodes, share_of_cores
from fastdecode.errors import RWorkerUnreachable
from fastdecode.holders.directory import SocketDirectory
from fastdecode.holders.rejoin import RWorkerHandle
from transport import Keys, connect, let_go_in_children

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0


class Processes:
    """Close it after whatever is connected to them."""

    def __init__(
        self,
        *,
        transport: str,
        num_workers: int,
        num_threads: int,
        kv_cache_bytes: int,
        key_file: str | None = None,
        keys: Keys | None = None,
    ) -> None:
        """transport: shm, ipc or tcp; threads and bytes: of each; keys: what key_file holds, for tcp."""
        self._transport, self._num_workers = transport, num_workers
        self._num_threads, self._kv_cache_bytes = num_threads, kv_cache_bytes
        self._key_file, self._keys = key_file, keys
        self._directory = None if transport == "tcp" else SocketDirectory()
        self._running: dict[int, subprocess.Popen[bytes]] = {}  # by index
        self._num_ever = 0
        self._is_closed = False
        self._lock = threading.Lock()  # one may be started again while all are to end
        let_go_in_children(self)

    def start(self) -> list[RWorkerHandle]:
        """All of them, side by side.  Raises RWorkerUnreachable."""
        for index in range(self._num_workers):
            self._spawn(index)
        deadline = time.monotonic() + START_TIMEOUT_S
        return [self._handle(index, deadline) for index in range(self._num_workers)]

    def close(self) -> None:
        """Their standard inputs end, so they end, side by side; one that does not is made to."""
        with self._lock:
            self._is_closed = True
            processes = list(self._running.values())
        try:
            self._end(processes)
        finally:
            for process in processes:  # of an interrupt
                if process.poll() is None:
                    process.kill()
            if self._directory:
                self._directory.close()

    def let_go(self) -> None:
        """In a forked child, where these are nobody's children."""
        self._is_closed = True
        self._lock = threading.Lock()  # which another thread may have held
        for process in list(self._running.values()):
            process.returncode = 0  # so nobody waits for it, or kills it
            _close_pipes(process)

    def _end(self, processes: list[subprocess.Popen[bytes]]) -> None:
        for process in processes:
            _close_pipes(process)
            process.terminate()  # its standard input may be held open by a child of this process
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.warning("R-worker process %d does not end by itself and is killed", process.pid)
                if not _kill(process):
                    logger.warning("R-worker process %d is killed and has not ended; it is left alone", process.pid)

    def _again(self, index: int) -> RWorkerHandle:
        """In place of one that was lost, whose memory is needed.  Raises RWorkerUnreachable."""
        lost = self._running[index]
        if not _kill(lost):
            raise RWorkerUnreachable(
                f"R-worker {index} (process {lost.pid}) is killed and still gives its memory back, which takes longer "
                f"than {STOP_TIMEOUT_S:g} s"
            )
        with self._lock:
            if self._is_closed:
                raise RWorkerUnreachable("all R-workers are to end")
            _close_pipes(lost)
            self._spawn(index)
        return self._handle(index, time.monotonic() + START_TIMEOUT_S)

    def _spawn(self, index: int) -> None:
        cores = cores_of(index, self._num_workers, self._num_threads)
        self._num_ever += 1
        here = f"{self._directory.path}/{self._num_ever - 1}" if self._directory else "127.0.0.1:0"
        # -P: what lies in the directory that this was started in is not ours, whatever it is called.
        command = [
            sys.executable,
            "-P",
            "-m",
            "cpu_attention",
            "--bind",
            f"{self._transport}://{here}",
            "--exit-with-parent",
        ]
        command += ["--kv-cache-memory", str(self._kv_cache_bytes), "--threads", str(self._num_threads)]
        command += ["--cores", format_cores(cores)] if cores else []
        command += ["--key-file", self._key_file] if self._key_file else []
        self._running[index] = subprocess.Popen(
            [*command, "--log-level", "warning"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us; we end them
            env=os.environ | {"PYTHONPATH": os.pathsep.join(import_path())},
        )

    def _handle(self, index: int, deadline: float) -> RWorkerHandle:
        process = self._running[index]
        address = _read_address(index, process, deadline)
        name = f"R-worker {index} (process {process.pid}, {address})"
        return RWorkerHandle(name, connect(address, self._keys), partial(self._again, index))


def cores_of(index: int, num_workers: int, num_threads: int) -> tuple[int, ...]:
    """For the threads of one of several R-workers on this machine; none if there are not enough for all."""
    share = share_of_cores(index, num_workers, available_cores(), numa_nodes())
    return share[:num_threads] if num_threads <= len(share) else ()


def import_path() -> list[str]:
    """Where this process finds modules, for workers to find the same ones: installed, or by a script's own path.

    Where `cpu_attention` lies is in it in any case.
    """
    root = Path(cpu_attention.__file__).resolve().parents[1]
    path = [os.path.abspath(entry) for entry in sys.path]  # an empty one is the current directory
    return path if any(Path(entry).resolve() == root for entry in path) else [str(root), *path]


def _kill(process: subprocess.Popen[bytes]) -> bool:
    """Whether it is gone: freeing much memory takes long."""
    process.kill()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return False
    return True


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


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
                try:
                    how = f"ended at its start with exit code {process.wait(5)}"
                except subprocess.TimeoutExpired:
                    how = "has closed its output and does not end"
                raise RWorkerUnreachable(f"R-worker {index} (process {process.pid}) {how}; its message is above")
            line += chunk
    return line.decode(errors="replace").strip().removeprefix(LISTENING)
