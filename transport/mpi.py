"""MPI: every rank of one ``mpirun`` can talk to every other; ``mpi://RANK`` is a rank of COMM_WORLD.

Only buffer calls (Isend, Improbe, Recv of the matched message): the lower-case ones pickle.  A message is a
manifest ``[magic, num_frames, bytes of each]`` (int64), then the frames, all with one tag, so that after
anything unexpected the next manifest is found again.

An exception may come between any two instructions of this file (Ctrl-C), but none within a call of mpi4py, nor within
what is called by a function written in C.  So whatever MPI has been told is noted by the same call that tells it.

MPI has no wait with a deadline, and a blocking Recv spins a core, so waiting is a probe that first yields
and then backs off to short sleeps.  MPI has no recovery either: a rank that dies takes the job with it.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import starmap
from operator import itemgetter
from typing import Any

import numpy as np

from transport.channel import Arrival
from transport.codec import LIMITS, Buffer
from transport.errors import AddressError, ChannelClosed, PeerTimeout, ProtocolError
from transport.mpi_start import import_mpi

logger = logging.getLogger(__name__)

_TO_R_WORKER, _TO_S_WORKER = 7101, 7102  # tags
_MAGIC = 0x46444D50  # "FDMP"
_MAX_MANIFEST_BYTES = 8 * (2 + LIMITS.max_frames)
_MAX_UNFINISHED_SENDS = 256
_YIELDS_BEFORE_SLEEP = 200
_LONGEST_SLEEP_S = 1e-3
_REST_OF_MESSAGE_S = 5.0
_CLOSE_TIMEOUT_S = 5.0

# Answers carry no more than their sender, so two links of one rank to another would take each other's.
_linked_ranks: set[int] = set()
# MPI may still use these buffers, so they must not go away.
_never_read: list[tuple[Any, Buffer]] = []


class _Mailbox:
    """Sends and receives whole messages with one tag each way; keeps buffers alive until MPI has read them."""

    def __init__(self, send_tag: int, recv_tag: int) -> None:
        self._mpi = import_mpi()
        self._comm = self._mpi.COMM_WORLD
        self._send_tag, self._recv_tag = send_tag, recv_tag
        self._unfinished: deque[tuple[Any, Buffer]] = deque()
        self._arriving = _Arriving()

    def send(self, rank: int, frames: Sequence[Buffer], timeout_s: float) -> None:
        sizes = [memoryview(frame).nbytes for frame in frames]
        manifest = np.array([_MAGIC, len(frames), *sizes], np.int64)
        buffers = [manifest.data.cast("B"), *frames]
        send = partial(self._comm.Isend, dest=rank, tag=self._send_tag)
        whole = zip(map(send, [[buffer, self._mpi.BYTE] for buffer in buffers]), buffers, strict=True)
        self._unfinished.extend(whole)  # all frames or none
        self.flush(timeout_s, rank, at_most=_MAX_UNFINISHED_SENDS)

    def flush(self, timeout_s: float, rank: object, at_most: int = 0) -> None:
        """Lets MPI progress until no more than `at_most` sends are unfinished."""

        def few_enough() -> bool | None:
            while self._unfinished and self._unfinished[0][0].Test():
                self._unfinished.popleft()
            return True if len(self._unfinished) <= at_most else None

        _wait(few_enough, timeout_s, f"rank {rank} does not take messages")

    def recv(self, source: int, timeout_s: float, complaint: str) -> tuple[int, list[Buffer]]:
        """The next message from `source` (or anyone) as (rank, frames).

        A message that has begun to arrive gets `_REST_OF_MESSAGE_S` more.  Interrupted, the next call goes on with it.
        """
        deadline = time.monotonic() + timeout_s + _REST_OF_MESSAGE_S
        arriving = self._arriving
        try:
            if not arriving.parts:
                self._match(source, timeout_s, complaint)
            rank = arriving.rank
            manifest = self._take(0, _MAX_MANIFEST_BYTES, deadline)
            numbers = np.frombuffer(manifest, np.int64) if len(manifest) % 8 == 0 else np.empty(0, np.int64)
            if len(numbers) < 3 or numbers[0] != _MAGIC or numbers[1] != len(numbers) - 2:
                raise _Refused(rank, f"rank {rank} sent {len(manifest)} bytes that are not a manifest")
            frames: list[Buffer] = []
            for place, size in enumerate(numbers[2:].tolist(), 1):
                if len(arriving.parts) == place:
                    self._match(rank, deadline - time.monotonic(), f"rank {rank} sent half a message")
                frame = self._take(place, LIMITS.max_array_bytes, deadline)
                frames.append(frame)
                if len(frame) != size:
                    raise _Refused(rank, f"rank {rank} announced a frame of {size} bytes and sent {len(frame)}")
        except (PeerTimeout, ProtocolError):
            self._arriving = _Arriving()
            raise
        self._arriving = _Arriving()
        return rank, frames

    def has_mail(self, source: int) -> bool:
        """Whether a message from `source` has begun to arrive."""
        return bool(self._arriving.parts) or bool(self._comm.Iprobe(source=source, tag=self._recv_tag))

    def close(self, who: str) -> None:
        """Gives unread messages a moment; what nobody ever reads is kept for the life of the process."""
        _never_read.extend(self._arriving.taken)
        try:
            self.flush(_CLOSE_TIMEOUT_S, who)
        except PeerTimeout as error:
            logger.warning("%s; %d messages were left unread", error, len(self._unfinished))
            _never_read.extend(self._unfinished)

    def _match(self, source: int, timeout_s: float, complaint: str) -> None:
        """The next part of the message that arrives."""
        parts, status = self._arriving.parts, self._mpi.Status()
        probe = partial(self._comm.Improbe, source=source, tag=self._recv_tag, status=status)
        num_before = len(parts)

        def is_here() -> bool | None:
            parts.extend(filter(_is_matched, zip(starmap(probe, ((),)), (status,), strict=True)))
            return True if len(parts) > num_before else None

        _wait(is_here, timeout_s, complaint)

    def _take(self, place: int, max_bytes: int, deadline: float) -> bytearray:
        """A part that was matched."""
        matched, status = self._arriving.parts[place]
        size, rank = status.Get_count(self._mpi.BYTE), status.Get_source()
        if size > max_bytes:
            try:  # a matched message has to be received; into no buffer at all, MPI drops it as truncated
                matched.Recv([bytearray(0), self._mpi.BYTE])
            except self._mpi.Exception:
                pass
            raise _Refused(rank, f"a frame of {size} bytes is over the limit of {max_bytes}")
        taken = self._arriving.taken
        if len(taken) == place:
            fresh = bytearray(size)
            taken.extend(zip(map(matched.Irecv, ([fresh, self._mpi.BYTE],)), (fresh,), strict=True))
        request, buffer = taken[place]
        try:
            _wait(lambda: request.Test() or None, deadline - time.monotonic(), f"rank {rank} stalls within a message")
        except PeerTimeout:
            _never_read.append((request, buffer))
            raise
        return buffer


class _Arriving:
    """A message, as far as it is here."""

    def __init__(self) -> None:
        self.parts: list[tuple[Any, Any]] = []  # matched, and its status
        self.taken: list[tuple[Any, bytearray]] = []  # the request, and where it writes; of each part, or but the last

    @property
    def rank(self) -> int:
        return int(self.parts[0][1].Get_source())


_is_matched = itemgetter(0)  # None: nothing was there


class _Refused(ProtocolError):
    def __init__(self, rank: int, text: str) -> None:
        super().__init__(text)
        self.rank = rank


class MPILink:
    def __init__(self, rank: int) -> None:
        self.peer = f"rank {rank}"
        self._rank = rank
        self._mailbox = _Mailbox(_TO_R_WORKER, _TO_S_WORKER)
        self._closed = False

    def send_frames(self, frames: Sequence[Buffer], timeout_s: float) -> None:
        self._check_open()
        self._mailbox.send(self._rank, frames, timeout_s)

    def recv_frames(self, timeout_s: float) -> Sequence[Buffer]:
        self._check_open()
        complaint = f"no answer from {self.peer} within {timeout_s:.3g} s"
        return self._mailbox.recv(self._rank, timeout_s, complaint)[1]

    def is_readable(self) -> bool:
        return self._closed or self._mailbox.has_mail(self._rank)

    def close(self) -> None:
        if not self._closed:
            _linked_ranks.discard(self._rank)
            self._closed = True
            self._mailbox.close(str(self._rank))

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelClosed(f"the channel to {self.peer} was closed by this side")


class MPIPort:
    def __init__(self) -> None:
        self._mailbox = _Mailbox(_TO_S_WORKER, _TO_R_WORKER)
        self._any_source = import_mpi().ANY_SOURCE
        self.address = f"mpi://{import_mpi().COMM_WORLD.Get_rank()}"
        self._closed = False

    def recv_frames(self, timeout_s: float) -> Arrival:
        self._check_open()
        complaint = f"nobody wrote to {self.address} within {timeout_s:.3g} s"
        try:
            return Arrival(*self._mailbox.recv(self._any_source, timeout_s, complaint))
        except _Refused as error:
            return Arrival(error.rank, ())  # no frames: the codec refuses them, and the sender is told

    def send_frames(self, peer: Hashable, frames: Sequence[Buffer], timeout_s: float) -> None:
        self._check_open()
        assert isinstance(peer, int), "peers of an MPI port are ranks"
        self._mailbox.send(peer, frames, timeout_s)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._mailbox.close("an S-worker's")

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelClosed("the port was closed by this side")


def connect(address: str) -> MPILink:
    rank_text, size = address.removeprefix("mpi://"), import_mpi().COMM_WORLD.Get_size()
    if not rank_text.isdecimal() or int(rank_text) >= size:
        raise AddressError(f"{address!r}: write mpi://RANK with a rank from 0 to {size - 1}, the size of this mpirun")
    rank = int(rank_text)
    if rank in _linked_ranks:
        raise AddressError(f"{address} has a channel from this rank already; close that one first")
    _linked_ranks.add(rank)
    return MPILink(rank)


def listen(address: str) -> MPIPort:
    own = f"mpi://{import_mpi().COMM_WORLD.Get_rank()}"
    if address not in ("mpi://", own):
        raise AddressError(f"{address!r}: this rank listens on {own}")
    return MPIPort()


def _wait(ready: Callable[[], Any], timeout_s: float, complaint: str) -> Any:
    """The first result of `ready` that is not None.  Raises PeerTimeout with `complaint`."""
    deadline, tries, pause_s = time.monotonic() + timeout_s, 0, 20e-6
    while (result := ready()) is None:
        if time.monotonic() > deadline:
            raise PeerTimeout(complaint)
        tries += 1
        if tries < _YIELDS_BEFORE_SLEEP:
            os.sched_yield()
        else:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_SLEEP_S)
    return result
