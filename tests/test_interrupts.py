"""An exception (Ctrl-C) between any two instructions: messages are whole or not at all, and the engine goes on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from interrupts import run_until

from transport import Attend, Attended, Channel, Listener, Message, Ping, Pong, connect, listen, make_keys, mpi
from transport.errors import BrokenOff, PeerTimeout

KEYS = make_keys()
SCHEMES = ("inproc", "shm", "ipc", "tcp", "tcp+keys", "mpi")
SMALL = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
LARGE = np.arange(40_000, dtype=np.float32).reshape(-1, 8, 100)  # beyond what is copied, or travels in a packet


class FakeMPI:
    """mpi4py, as far as it is used, of one rank that writes to itself."""

    BYTE, ANY_SOURCE, Exception = "byte", -1, RuntimeError

    def __init__(self) -> None:
        self.queues: dict[int, deque[bytes]] = {}
        self.COMM_WORLD = self

    def Get_rank(self) -> int:
        return 0

    def Get_size(self) -> int:
        return 1

    def Isend(self, what: list[Any], dest: int, tag: int) -> Any:
        self.queues.setdefault(tag, deque()).append(bytes(what[0]))
        return SimpleNamespace(Test=lambda: True)

    def Iprobe(self, source: int, tag: int) -> bool:
        return bool(self.queues.get(tag))

    def Improbe(self, source: int, tag: int, status: Any) -> Any:
        if not self.queues.get(tag):
            return None
        data = self.queues[tag].popleft()
        status.size = len(data)

        def receive(into: list[Any]) -> Any:
            into[0][:] = data
            return SimpleNamespace(Test=lambda: True)

        return SimpleNamespace(Irecv=receive)

    class Status:
        size = 0

        def Get_count(self, kind: str) -> int:
            return self.size

        def Get_source(self) -> int:
            return 0


@contextmanager
def a_pair(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Listener, Channel]]:
    keys, address = None, f"{scheme}://{tmp_path}/s"
    if scheme == "mpi":
        fake = FakeMPI()
        monkeypatch.setattr(mpi, "import_mpi", lambda: fake)
        address = "mpi://0"
    elif scheme.startswith("tcp"):
        keys, address = KEYS if scheme == "tcp+keys" else None, "tcp://127.0.0.1:0"
    with listen(address, keys) as listener, connect(listener.address, keys) as channel:
        yield listener, channel


def until(receive: Callable[[], Message], last: Message) -> list[Message]:
    """All that comes, to the end of `last`."""
    came = [receive()]
    while came[-1] != last:
        came.append(receive())
    return came


def receive_into(came: list[Message], channel: Channel) -> None:
    came.append(channel.recv(timeout_s=5))


def whole(came: list[Message], number: int, array: np.ndarray) -> bool:
    """At most one of them, and that one unchanged."""
    assert len(came) <= 1, "told once"
    for message in came:
        assert isinstance(message, Attend | Attended) and message.step == number
        arrays = (message.q, message.k, message.v) if isinstance(message, Attend) else (message.o,)
        assert all(np.array_equal(each, array) for each in arrays)
    return bool(came)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_message_is_sent_whole_or_not_at_all(scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted at each instruction, and then once more in what makes good for it."""
    outcomes, number, is_interrupted = set(), 0, True
    with a_pair(scheme, tmp_path, monkeypatch) as (listener, channel):
        send = partial(channel.send, timeout_s=5)
        send(Ping(0))
        listener.recv(timeout_s=5)
        while is_interrupted:
            is_interrupted = run_until(number, partial(send, Attend(number, 0, 0, LARGE, LARGE, LARGE)), "transport")
            if is_interrupted and number % 3 == 0:
                run_until(number // 2, partial(send, Ping(0)), "transport")
            send(Ping(1000 + number))
            came = until(lambda: listener.recv(timeout_s=5).envelope.message, Ping(1000 + number))[:-1]
            outcomes.add(whole([message for message in came if message != Ping(0)], number, LARGE))
            came.clear()
            number += 1
    assert number > 30 and outcomes == {True, False}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_message_is_received_whole_or_not_at_all(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number, is_interrupted, num_whole = 0, True, 0
    with a_pair(scheme, tmp_path, monkeypatch) as (listener, channel):
        while is_interrupted:
            channel.send(Ping(number), timeout_s=5)
            answer = partial(listener.send, listener.recv(timeout_s=5).peer, channel.session, timeout_s=5)
            came: list[Message] = []
            answer(Attended(number, 0, 0, LARGE))
            is_interrupted = run_until(number, partial(receive_into, came, channel), "transport")
            answer(Pong(number))
            came += until(partial(channel.recv, timeout_s=5), Pong(number))[:-1]
            num_whole += whole(came, number, LARGE)
            came.clear()
            number += 1
    assert 1 <= num_whole < number and number > 30


def test_an_arena_that_a_reader_lost_comes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packet with its file descriptor can be the one during which the interrupt comes."""
    number, is_interrupted = 0, True
    while is_interrupted:
        (tmp_path / str(number)).mkdir()
        with a_pair("shm", tmp_path / str(number), monkeypatch) as (listener, channel):
            for step in range(4):  # the rings grow
                array = np.full((50 << step, 8, 100), step, np.float32)
                run_until(number, partial(channel.send, Ping(step), timeout_s=5), "transport/packets.py")
                channel.send(Ping(9), timeout_s=5)
                asked = listener.recv(timeout_s=5)
                while asked.envelope.message != Ping(9):
                    asked = listener.recv(timeout_s=5)
                for micro_batch in range(2):
                    listener.send(asked.peer, channel.session, Attended(step, micro_batch, 0, array), timeout_s=5)
                came: list[Message] = []
                is_interrupted = run_until(number, partial(receive_into, came, channel), "transport/packets.py")
                listener.send(asked.peer, channel.session, Pong(step), timeout_s=5)
                came += until(partial(channel.recv, timeout_s=5), Pong(step))[:-1]
                assert all(whole([message], step, array) for message in came) and len(came) in (1, 2)
        number += 3
    assert number > 100


def test_memory_that_was_placed_and_never_sent_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the next packet, however small; it is not waited for at the limit of what an arena may take."""
    monkeypatch.setattr("transport.packets._MAX_ARENA_BYTES", 1 << 20)
    with a_pair("shm", tmp_path, monkeypatch) as (listener, channel):
        for number in range(20):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr("transport.packets.PacketSocket._send_packet", _interrupted)
                channel.send(Attend(number, 0, 0, LARGE, LARGE, LARGE), timeout_s=1)
            channel.send(Ping(number), timeout_s=1)
            assert listener.recv(timeout_s=1).envelope.message == Ping(number)
        with pytest.raises(PeerTimeout):
            listener.recv(timeout_s=0.01)


def _interrupted(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_what_was_broken_off_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no message: whoever waits goes on waiting, to the end of its time."""
    with a_pair("ipc", tmp_path, monkeypatch) as (listener, channel):
        channel._link.send_frames([b""], 5)
        channel._link.send_frames([b"FDEC", b""], 5)
        with pytest.raises(PeerTimeout):
            listener.recv(timeout_s=0.05)
        with pytest.raises(BrokenOff):
            channel._codec.decode([b"FDEC", b""])
