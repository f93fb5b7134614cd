"""What a wire can do to a message over ``tcp://``: change it, or pass it on to others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from wire_tap import WireTap

from transport import (
    Attend,
    Attended,
    Goodbye,
    Keys,
    Listener,
    PeerLost,
    Ping,
    Pong,
    ProtocolError,
    connect,
    listen,
    make_keys,
)
from transport.multipart import checksum
from transport.testing import serve_echo

MARK = np.float32(1.2345678).tobytes()


def bend_once(data_of: list[int]) -> Callable[[bytes], bytes]:
    """Turns over one bit of the first mark that passes."""

    def bend(data: bytes) -> bytes:
        at = data.find(MARK)
        if at < 0 or data_of:
            return data
        data_of.append(at)
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]

    return bend


def marked() -> Attend:
    q = np.full((8, 4, 64), np.frombuffer(MARK, np.float32)[0], np.float32)
    return Attend(0, 0, 0, q, q, q)


@pytest.fixture(params=["keys", "open"])
def echo(request: pytest.FixtureRequest) -> Iterator[tuple[Listener, Keys | None]]:
    keys = make_keys() if request.param == "keys" else None
    with listen("tcp://127.0.0.1:0", keys) as listener:
        thread = threading.Thread(target=serve_echo, args=(listener, 30.0))
        thread.start()
        yield listener, keys
        with connect(listener.address, keys) as last:
            last.send(Goodbye(), timeout_s=5)
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("echo", ["open"], indirect=True)
@pytest.mark.parametrize("way", ["there", "back"])
def test_a_bit_turned_over_on_the_way(way: str, echo: tuple[Listener, None]) -> None:
    """Without keys the checksum tells it, whichever way it went; the channel lives on."""
    bent: list[int] = []
    with WireTap(echo[0].address, **{way: bend_once(bent)}) as tap, connect(tap.address) as channel:
        channel.send(marked(), timeout_s=5)
        with pytest.raises(ProtocolError, match="damaged on its way"):
            channel.recv(timeout_s=10)
        assert bent
        channel.send(marked(), timeout_s=5)
        reply = channel.recv(timeout_s=10)
        assert isinstance(reply, Attended) and reply.o.tobytes() == marked().q.tobytes()


@pytest.mark.parametrize("echo", ["keys"], indirect=True)
@pytest.mark.parametrize("way", ["there", "back"])
def test_a_bit_turned_over_under_encryption(way: str, echo: tuple[Listener, Keys]) -> None:
    """Whoever changes what passes breaks the connection, and nothing else."""
    passed = 0

    def bend(data: bytes) -> bytes:
        nonlocal passed
        passed += len(data)
        return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:] if passed > 5000 else data  # behind the handshake

    with WireTap(echo[0].address, **{way: bend}) as tap, connect(tap.address, echo[1]) as channel:
        channel.send(Ping(1), timeout_s=5)
        assert channel.recv(timeout_s=5) == Pong(1)
        channel.send(marked(), timeout_s=5)
        with pytest.raises(PeerLost):
            channel.recv(timeout_s=10)


def test_what_can_be_overheard(echo: tuple[Listener, Keys | None]) -> None:
    listener, keys = echo
    with WireTap(listener.address) as tap, connect(tap.address, keys) as channel:
        channel.send(marked(), timeout_s=5)
        assert isinstance(channel.recv(timeout_s=10), Attended)
        heard = bytes(tap.heard)
    assert len(heard) > 2 * marked().q.nbytes
    assert (MARK in heard) == (b"FDEC" in heard) == (keys is None)


def test_the_checksum_knows_lengths_and_order() -> None:
    """Nothing of a message can change its place without changing it."""
    sums = [checksum(frames) for frames in ([b"ab", b"c"], [b"a", b"bc"], [b"abc"], [b"c", b"ab"], [b"ab", b"c", b""])]
    assert len(set(sums)) == len(sums) and all(len(one) == 8 for one in sums)
