"""One conformance suite for every backend: what `transport.channel` promises, checked from the outside.

A backend is conformant if, with ``serve_echo(listener)`` running anywhere (another thread, process or MPI
rank), every function in CHECKS passes on a channel to it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from transport.channel import BadDelivery, Channel, Listener
from transport.codec import LIMITS, Buffer
from transport.errors import ChannelClosed, MessageTooLarge, PeerTimeout, ProtocolError
from transport.messages import DTYPES, Attend, Attended, Failure, Goodbye, Ping, Pong, Release

STALE_TOKEN = 2**40  # a Ping with this token is answered twice: first for another session
TIMEOUT_S = 20.0


def serve_echo(listener: Listener, timeout_s: float = 120.0) -> None:
    """Answers Attend with its own q and Ping with Pong, is silent to Release, ends at Goodbye.

    Raises PeerTimeout when nobody writes for `timeout_s`.
    """
    while True:
        try:
            delivery = listener.recv(timeout_s=timeout_s)
        except BadDelivery as error:
            listener.send(error.peer, 0, Failure("ProtocolError", str(error)), timeout_s=TIMEOUT_S)
            continue
        peer, session = delivery.peer, delivery.envelope.session
        match delivery.envelope.message:
            case Attend() as attend:
                echo = Attended(attend.step, attend.micro_batch, attend.layer, attend.q)
                listener.send(peer, session, echo, timeout_s=TIMEOUT_S)
            case Ping(token=token):
                if token == STALE_TOKEN:
                    listener.send(peer, session ^ 1, Pong(token - 1), timeout_s=TIMEOUT_S)
                listener.send(peer, session, Pong(token), timeout_s=TIMEOUT_S)
            case Goodbye():
                return
        del delivery


def check_round_trip(channel: Channel) -> None:
    """Every float dtype, empty and not, comes back bit for bit."""
    generator = np.random.default_rng(0)
    for name in ("float32", "float16", "bfloat16"):
        for rows in (0, 1, 7, 300):
            q = generator.standard_normal((rows, 4, 32)).astype(DTYPES[name])
            _send_attend(channel, q)
            reply = channel.recv(timeout_s=TIMEOUT_S)
            assert isinstance(reply, Attended) and reply.o.dtype == q.dtype and reply.o.shape == q.shape
            assert reply.o.tobytes() == q.tobytes()


def check_order(channel: Channel) -> None:
    """Many messages in flight, answered in the order they were sent."""
    for token in range(100):
        channel.send(Ping(token), timeout_s=TIMEOUT_S)
    assert [channel.recv(timeout_s=TIMEOUT_S) for _ in range(100)] == [Pong(token) for token in range(100)]


def check_large_messages(channel: Channel) -> None:
    """Several messages of 8 MiB in flight both ways do not deadlock."""
    q = np.arange(8 << 18, dtype=np.float32).reshape(-1, 8, 128)
    for _ in range(3):
        _send_attend(channel, q)
    for _ in range(3):
        reply = channel.recv(timeout_s=TIMEOUT_S)
        assert isinstance(reply, Attended) and np.array_equal(reply.o, q)


def check_deadline(channel: Channel) -> None:
    """Silence becomes PeerTimeout, which names the peer; the channel works on."""
    channel.send(Release(np.array([1], np.int64)), timeout_s=TIMEOUT_S)
    error = _raises(PeerTimeout, lambda: channel.recv(timeout_s=0.05))
    assert channel.peer in str(error)
    _check_alive(channel)


def check_readable(channel: Channel) -> None:
    """Says without waiting whether an answer is there, and takes nothing away."""
    assert not channel.is_readable()
    channel.send(Ping(3), timeout_s=TIMEOUT_S)
    deadline = time.monotonic() + TIMEOUT_S
    while not channel.is_readable():
        assert time.monotonic() < deadline
    assert channel.is_readable() and channel.recv(timeout_s=TIMEOUT_S) == Pong(3)
    assert not channel.is_readable()


def check_bad_frames(channel: Channel) -> None:
    """Unknown, truncated and wrong-shaped frames are refused; the other end lives on."""
    good = channel._codec.encode(channel.session, Attend(0, 0, 0, *[np.zeros((2, 1, 4), np.float32)] * 3))
    header = bytes(good[0])
    bad: list[list[Buffer]] = [
        [b"garbage"],
        [b"XXXX" + header[4:], *good[1:]],
        [header[:4] + b"\xff\xff" + header[6:], *good[1:]],  # another protocol version
        [header[:-5], *good[1:]],
        [header, *good[1:-1]],  # an array is missing
        [header, *good[1:], b"one more"],
        [header, good[1], good[2], b"short"],
        [header.replace(b"float32", b"float99"), *good[1:]],
        [header.replace(b"Attend", b"Adduce"), *good[1:]],
        [b"x" * 100] * (LIMITS.max_frames + 3),
    ]
    for frames in bad:
        channel._link.send_frames(frames, TIMEOUT_S)
        # The refusal carries no session (the frame's cannot be trusted), so read it below the channel.
        reply = channel._codec.decode(channel._link.recv_frames(TIMEOUT_S))
        assert isinstance(reply.message, Failure) and reply.message.kind == "ProtocolError", (frames, reply)
        _skip_refusals(channel)
        _check_alive(channel)


def check_broken_off(channel: Channel) -> None:
    """What ends with an empty frame and is no message was broken off by its sender: passed over, not refused."""
    good = channel._codec.encode(channel.session, Attend(0, 0, 0, *[np.zeros((2, 1, 4), np.float32)] * 3))
    for num_sent in range(len(good)):
        channel._link.send_frames([*good[:num_sent], b""], TIMEOUT_S)
    _check_alive(channel)


def check_refusal_is_told(channel: Channel) -> None:
    """Who waits for the answer to a message that could not be read learns it, instead of waiting to the end."""
    channel._link.send_frames([b"garbage"], TIMEOUT_S)
    error = _raises(ProtocolError, lambda: channel.recv(timeout_s=TIMEOUT_S))
    assert channel.peer in str(error) and "refused what this side sent" in str(error)
    _check_alive(channel)


def check_too_large(channel: Channel) -> None:
    """A message over the limits is refused before anything is sent."""
    rows = LIMITS.max_array_bytes // 4 // 1024 + 1
    q = np.zeros((rows, 8, 128), np.float32)  # never touched, so it takes no memory
    _raises(MessageTooLarge, lambda: _send_attend(channel, q))
    _check_alive(channel)


def check_other_sessions(channel: Channel) -> None:
    """Answers meant for another session never reach the caller."""
    channel.send(Ping(STALE_TOKEN), timeout_s=TIMEOUT_S)
    assert channel.recv(timeout_s=TIMEOUT_S) == Pong(STALE_TOKEN)


def check_close(channel: Channel) -> None:
    """Goodbye ends the server; close can be repeated; later use says so.  Run it last."""
    channel.send(Goodbye(), timeout_s=TIMEOUT_S)
    channel.close()
    channel.close()
    _raises(ChannelClosed, lambda: channel.recv(timeout_s=0.05))
    _raises(ChannelClosed, lambda: channel.send(Ping(1), timeout_s=0.05))
    assert channel.is_readable()


CHECKS: tuple[Callable[[Channel], None], ...] = (
    check_round_trip,
    check_order,
    check_large_messages,
    check_deadline,
    check_readable,
    check_bad_frames,
    check_broken_off,
    check_refusal_is_told,
    check_too_large,
    check_other_sessions,
    check_close,
)


def _send_attend(channel: Channel, q: np.ndarray) -> None:
    channel.send(Attend(0, 0, 0, q, q[:, :1], q[:, :1]), timeout_s=TIMEOUT_S)


def _skip_refusals(channel: Channel) -> None:
    """MPI refuses each part of a message that has too many."""
    channel.send(Ping(6), timeout_s=TIMEOUT_S)
    while True:
        try:
            assert channel.recv(timeout_s=TIMEOUT_S) == Pong(6)
            return
        except ProtocolError as error:
            assert "refused" in str(error)


def _check_alive(channel: Channel) -> None:
    channel.send(Ping(7), timeout_s=TIMEOUT_S)
    assert channel.recv(timeout_s=TIMEOUT_S) == Pong(7)


def _raises(kind: type[Exception], action: Callable[[], object]) -> Exception:
    try:
        action()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was expected")
