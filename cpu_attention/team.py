"""Threads that do the shares of a compiled job together, without the interpreter: no lock, no queue, no Python object.

    caller    fills the board, opens the gate, wakes    takes shares … none left    shuts the gate, waits
    helper    asleep on `round`                         in at the gate, takes shares …, out        asleep

Shares are taken from one counter, so a helper that comes late finds nothing to do, and one that never comes is not
missed: the caller waits for those alone that are inside.  While the gate is shut nobody reads the board, so that the
next job can be written on it.

Helpers are Python's threads, pinned one to a core, which stay inside one compiled call for all their life.  A forked
process has none of them, and starts its own when it first needs some.  Threads of numba's are not used: its pool does
not survive a fork, and one per process would be shared by all callers.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from ctypes import Structure, addressof, c_int32, c_int64
from typing import Any

import numpy as np
from numba import carray, njit, types

from cpu_attention.compiling import compiled
from cpu_attention.machine import pin_thread
from cpu_attention.native import Entry, call, fail, fetch_add, load, pointer, sleep, store, wake, wake_all

_SHUT = 1 << 30
_LOOKS = 200  # of a caller that is done at the gate, before it sleeps: the others will be done, too
_PATIENCE_S = 1  # then it looks whether the helpers are alive
_END_S = 5.0  # to wait for helpers' ends, at the end
_ENDED = "the threads of this R-worker have ended"
_LINE = c_int32 * 31  # with what it follows two cache lines: processors fetch them in pairs


class _Board(Structure):
    _fields_ = [
        ("round", c_int32),  # of jobs; helpers sleep on it
        ("_0", _LINE),
        ("gate", c_int32),  # helpers inside, and _SHUT if no more may come; the caller sleeps on it
        ("_1", _LINE),
        ("next", c_int32),  # the share that is taken next
        ("_2", _LINE),
        ("is_closed", c_int32),
        ("num_shares", c_int32),
        ("entry", c_int64),
        ("job", c_int64),
        ("code", c_int64),  # of a share that failed, see `native.call`
        ("raised", c_int64),
        ("patience", c_int64 * 2),  # seconds, nanoseconds
    ]


_BOARD = np.dtype(_Board)
_ROUND, _GATE, _NEXT, _CLOSED, _PATIENCE = (
    getattr(_Board, name).offset for name in ("round", "gate", "next", "is_closed", "patience")
)
_ADDRESS = types.int64


@compiled
def _do_all(entry, job, num_shares):  # type: ignore[no-untyped-def]
    """On this thread alone."""
    for share in range(num_shares):
        code, raised = call(entry, job, share)
        fail(code, raised)


@njit
def _take_shares(board):  # type: ignore[no-untyped-def]
    b = carray(pointer(board), 1, _BOARD)[0]
    share = fetch_add(board + _NEXT, 1)
    while share < b.num_shares:
        code, raised = call(b.entry, b.job, share)
        if code != 0:
            b.code, b.raised = code, raised
            store(board + _NEXT, b.num_shares)
        share = fetch_add(board + _NEXT, 1)


@njit
def _is_over(board):  # type: ignore[no-untyped-def]
    """Whether all helpers have left the gate, which is shut; waits for it, but not for ever.  Then raises what a share
    raised."""
    b = carray(pointer(board), 1, _BOARD)[0]
    for _ in range(_LOOKS):
        if load(board + _GATE) == _SHUT:
            break
    inside = load(board + _GATE)
    while inside != _SHUT:
        woken = sleep(board + _GATE, inside, board + _PATIENCE)
        now = load(board + _GATE)
        if woken != 0 and now == inside:  # time is up, or a signal came, which Python shall see
            return False
        inside = now
    code = b.code
    b.code = 0
    fail(code, b.raised)
    return True


@compiled
def _lead(board, entry, job, num_shares, num_helpers):  # type: ignore[no-untyped-def]
    """The caller's part.  The gate is shut, nobody inside.  Returns `_is_over`."""
    b = carray(pointer(board), 1, _BOARD)[0]
    b.entry, b.job, b.num_shares, b.code = entry, job, num_shares, 0
    store(board + _NEXT, 0)
    fetch_add(board + _GATE, -_SHUT)
    fetch_add(board + _ROUND, 1)
    wake(board + _ROUND, num_helpers)
    _take_shares(board)
    fetch_add(board + _GATE, _SHUT)
    return _is_over(board)


@compiled
def _wait_on(board):  # type: ignore[no-untyped-def]
    return _is_over(board)


