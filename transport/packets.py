"""A connection between two processes of one machine: packets through a Unix socket, large frames beside it.

    packet    num_frames u16 │ has_arena u16 │ held u32 │ arena u32 │ position u64 │ length u64 of each frame │ …
              … the small frames
    arena     the large frames behind one another, from `position` on (see `arena`)

A packet is sent whole or not at all and wakes its reader directly; no thread stands between.  Arenas are numbered: a
new one is made when the old one has become too small, and its file descriptor comes with every packet until the reader
has written that it holds it, for whoever reads may be interrupted (Ctrl-C) and lose a packet.  Without large frames
`position` is where the next one will begin: what lies before it and never came is given back with that.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from transport.arena import ReadArena, WriteArena, align
from transport.codec import LIMITS, Buffer
from transport.errors import MessageTooLarge, PeerLost, PeerTimeout, ProtocolError

INLINE_BYTES = 8 << 10  # frames up to this size travel in the packet
_MIN_ARENA_BYTES = 1 << 20
_MAX_ARENA_BYTES = 1 << 30  # beyond it a writer waits for its reader, unless a single message is larger
_MAX_PACKET_BYTES = 160 << 10  # below the kernel's limit, a socket's send buffer
_RETRY_S = 0.002  # between looks for room

_HEAD = struct.Struct("<HHIIQ")
_IN_ARENA = 1 << 63  # marks a frame's length
_MAX_POSITION = 1 << 62
_FD = struct.Struct("i")
_MAX_FDS = 2  # that may come with a packet; the kernel drops others
_EMPTY = np.empty(0, np.uint8)


def make_socket() -> socket.socket:
    """Keeps the borders of packets, and tells the end of the peer's process."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)


def credentials(sock: socket.socket) -> tuple[int, int]:
    """Process and user of the peer; process 0: in a namespace that is not to be seen from here."""
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid


def wait(sock: socket.socket, event: int, deadline: float) -> bool:
    """Until `event`, POLLIN or POLLOUT; False if it did not come by the deadline."""
    poll = select.poll()
    poll.register(sock, event)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


