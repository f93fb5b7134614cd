"""The contract between a worker and whatever carries its messages.

A backend (inproc, ZeroMQ, MPI) moves *frames*: a `Link` is an S-worker's end towards one R-worker, a `Port`
is an R-worker's end towards any number of S-workers.  `Channel` and `Listener` put the codec on top, and are
what the rest of the house uses.

What holds for every backend (`transport.testing` checks it for all of them):

- Messages between two ends arrive whole, unchanged and in order, or not at all; also when an exception comes between
  any two instructions of either end (Ctrl-C): the message at hand may then be lost, and the channel works on.
- Nothing waits for ever: every call takes ``timeout_s`` and raises PeerTimeout, which names the peer.
- After PeerTimeout, ProtocolError or MessageTooLarge the channel works on.
- After PeerLost every later send raises it, and every recv once what had arrived before is read; a peer that
  comes back needs a new channel.
- PeerRefused is like PeerLost: the two ends do not hold the same key, and it comes before any message.
- Frames of another session (a nonce drawn per channel) never reach the caller.
- Arrays handed to ``send`` are not copied: leave them alone until the message is answered.
- One thread at a time uses a channel.  ``close`` can be called twice and leaves no socket or thread behind.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from transport.codec import Buffer, Codec, Envelope
from transport.errors import BrokenOff, PeerLost, PeerTimeout, ProtocolError
from transport.messages import Failure, Message, Pong


class Link(Protocol):
    peer: str  # named in every error

    def send_frames(self, frames: Sequence[Buffer], timeout_s: float) -> None: ...

    def recv_frames(self, timeout_s: float) -> Sequence[Buffer]: ...

    def is_readable(self) -> bool: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Arrival:
    """Frames that came, and from whom."""

    peer: Hashable
    frames: Sequence[Buffer]
    origin: str = ""  # the peer's network address, where it has one


class Port(Protocol):
    address: str  # what peers connect to; with the real port number where 0 was asked for

    def recv_frames(self, timeout_s: float) -> Arrival: ...

    def send_frames(self, peer: Hashable, frames: Sequence[Buffer], timeout_s: float) -> None: ...

    def close(self) -> None: ...


class Channel:
    """An S-worker's connection to one R-worker."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._codec = Codec()
        self.session = secrets.randbits(64)

    @property
    def peer(self) -> str:
        return self._link.peer

    def send(self, message: Message, *, timeout_s: float) -> None:
        self._link.send_frames(self._codec.encode(self.session, message), timeout_s)

    def recv(self, *, timeout_s: float) -> Message:
        """The next message of this session; what an earlier life of either end left behind is dropped.

        Raises ProtocolError for a bad frame, and where the peer says that it got one.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                frames = self._link.recv_frames(max(0.0, deadline - time.monotonic()))
                envelope = self._codec.decode(frames)
            except BrokenOff:
                continue
            except ProtocolError as error:
                raise ProtocolError(f"{self.peer} sent a bad frame: {error}") from error
            if envelope.session == self.session:
                return envelope.message
            if envelope.session == 0 and isinstance(envelope.message, Failure):  # it could not read whose it was
                raise ProtocolError(f"{self.peer} refused what this side sent: {envelope.message.text}")

    def is_readable(self) -> bool:
        """Whether `recv` has something at hand, a message or a loss to tell.  Does not wait."""
        return self._link.is_readable()

    def close(self) -> None:
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class Delivery:
    """A message that came to an R-worker, and from whom."""

    peer: Hashable
    envelope: Envelope
    origin: str = ""  # the peer's network address, where it has one


class BadDelivery(ProtocolError):
    """Frames that are no message; `peer` is who sent them, so that it can be told, `origin` its network address."""

    def __init__(self, peer: Hashable, text: str, origin: str = "") -> None:
        super().__init__(text)
        self.peer, self.origin = peer, origin


class Listener:
    """An R-worker's end: messages from any S-worker come in, each answered to its sender."""

    def __init__(self, port: Port) -> None:
        self._port = port
        self._codec = Codec()

    @property
    def address(self) -> str:
        return self._port.address

    def recv(self, *, timeout_s: float) -> Delivery:
        """Raises PeerTimeout if nobody wrote, BadDelivery if what came is no message."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                arrival = self._port.recv_frames(max(0.0, deadline - time.monotonic()))
                try:
                    return Delivery(arrival.peer, self._codec.decode(arrival.frames), arrival.origin)
                except BrokenOff:
                    raise
                except (ProtocolError, MemoryError) as error:
                    raise BadDelivery(arrival.peer, str(error), arrival.origin) from error
            except BrokenOff:
                continue

    def send(self, peer: Hashable, session: int, message: Message, *, timeout_s: float) -> None:
        self._port.send_frames(peer, self._codec.encode(session, message), timeout_s)

    def is_reachable(self, peer: Hashable) -> bool:
        """Whether `peer` still has its end open, as far as the backend can tell.

        Asked by sending a Pong of no session, which its channel drops.
        """
        try:
            self.send(peer, 0, Pong(token=0), timeout_s=0.1)
        except PeerLost:
            return False
        except PeerTimeout:
            return True
        return True

    def close(self) -> None:
        self._port.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
