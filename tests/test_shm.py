"""Shared memory: rings that never overwrite what somebody looks at, and packets from whom nobody should trust."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transport import Attend, BadDelivery, Channel, Listener, PeerTimeout, Ping, Release, connect, listen, shm
from transport.arena import ReadArena, WriteArena, align
from transport.errors import ProtocolError
from transport.packets import PacketSocket, make_socket

LARGE = np.arange(64 * 8 * 32, dtype=np.float32).reshape(64, 8, 32)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Listener, Channel]]:
    with listen(f"shm://{tmp_path}/s") as listener, connect(listener.address) as channel:
        yield listener, channel


@settings(deadline=None)
@given(
    capacity=st.integers(1, 5),
    moves=st.lists(st.one_of(st.integers(1, 12_000), st.integers(-3, -1)), max_size=60),
)
def test_ring_keeps_what_is_looked_at(capacity: int, moves: list[int]) -> None:
    """Messages of any size, let go of in any order: no byte of a living one changes, and room comes back."""
    writer = WriteArena(capacity << 12)
    reader = ReadArena(writer.fd, 1 << 20)
    alive: deque[tuple[int, memoryview]] = deque()
    for number, move in enumerate(moves):
        if move < 0:
            if alive:
                alive.rotate(move)
                alive.popleft()
            continue
        reader.give_back()
        position = writer.place(align(move))
        if position is None:
            assert alive or align(move) > writer.capacity, "there is room in an empty ring"
            continue
        writer.write(position, np.full(move, number % 251, np.uint8))
        alive.append((number % 251, reader.view(position, align(move))[:move]))
        assert all((np.frombuffer(view, np.uint8) == fill).all() for fill, view in alive)
    alive.clear()
    reader.give_back()
    assert writer.is_empty
    writer.close()


@pytest.mark.parametrize("in_flight", [1, 2, 3, 5])
def test_few_in_flight_stay_in_front(in_flight: int) -> None:
    """However large the ring, memory that is used again and again stays in the cache; and there is always room."""
    writer = WriteArena(1 << 20)
    reader = ReadArena(writer.fd, 1 << 20)
    flying: deque[memoryview] = deque()
    generator = np.random.default_rng(0)
    for _ in range(2000):
        position = writer.place(4096)
        assert position is not None and position % writer.capacity <= 4 * in_flight * 4096
        flying.append(reader.view(position, 4096))
        while len(flying) > generator.integers(in_flight):
            flying.popleft()
            reader.give_back()
    writer.close()


def test_an_array_that_is_kept_stays_as_it_is(pair: tuple[Listener, Channel]) -> None:
    """For ever: the ring is left to it, and a larger one made for the others."""
    listener, channel = pair
    channel.send(Attend(0, 0, 0, LARGE, LARGE, LARGE), timeout_s=5)
    kept = listener.recv(timeout_s=5).envelope.message
    assert isinstance(kept, Attend)
    for step in range(50):
        channel.send(Attend(step, 0, 0, -LARGE, -LARGE, -LARGE), timeout_s=5)
        listener.recv(timeout_s=5)
    for array in (kept.q, kept.k, kept.v):
        assert np.array_equal(array, LARGE)


@pytest.mark.parametrize("passing", [3, 32, 150])
def test_one_that_is_kept_while_others_pass_costs_so_much_and_no_more(
    passing: int, pair: tuple[Listener, Channel]
) -> None:
    """Again and again: the ring grows until all of them find room, and not with every time."""
    listener, channel = pair
    num_bytes = 3 * align(LARGE.nbytes)
    kept = None
    for number in range(40 * passing):
        channel.send(Attend(number, 0, 0, LARGE, LARGE, LARGE), timeout_s=5)
        message = listener.recv(timeout_s=5).envelope.message
        kept = message if number % passing == 0 else kept
        del message
    arena = channel._link._end._out  # type: ignore[attr-defined]
    assert kept and arena.capacity <= max(1 << 20, 8 * passing * num_bytes)


def test_what_was_checked_cannot_change(pair: tuple[Listener, Channel]) -> None:
    """Whole numbers say where kernels read and write: they are copied out of the memory that their sender can write."""
    listener, channel = pair
    channel.send(Release(np.arange(5000)), timeout_s=5)
    message = listener.recv(timeout_s=5).envelope.message
    arena = channel._link._end._out  # type: ignore[attr-defined]
    arena._data[:] = 255
    assert isinstance(message, Release) and np.array_equal(message.seq_ids, np.arange(5000))


def test_a_larger_ring_is_announced_though_the_first_attempt_fails(pair: tuple[Listener, Channel]) -> None:
    listener, channel = pair
    sent = 0
    with pytest.raises(PeerTimeout, match="does not take messages"):
        while sent < 10_000:
            channel.send(Ping(sent), timeout_s=0.05)
            sent += 1
    with pytest.raises(PeerTimeout):  # it brings the first ring
        channel.send(Attend(0, 0, 0, LARGE, LARGE, LARGE), timeout_s=0.05)
    for token in range(sent):
        assert listener.recv(timeout_s=5).envelope.message == Ping(token)
    channel.send(Attend(0, 0, 0, LARGE, LARGE, LARGE), timeout_s=5)
    message = listener.recv(timeout_s=5).envelope.message
    assert isinstance(message, Attend) and np.array_equal(message.v, LARGE)


def test_reader_that_reads_nothing_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Listener, Channel]
) -> None:
    """Shared memory ends somewhere; so does patience."""
    monkeypatch.setattr("transport.packets._MAX_ARENA_BYTES", 1 << 20)
    _, channel = pair
    with pytest.raises(PeerTimeout, match="let go"):
        for step in range(100):
            channel.send(Attend(step, 0, 0, LARGE, LARGE, LARGE), timeout_s=0.05)


def test_a_stopped_process_is_seen(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        assert not PacketSocket(ours, "this very process").is_stopped()


def a_file(kind: str) -> int:
    match kind:
        case "sealed":
            return WriteArena(1 << 16).fd
        case "unsealed":
            fd = os.memfd_create("x")
            os.ftruncate(fd, 1 << 16)
        case "empty":
            fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        case _:
            fd, other = os.pipe()
            os.close(other)
    return fd


def a_packet(lengths: list[int], *, num_frames: int = 1, has_arena: int = 0, position: int = 0) -> bytes:
    return struct.pack(f"<HHIIQ{len(lengths)}Q", num_frames, has_arena, 0, 1, position, *lengths)


SHARED = 1 << 63  # a frame in the arena
HOSTILE = {
    "a few bytes": (b"abc", ""),
    "no frames": (a_packet([], num_frames=0), ""),
    "too many frames": (a_packet([0] * 99, num_frames=99), ""),
    "lengths are missing": (a_packet([7], num_frames=5), ""),
    "a length that overflows": (a_packet([SHARED - 1]), ""),
    "lengths that overflow together": (a_packet([1 << 62, 1 << 62], num_frames=2), ""),
    "less than it states": (a_packet([10]) + b"x", ""),
    "an arena that never came": (a_packet([SHARED | 20_000]), ""),
    "an arena announced, none sent": (a_packet([SHARED | 20_000], has_arena=1), ""),
    "an arena that can shrink": (a_packet([SHARED | 20_000], has_arena=1), "unsealed"),
    "an arena of nothing": (a_packet([SHARED | 20_000], has_arena=1), "empty"),
    "a pipe for an arena": (a_packet([SHARED | 20_000], has_arena=1), "pipe"),
    "a frame larger than the arena": (a_packet([SHARED | 1 << 20], has_arena=1), "sealed"),
    "a frame over the arena's end": (a_packet([SHARED | 20_000], has_arena=1, position=60_032), "sealed"),
    "a crooked position": (a_packet([SHARED | 20_000], has_arena=1, position=7), "sealed"),
    "a position out of this world": (a_packet([SHARED | 20_000], has_arena=1, position=2**64 - 64), "sealed"),
    "a huge frame": (a_packet([2**64 - 1], has_arena=1), "sealed"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_packets(what: str, pair: tuple[Listener, Channel]) -> None:
    """Refused, nothing leaks, and the others are served."""
    listener, channel = pair
    channel.send(Ping(0), timeout_s=5)
    listener.recv(timeout_s=5)
    packet, kind = HOSTILE[what]
    fds = [a_file(kind)] if kind else []
    with make_socket() as hostile:
        hostile.connect(listener.address.removeprefix("shm://"))
        hostile.sendmsg([packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd)) for fd in fds])
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(BadDelivery):
            listener.recv(timeout_s=5)
        assert len(os.listdir("/proc/self/fd")) <= before + 2  # its connection; a mapping keeps one of its own
        channel.send(Ping(1), timeout_s=5)
        assert listener.recv(timeout_s=5).envelope.message == Ping(1)
    for fd in fds:
        os.close(fd)


def test_memory_that_nobody_has_taken_yet() -> None:
    """A file of a gigabyte without a page: whoever maps or reads it would have to find them."""
    fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 30)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(ProtocolError, match="its writer has taken 0 only"):
        ReadArena(fd, 1 << 31)
    assert os.fstat(fd).st_blocks == 0
    os.close(fd)


@pytest.mark.parametrize("has_arena", [0, 1])
@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_files_that_came_are_closed(count: int, has_arena: int, pair: tuple[Listener, Channel]) -> None:
    """However many: one that stays open with each packet is the end of a worker after a thousand."""
    listener, _ = pair
    with make_socket() as hostile:
        hostile.connect(listener.address.removeprefix("shm://"))
        opened = []
        for _ in range(20):
            fds = [a_file("sealed") for _ in range(count)]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{count}i", *fds))]
            hostile.sendmsg([a_packet([3], has_arena=has_arena) + b"abc"], rights)
            for fd in fds:
                os.close(fd)
            with pytest.raises(BadDelivery):
                listener.recv(timeout_s=5)
            opened.append(len(os.listdir("/proc/self/fd")))
    assert opened[-1] == opened[0]


@settings(deadline=None, max_examples=300)
@given(packet=st.binary(min_size=1, max_size=200))
def test_any_bytes(packet: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        theirs.send(packet)
        try:
            PacketSocket(ours, "x").recv()
        except ProtocolError:
            pass


def test_many_strangers_come_and_go(pair: tuple[Listener, Channel]) -> None:
    """Those who only connect, those who leave at once: no file descriptor stays, the others are served."""
    listener, channel = pair
    channel.send(Ping(0), timeout_s=5)
    assert listener.recv(timeout_s=5).envelope.message == Ping(0)
    before = len(os.listdir("/proc/self/fd"))
    for token in range(300):
        with make_socket() as stranger:
            stranger.connect(listener.address.removeprefix("shm://"))
        channel.send(Ping(token), timeout_s=5)
        assert listener.recv(timeout_s=5).envelope.message == Ping(token)
    with pytest.raises(PeerTimeout):
        listener.recv(timeout_s=0.05)
    assert len(os.listdir("/proc/self/fd")) == before


def test_deadline_holds_while_connecting(tmp_path: Path) -> None:
    began = time.monotonic()
    with connect(f"shm://{tmp_path}/nobody") as channel, pytest.raises(PeerTimeout, match="is it running"):
        channel.recv(timeout_s=0.1)
    assert time.monotonic() - began < 2


def test_a_port_without_file_descriptors_pauses(
    pair: tuple[Listener, Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits to be accepted stays ready: neither a loop without a pause, nor a peer that is never taken."""
    listener, channel = pair
    channel.send(Ping(1), timeout_s=5)
    assert listener.recv(timeout_s=5).envelope.message == Ping(1)
    tries = 0

    def refuse(listening: socket.socket) -> None:
        nonlocal tries
        tries += 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch, connect(listener.address) as second:
        patch.setattr(shm, "_ACCEPT_PAUSE_S", 0.2)
        patch.setattr(socket.socket, "accept", refuse)
        with pytest.raises(PeerTimeout):
            listener.recv(timeout_s=0.1)
        channel.send(Ping(2), timeout_s=5)
        assert listener.recv(timeout_s=5).envelope.message == Ping(2) and tries == 1
        patch.undo()
        second.send(Ping(3), timeout_s=5)
        assert listener.recv(timeout_s=5).envelope.message == Ping(3)