class PacketSocket:
    """One end, with an arena for each way.  `peer` is named in every error."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        self.socket, self.peer = sock, peer
        self._out: WriteArena | None = None
        self._num_arenas = 0  # made until now
        self._held_there = 0  # number of the arena that the peer has of this side
        self._into: ReadArena | None = None

    def send(self, frames: Sequence[Buffer], deadline: float) -> None:
        """Raises PeerTimeout, PeerLost, MessageTooLarge; then nothing was sent."""
        arrays = [np.frombuffer(frame, np.uint8) if len(frame) else _EMPTY for frame in frames]
        large = [array for array in arrays if len(array) > INLINE_BYTES]
        position = at = self._place(sum(align(len(array)) for array in large), deadline) if large else 0
        for array in large:
            at = self._out.write(at, array)  # type: ignore[union-attr]  # there is one where something was placed
        lengths = [len(array) | (_IN_ARENA if len(array) > INLINE_BYTES else 0) for array in arrays]
        number = 0
        if self._out:
            number, position = self._out.number, position if large else self._out.end
        brings_arena = number > 0 and number != self._held_there
        held = self._into.number if self._into else 0
        head = _HEAD.pack(len(frames), brings_arena, held, number, position)
        head += struct.pack(f"<{len(lengths)}Q", *lengths)
        small = [frame for frame, length in zip(frames, lengths, strict=True) if not length & _IN_ARENA]
        self._send_packet([head, *small], deadline, self._out.fd if self._out and brings_arena else None)

    def recv(self) -> list[Buffer] | None:
        """The frames of the next packet; None if there is none.  Raises PeerLost, ProtocolError."""
        self.give_back()
        try:
            packet, ancillary, _, _ = self.socket.recvmsg(
                _MAX_PACKET_BYTES, socket.CMSG_SPACE(_MAX_FDS * _FD.size), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return None
        except ConnectionResetError:  # it went without reading all; what it wrote before can still be read
            return self.recv()
        if not packet:
            raise PeerLost(f"{self.peer} is gone: its process ended, or closed its end")
        # All that came, or they would stay open: the space for one has room for two, by alignment.
        fds = [fd for _, kind, data in ancillary if kind == socket.SCM_RIGHTS for (fd,) in _FD.iter_unpack(data)]
        try:
            return self._unpack(packet, fds)
        finally:
            for fd in fds:
                os.close(fd)

    def give_back(self) -> None:
        """Lets the peer use again what nobody here looks at any more."""
        if self._into:
            self._into.give_back()

    def close(self) -> None:
        self.socket.close()
        out, self._out, self._into = self._out, None, None  # first: a file descriptor is not to be closed twice
        if out:
            out.close()

    def is_stopped(self) -> bool:
        """Whether the peer's process stands still, as far as this one can see."""
        pid, _ = credentials(self.socket)
        try:
            status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace") if pid else ""
        except OSError:
            return False
        return status.rpartition(")")[2].split()[:1] == ["T"]

    def _place(self, num_bytes: int, deadline: float) -> int:
        """Room in the arena, in a larger one if need be."""
        while (position := self._out.place(num_bytes) if self._out else None) is None:
            old = self._out
            if old is None or old.is_empty or old.capacity < _MAX_ARENA_BYTES:
                capacity = max(_MIN_ARENA_BYTES, 2 * num_bytes, min(2 * old.capacity, _MAX_ARENA_BYTES) if old else 0)
                self._num_arenas += 1
                try:
                    self._out = WriteArena(capacity, self._num_arenas, old.most_in_flight if old else 0)
                except MemoryError as error:
                    raise MessageTooLarge(f"a message of {num_bytes} bytes to {self.peer}: {error}") from error
                if old:
                    old.close()
            elif time.monotonic() >= deadline:
                raise PeerTimeout(f"{self.peer} does not let go of what it was sent")
            else:
                time.sleep(_RETRY_S)
        return position

    def _send_packet(self, packet: list[Buffer], deadline: float, fd: int | None) -> None:
        rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, _FD.pack(fd))]
        while True:
            try:
                self.socket.sendmsg(packet, rights, socket.MSG_DONTWAIT)
                return
            except BlockingIOError:
                if not wait(self.socket, select.POLLOUT, deadline):
                    raise PeerTimeout(f"{self.peer} does not take messages") from None
            except (BrokenPipeError, ConnectionResetError, ConnectionRefusedError) as error:
                raise PeerLost(f"{self.peer} is gone: its process ended, or closed its end") from error

    def _unpack(self, packet: bytes, fds: list[int]) -> list[Buffer]:
        if len(packet) < _HEAD.size:
            raise ProtocolError(f"a packet of {len(packet)} bytes is truncated")
        num_frames, has_arena, held, number, position = _HEAD.unpack_from(packet)
        at = _HEAD.size + 8 * num_frames
        if not 0 < num_frames <= LIMITS.max_frames or len(packet) < at or position >= _MAX_POSITION:
            raise ProtocolError(f"a packet of {num_frames} frames; 1 to {LIMITS.max_frames} may come")
        lengths = struct.unpack_from(f"<{num_frames}Q", packet, _HEAD.size)
        inline = sum(length for length in lengths if not length & _IN_ARENA)
        shared = [length ^ _IN_ARENA for length in lengths if length & _IN_ARENA]
        if at + inline != len(packet) or max(shared, default=0) > LIMITS.max_array_bytes:
            raise ProtocolError("the lengths that a packet states are not those of its frames")
        if has_arena:
            if len(fds) != 1:
                raise ProtocolError("a packet announces shared memory that did not come with it")
            if not self._into or self._into.number < number:
                max_bytes = 2 * LIMITS.max_frames * LIMITS.max_array_bytes
                self._into = ReadArena(fds[0], max_bytes=max_bytes, number=number)
        self._held_there = held
        into = self._into if self._into and self._into.number == number else None
        if shared and not into:
            raise ProtocolError("a packet refers to shared memory that never came")
        if into and not shared:
            into.pass_over(position)
        small = memoryview(packet)[at:]
        large = into.view(position, sum(map(align, shared))) if into and shared else memoryview(b"")
        frames: list[Buffer] = []
        for length in lengths:
            if length & _IN_ARENA:
                length ^= _IN_ARENA
                frames.append(large[:length])
                large = large[align(length) :]
            else:
                frames.append(small[:length])
                small = small[length:]
        return frames
