"""Hostile peers of an R-worker: one for each way to reach it, below the channel that a well-behaved one would use."""

from __future__ import annotations

import array
import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import zmq

from bench.fuzz_messages import Frames, Maker
from transport.arena import WriteArena
from transport.multipart import checksum
from transport.packets import PacketSocket, make_socket

HANG_S = 120.0  # an R-worker that compiles takes nothing meanwhile, but not for as long as this
_SMALL = 64 << 10


class Peer(Protocol):
    def send(self, frames: Frames) -> None:
        """What is wrong is in the frames.  Raises TimeoutError: the R-worker hangs; OSError: it threw this peer out."""

    def send_raw(self, maker: Maker, frames: Frames) -> None:
        """What is wrong is below them, in what the transport adds."""

    def replies(self) -> Iterator[Frames]:
        """Those at hand."""

    def wait(self, timeout_s: float) -> None:
        """For a reply."""

    def close(self) -> None: ...


class SharedMemoryPeer:
    def __init__(self, address: str) -> None:
        self._socket = make_socket()
        self._socket.settimeout(HANG_S)
        self._socket.connect(address.removeprefix("shm://"))
        self._socket.settimeout(None)
        self._end = PacketSocket(self._socket, "R-worker")
        self._kept: list[Frames] = []  # replies that came while this side was sending

    def send(self, frames: Frames) -> None:
        self._patiently(lambda: self._end.send(frames[:60], time.monotonic()))

    def send_raw(self, maker: Maker, frames: Frames) -> None:
        r = maker.random
        lengths = [len(frame) | (r.random() < 0.3) << 63 for frame in frames[:12]]
        if lengths and r.random() < 0.5:
            lengths[r.randrange(len(lengths))] = r.choice((0, 1, 2**63 - 1, 2**63, 2**64 - 1, r.getrandbits(64)))
        head = struct.pack(
            f"<HHIIQ{len(lengths)}Q", r.choice((len(lengths), len(lengths), r.getrandbits(16))), r.choice((0, 1, 1, 7)),
            r.choice((0, 1, 1, r.getrandbits(32))), r.choice((0, 1, 1, 2, r.getrandbits(32))),
            r.choice((0, 64, 4096, 2**40, 2**62, r.getrandbits(64))), *lengths,
        )  # fmt: skip
        packet = (head + b"".join(frames))[: r.choice((_SMALL, _SMALL, r.randint(1, 200)))]
        files = [_a_file(maker) for _ in range(r.choice((0, 0, 1, 1, 2, 3)))]
        try:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files).tobytes())]
            self._patiently(lambda: self._socket.sendmsg([packet], rights if files else [], socket.MSG_DONTWAIT))
        finally:
            for file in files:
                os.close(file)

    def replies(self) -> Iterator[Frames]:
        kept, self._kept = self._kept, []
        yield from kept
        while (frames := self._end.recv()) is not None:
            yield [bytes(frame) for frame in frames]

    def wait(self, timeout_s: float) -> None:
        _poll(self._socket, select.POLLIN, timeout_s)

    def close(self) -> None:
        self._end.close()

    def _patiently(self, attempt: Callable[[], object]) -> None:
        """Reads meanwhile, as the R-worker may be waiting for that."""
        deadline = time.monotonic() + HANG_S
        while time.monotonic() < deadline:
            try:
                attempt()
                return
            except (BlockingIOError, TimeoutError):
                self._kept = list(self.replies())
                _poll(self._socket, select.POLLOUT, 0.01)
        raise TimeoutError(f"takes nothing for {HANG_S:.0f} s")


