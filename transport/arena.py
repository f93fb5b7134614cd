"""Memory that two processes of one machine share: one writes messages into it, the other reads them where they lie.

    ├ consumed ┤        ┌── pending ──┐
    │ u64      │ free   │ msg 7 │ msg 8 │ free        │      a ring; a message never wraps
               0        ▲               ▲         capacity
                     consumed        produced               positions, which only grow; offset = position % capacity

The reader's arrays are views of the ring.  Room is given back when the last view of a message has gone, whoever kept
it, so nobody has to know how long an array is good for.  The file has no name, is sealed against shrinking (a reader
of pages that are no more would be killed), and its pages are taken when it is made, not when they are first written.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np

from transport.errors import ProtocolError

ALIGNMENT = 64  # of every frame: a cache line, and the widest vector
_HEADER = 4096  # the data begins on a page of its own
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SEAL") else 0
_FLAGS = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)

IS_SUPPORTED = bool(_SEALS) and hasattr(os, "memfd_create")


def align(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class WriteArena:
    """The writer's side.  Raises MemoryError if the system has not so much.

    What was placed and never sent, because an exception came between, is given back by what is sent after it.
    """

    def __init__(self, capacity: int, number: int = 1, most_in_flight: int = 0) -> None:
        """number: by which both sides call it; most_in_flight: bytes, of the one before it."""
        self.number = number
        self.capacity = -(-capacity // mmap.PAGESIZE) * mmap.PAGESIZE
        self.fd = os.memfd_create("fastdecode", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(self.fd, 0, _HEADER + self.capacity)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            memory = mmap.mmap(self.fd, 0, flags=_FLAGS)
        except OSError as error:
            os.close(self.fd)
            raise MemoryError(f"no {self.capacity} bytes for messages to another process: {error}") from error
        self._shared_consumed = np.frombuffer(memory, np.uint64, 1)
        self._data = np.frombuffer(memory, np.uint8, self.capacity, _HEADER)
        self._consumed = self._produced = 0
        self._passed_over = 0, 0  # positions between which nothing lies, the last ones
        self.most_in_flight = most_in_flight  # bytes, since the first arena

    @property
    def end(self) -> int:
        """Position up to which everything was placed."""
        return self._produced

    @property
    def is_empty(self) -> bool:
        """Whether the reader has let go of everything."""
        self._look()
        return self._consumed == self._produced

    def place(self, num_bytes: int) -> int | None:
        """Position of so many aligned bytes in a row; None while there is no room.

        As near to the front as may be: few messages in flight stay in few cache lines, however large the ring is.  But
        not before what was in flight at most has room there: who holds one message while others pass does it again.
        """
        self._look()
        if self._consumed == self._produced:
            self._produced = self._consumed = self._next_turn(self._produced)
        self.most_in_flight = max(self.most_in_flight, self._in_flight + num_bytes)
        start = self._produced % self.capacity
        if start and (start + num_bytes > self.capacity or self._is_front_free()):
            position = self._next_turn(self._produced)
        else:
            position = self._produced
        if num_bytes > self.capacity or position + num_bytes > self._consumed + self.capacity:
            return None
        if position > self._produced:
            self._passed_over = self._produced, position
        self._produced = position + num_bytes
        return position

    def write(self, position: int, frame: np.ndarray) -> int:
        """frame: [n] uint8.  Where the next one goes."""
        start = position % self.capacity
        self._data[start : start + len(frame)] = frame
        return position + align(len(frame))

    def close(self) -> None:
        """The memory itself goes when both sides have let go of it."""
        os.close(self.fd)

    def _look(self) -> None:
        told = int(self._shared_consumed[0])
        if self._consumed <= told <= self._produced:  # the reader's word is believed as far as it can be true
            self._consumed = told

    def _next_turn(self, position: int) -> int:
        return -(-position // self.capacity) * self.capacity

    @property
    def _in_flight(self) -> int:
        """Bytes."""
        begin, end = self._passed_over
        return self._produced - self._consumed - (end - begin if self._consumed <= begin else 0)

    def _is_front_free(self) -> bool:
        """Whether there is room for twice as much as ever was in flight before all that is: it would soon be in the
        way.
        """
        in_front = self._consumed % self.capacity
        return in_front + self._produced - self._consumed <= self.capacity and in_front >= 2 * self.most_in_flight


class ReadArena:
    """The reader's side of an arena that came as a file descriptor, which stays the caller's.

    Raises ProtocolError if the file could harm the reader.
    """

    def __init__(self, fd: int, max_bytes: int, number: int = 1) -> None:
        self.number = number
        try:
            is_sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            size, taken = os.fstat(fd).st_size, os.fstat(fd).st_blocks * 512
            if not is_sealed or not _HEADER < size <= _HEADER + max_bytes:
                raise ProtocolError(f"shared memory of {size} bytes is oversized, empty or not sealed")
            if taken < size:  # mapped, the rest would be taken by this process
                raise ProtocolError(f"of {size} bytes of shared memory its writer has taken {taken} only")
            memory = mmap.mmap(fd, size, flags=_FLAGS)
        except (OSError, ValueError) as error:
            raise ProtocolError(f"what came is no shared memory: {error}") from error
        self._shared_consumed = np.frombuffer(memory, np.uint64, 1)
        self._data = np.frombuffer(memory, np.uint8, size - _HEADER, _HEADER)
        # End of each message, and its bytes.
        self._pending: deque[tuple[int, Callable[[], np.ndarray | None]]] = deque()

    def view(self, position: int, num_bytes: int) -> memoryview:
        """A message's bytes; they stay until this view and all that was made of it are gone.  Raises ProtocolError."""
        capacity = len(self._data)
        start = position % capacity
        if start % ALIGNMENT or start + num_bytes > capacity:
            raise ProtocolError(f"a message of {num_bytes} bytes at {start} does not lie in {capacity} shared bytes")
        region = self._data[start : start + num_bytes]
        self._pending.append((position + num_bytes, weakref.ref(region)))
        return region.data

    def pass_over(self, position: int) -> None:
        """Nothing more will come before it."""
        self._pending.append((position, _nothing))

    def give_back(self) -> None:
        """Tells the writer how far everything has been let go of."""
        consumed = None
        while self._pending and self._pending[0][1]() is None:
            consumed, _ = self._pending.popleft()
        if consumed is not None:
            self._shared_consumed[0] = consumed


def _nothing() -> None:
    return None
