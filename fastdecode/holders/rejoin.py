"""R-workers that come back, or come new: started or connected to beside the engine, which never waits for them.

    lost ─► a pause ─► started again, or connected to ─► Hello ─► Welcome ─► taken by the engine between two steps
                ▲                   │ fails
                └── twice as long ──┘

What comes back has nothing of its earlier life: a process of its own, or at least a session of its own, whose nonce no
answer of the old one carries.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from fastdecode.errors import RWorkerError
from transport import Channel, Hello, Message, PeerTimeout, TransportError, Welcome

_Result = TypeVar("_Result")

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0
_STEADY_S = 60.0  # one that is lost again before that is given a longer pause than the last time
_CONNECT_S = 5.0
_WELCOME_S = 120.0  # an R-worker compiles its kernels when a session opens
_LOOK_S = 0.2  # between looks at whether all of this is to end
_CLOSE_S = 10.0


@dataclass(frozen=True)
class RWorkerHandle:
    """One R-worker as the S-worker's side sees it."""

    name: str  # for errors: "R-worker 1 (process 4711, ipc:///...)"
    channel: Channel
    again: Callable[[], RWorkerHandle] | None = None  # starts or finds it once more; may take long; None: cannot
    is_vital: bool = False  # nothing goes on without it: MPI has no recovery


@dataclass(frozen=True, eq=False)
class Joined:
    """An R-worker with a session open and nothing in it."""

    worker: int  # its place in the pool
    handle: RWorkerHandle
    welcome: Welcome


class Rejoin:
    def __init__(self, hello: Hello) -> None:
        self._hello = hello
        self._joined: deque[Joined] = deque()
        self._has_joined = threading.Event()
        self._threads: list[threading.Thread] = []
        self._sought: dict[int, threading.Thread] = {}  # by worker
        self._lock = threading.Lock()  # for the threads: new R-workers may be asked for in any thread
        self._is_closing = threading.Event()
        self._pauses: dict[int, float] = {}  # by worker, the one before its next attempt
        self._since: dict[int, float] = {}  # by worker, when it joined

    def seek(self, worker: int, again: Callable[[], RWorkerHandle]) -> None:
        """Goes on until it is there; `look` tells.  One that is sought already is not sought twice."""
        if time.monotonic() - self._since.get(worker, 0.0) > _STEADY_S:
            self._pauses.pop(worker, None)
        thread = threading.Thread(target=self._seek, args=(worker, again), name=f"rejoin-{worker}", daemon=True)
        with self._lock:
            before = self._sought.get(worker)
            if before is None or not before.is_alive():
                self._sought[worker] = thread
                self._threads = [other for other in self._threads if other.is_alive()] + [thread]
                thread.start()

    def look(self, wait_s: float = 0.0) -> list[Joined]:
        """Those that are there now; told again until `taken`, so that none is lost between the two.

        wait_s: for the first one, if there is none.
        """
        if wait_s > 0 and not self._joined:
            self._has_joined.wait(wait_s)
        return list(self._joined)

    def taken(self, joined: Joined) -> None:
        """It belongs to the caller, who has put it where it is to be."""
        if joined in self._joined:
            self._joined.remove(joined)
        self._has_joined.clear()
        if self._joined:
            self._has_joined.set()

    def close(self) -> None:
        """Ends all attempts, and whatever has joined and was not taken."""
        self._is_closing.set()
        deadline = time.monotonic() + _CLOSE_S
        with self._lock:
            threads = [thread for thread in self._threads if thread.ident is not None]
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for joined in self.look():
            joined.handle.channel.close()

    def _seek(self, worker: int, again: Callable[[], RWorkerHandle]) -> None:
        lost = time.monotonic()
        while not self._is_closing.wait(pause := self._pauses.get(worker, _FIRST_PAUSE_S)):
            self._pauses[worker] = min(2 * pause, _LONGEST_PAUSE_S)
            try:
                joined = self._attempt(worker, again)
            except (RWorkerError, TransportError, OSError) as error:
                logger.info("R-worker %d does not come back yet: %s", worker, error)
            except Exception:  # nobody else looks for it, so this goes on whatever it was
                logger.warning("R-worker %d does not come back yet", worker, exc_info=True)
            else:
                if joined is None:
                    continue
                self._since[worker] = time.monotonic()
                name, took_s = joined.handle.name, time.monotonic() - lost
                logger.warning("%s joins, after %.1f s; new sequences go there", name, took_s)
                del self._sought[worker]
                self._joined.append(joined)
                self._has_joined.set()
                return

    def _attempt(self, worker: int, again: Callable[[], RWorkerHandle]) -> Joined | None:
        """As `_open`.  Raises whatever `again` and the transport do."""
        handle = again()
        welcome = None
        try:
            welcome = self._open(handle)
        finally:
            if welcome is None:
                handle.channel.close()
        return Joined(worker, handle, welcome) if welcome else None

    def _open(self, handle: RWorkerHandle) -> Welcome | None:
        """None if it refuses, or all of this is to end.  Raises TransportError."""
        self._wait(partial(handle.channel.send, self._hello), _CONNECT_S)
        reply: Message | None = self._wait(handle.channel.recv, _WELCOME_S)
        if reply is not None and not isinstance(reply, Welcome):
            logger.info("%s does not come back yet: it answered %s", handle.name, reply)
            return None
        return reply

    def _wait(self, call: Callable[..., _Result], timeout_s: float) -> _Result | None:
        """`call`, a short wait at a time; None if all of this is to end.  Raises TransportError."""
        deadline = time.monotonic() + timeout_s
        while not self._is_closing.is_set():
            try:
                return call(timeout_s=_LOOK_S)
            except PeerTimeout:
                if time.monotonic() > deadline:
                    raise
        return None