@compiled
def _help(board):  # type: ignore[no-untyped-def]
    """A helper's life."""
    seen = 0
    while True:
        while load(board + _ROUND) == seen and load(board + _CLOSED) == 0:
            sleep(board + _ROUND, seen, 0)
        seen = load(board + _ROUND)
        if load(board + _CLOSED) != 0:
            return
        if fetch_add(board + _GATE, 1) < _SHUT:
            _take_shares(board)
        if fetch_add(board + _GATE, -1) == _SHUT + 1:
            wake(board + _GATE, 1)


class _Crew:
    """The helpers of one process, and the board they read."""

    def __init__(self, num_helpers: int, cores: Sequence[int]) -> None:
        self.pid, self.lock, self.board = os.getpid(), threading.Lock(), _Board(gate=_SHUT, patience=(_PATIENCE_S, 0))
        self.address = addressof(self.board)
        for function, count in ((_lead, 5), (_wait_on, 1), (_help, 1)):
            function.compile((_ADDRESS,) * count)
        self.inside: Any = None  # what a job that was broken off still uses
        self.is_lost = False
        self.threads: list[threading.Thread] = []
        # They know the board and not the crew, which therefore ends when nobody has it any more, or the interpreter.
        self.end = weakref.finalize(self, _end, self.board, self.threads, self.lock, self.pid)
        for index in range(num_helpers):
            core = cores[(index + 1) % len(cores)] if cores else None
            thread = threading.Thread(target=_serve, args=(self.board, core), name=f"attend_{index}", daemon=True)
            thread.start()
            self.threads.append(thread)

    def run(self, entry: int, job: int, num_shares: int, uses: Any) -> None:
        """By the holder of `lock`."""
        if self.inside is not None:  # the last call was interrupted while it waited
            self._wait()
        self.inside = uses
        num_helpers = min(len(self.threads), num_shares - 1)
        if not _lead(self.address, entry, job, num_shares, num_helpers):
            self._wait()
        self.inside = None

    def check_open(self) -> None:
        if self.board.is_closed:
            raise RuntimeError(_ENDED)

    def _wait(self) -> None:
        """Raises RuntimeError if it would be for ever."""
        while not _wait_on(self.address):
            if not all(thread.is_alive() for thread in self.threads):
                self.is_lost = True
                raise RuntimeError("a thread of this R-worker died in the middle of its work")


class Team:
    def __init__(self, num_threads: int, cores: Sequence[int] = ()) -> None:
        """cores: its threads are pinned to the second and following ones; the first is for the caller to take by
        `pin_thread`.  None given: not pinned."""
        self.num_threads, self._cores = num_threads, tuple(cores)
        self._crew: _Crew | None = None
        self._is_closed = False

    def start(self) -> None:
        """What the first `run` would do otherwise: compile, start threads."""
        _do_all.compile((_ADDRESS,) * 3)
        if self.num_threads > 1:
            self._present_crew()

    def run(self, entry: Entry, job: Structure, num_shares: int, uses: Any) -> None:
        """All shares of `job`, each once, on this thread and the helpers; while another thread is calling, on this one
        alone.  Raises what the entry does, and RuntimeError once the team or the interpreter has ended.

        uses: whatever the job has addresses of; it is kept until no thread can be reading it.
        """
        if self.num_threads > 1 and num_shares > 1:
            crew = self._present_crew()
            if crew.lock.acquire(blocking=False):
                try:
                    crew.check_open()
                    crew.run(entry.address, addressof(job), num_shares, (entry, job, uses))
                    return
                finally:
                    crew.lock.release()
            crew.check_open()
        _do_all(entry.address, addressof(job), num_shares)

    def close(self) -> None:
        """The helpers' end, once they are done with what they are doing."""
        self._is_closed = True
        if self._crew is not None:
            self._crew.end()

    def _present_crew(self) -> _Crew:
        """This process's: in a forked one the parent's has a board, but nobody who reads it."""
        crew = self._crew
        if self._is_closed:
            raise RuntimeError(_ENDED)
        if crew is None or crew.is_lost or crew.pid != os.getpid():
            crew = self._crew = _Crew(self.num_threads - 1, self._cores)
        return crew


ALONE = Team(1)


def _serve(board: _Board, core: int | None) -> None:
    if core is not None:
        pin_thread(core)
    _help(addressof(board))


def _end(board: _Board, threads: list[threading.Thread], lock: threading.Lock, pid: int) -> None:
    if pid != os.getpid():  # a forked process, which has none of these threads
        return
    board.is_closed = 1
    # An interpreter that ends stops other threads wherever they are: better not inside a call.
    is_free = lock.acquire(timeout=_END_S)
    board.round += 1 << 20  # so that no call that comes between brings the old number back
    wake_all(addressof(board) + _ROUND)
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(_END_S)
    if is_free:
        lock.release()