class ZeroMQPeer:
    """A DEALER, and beside it bare sockets that speak ZMTP or nothing at all."""

    _context = zmq.Context()

    def __init__(self, address: str) -> None:
        self._address, self._bare = address, list[socket.socket]()
        self._has_checksum = address.startswith("tcp://")
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger, self._socket.sndhwm, self._socket.rcvhwm = 0, 200, 0
        self._socket.connect(address)

    def send(self, frames: Frames) -> None:
        if not self._socket.poll(int(HANG_S * 1000), zmq.POLLOUT):
            raise TimeoutError(f"takes nothing for {HANG_S:.0f} s")
        frames = frames or [b""]
        # A right one, or nothing would get past it; wrong ones come by `send_raw`.
        self._socket.send_multipart([*frames, checksum(frames)] if self._has_checksum else frames)

    def send_raw(self, maker: Maker, frames: Frames) -> None:
        r = maker.random
        if not self._bare or r.random() < 0.3:
            self._bare.append(_bare_socket(self._address))
            self._write(_greeting(maker))
        if self._has_checksum and r.random() < 0.8:
            frames = [*frames, checksum(frames)]
        self._write(b"".join(_zmtp(maker, frames)) if r.random() < 0.9 else r.randbytes(r.choice((1, 64, 4000))))
        if len(self._bare) > 4:
            self._bare.pop(0).close()

    def replies(self) -> Iterator[Frames]:
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
                yield frames[:-1] if self._has_checksum else frames
            except zmq.Again:
                return

    def wait(self, timeout_s: float) -> None:
        self._socket.poll(int(timeout_s * 1000), zmq.POLLIN)

    def close(self) -> None:
        self._socket.close()
        for bare in self._bare:
            bare.close()

    def _write(self, data: bytes) -> None:
        try:
            self._bare[-1].sendall(data)
        except OSError:  # thrown out, rightly
            self._bare.pop().close()
            if not self._bare:
                self._bare.append(_bare_socket(self._address))


def make_peer(address: str) -> Peer:
    return SharedMemoryPeer(address) if address.startswith("shm://") else ZeroMQPeer(address)


def _bare_socket(address: str) -> socket.socket:
    scheme, _, place = address.partition("://")
    made = socket.socket(socket.AF_UNIX if scheme == "ipc" else socket.AF_INET, socket.SOCK_STREAM)
    made.settimeout(HANG_S)
    host, _, port = place.rpartition(":")
    made.connect(place if scheme == "ipc" else (host, int(port)))
    return made


def _greeting(maker: Maker) -> bytes:
    """ZMTP 3.1 with the mechanism NULL, and a DEALER's READY; or something like it."""
    r = maker.random
    version = r.choice((b"\x03\x01", b"\x03\x01", b"\x03\x00", b"\x01\x00", b"\x02\x00", r.randbytes(2)))
    mechanism = r.choice((b"NULL", b"NULL", b"PLAIN", b"CURVE", r.randbytes(4)))
    greeting = b"\xff" + bytes(8) + b"\x7f" + version + mechanism.ljust(20, b"\0") + bytes(32)
    kind = r.choice((b"DEALER", b"DEALER", b"REQ", b"ROUTER", b"PUB", r.randbytes(3)))
    ready = b"\x05READY" + b"\x0bSocket-Type" + len(kind).to_bytes(4, "big") + kind
    if r.random() < 0.2:
        ready += b"\x08Identity" + r.choice((b"\0\0\0\5", b"\xff\xff\xff\xff")) + r.randbytes(5)
    whole = greeting + b"\x04" + bytes([len(ready)]) + ready
    return whole if r.random() < 0.7 else maker.damage([whole])[0]


def _zmtp(maker: Maker, frames: Frames) -> Iterator[bytes]:
    r = maker.random
    for i, frame in enumerate(frames):
        flags = (i < len(frames) - 1) | 2 * (len(frame) > 255)
        length = len(frame).to_bytes(8 if flags & 2 else 1, "big")
        if r.random() < 0.1:
            flags, length = r.randrange(256), r.choice((length, r.randbytes(8), bytes([255]) * 8, bytes(7) + b"\x10"))
        yield bytes([flags]) + length + frame
    if r.random() < 0.1:
        command = r.choice((b"\x04PING\0\x10x", b"\x04PONG", b"\x05ERROR\xff", b"\x09SUBSCRIBE", r.randbytes(9)))
        yield b"\x04" + bytes([len(command)]) + command


def _a_file(maker: Maker) -> int:
    """Shared memory as it should be, or not: unsealed, never paid for, or no memory at all."""
    r = maker.random
    kind = r.choice(("arena", "arena", "unsealed", "hollow", "hollow", "pipe"))
    if kind == "arena":
        made = WriteArena(r.choice((1, 1 << 16)))
        return made.fd
    if kind == "pipe":
        reading, writing = os.pipe()
        os.close(writing)
        return reading
    fd = os.memfd_create("fuzz", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, r.choice((0, 1 << 16, 1 << 34)))
    if kind == "hollow":
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return fd


def _poll(sock: socket.socket, event: int, timeout_s: float) -> None:
    poll = select.poll()
    poll.register(sock, event)
    poll.poll(timeout_s * 1000)
