"""Workers that are threads of one process: frames go through queues, arrays by reference.

``inproc://NAME`` names a port of this process.  The frames are the same as on a wire, so the codec checks
the same things; what is saved is the copy and the kernel.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Hashable, Sequence

from transport.channel import Arrival
from transport.codec import Buffer
from transport.errors import AddressError, ChannelClosed, PeerLost, PeerTimeout

_SCHEME = "inproc://"
_ports: dict[str, InprocPort] = {}
_ports_lock = threading.RLock()  # garbage that is found meanwhile may close a port in the same thread

_Frames = Sequence[Buffer] | None  # None: the other end has closed


class InprocLink:
    def __init__(self, port: InprocPort) -> None:
        self.peer = f"R-worker at {port.address}"
        self._port = port
        self._inbox: queue.SimpleQueue[_Frames] = queue.SimpleQueue()
        self._closed = self._lost = False
        port._links[id(self)] = self

    def send_frames(self, frames: Sequence[Buffer], timeout_s: float) -> None:
        self._check_open()
        self._port._inbox.put(Arrival(id(self), frames))

    def recv_frames(self, timeout_s: float) -> Sequence[Buffer]:
        self._check_open()
        try:
            frames = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            raise PeerTimeout(f"no answer from {self.peer} within {timeout_s:.3g} s") from None
        if frames is None:
            self._lost = True
            self._check_open()
            raise AssertionError("unreachable: a lost link never passes its check")
        return frames

    def is_readable(self) -> bool:
        return not self._inbox.empty() or self._closed or self._lost or self._port._closed

    def close(self) -> None:
        self._closed = True
        self._port._links.pop(id(self), None)

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelClosed(f"the channel to {self.peer} was closed by this side")
        if self._lost or (self._port._closed and self._inbox.empty()):
            self._lost = True
            raise PeerLost(f"{self.peer} is gone: its thread has ended")


class InprocPort:
    def __init__(self, address: str) -> None:
        self.address = address
        self._inbox: queue.SimpleQueue[Arrival | None] = queue.SimpleQueue()
        self._links: dict[int, InprocLink] = {}
        self._closed = False

    def recv_frames(self, timeout_s: float) -> Arrival:
        try:
            arrival = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            raise PeerTimeout(f"nobody wrote to {self.address} within {timeout_s:.3g} s") from None
        if arrival is None:
            raise ChannelClosed(f"{self.address} was closed by this side")
        return arrival

    def send_frames(self, peer: Hashable, frames: Sequence[Buffer], timeout_s: float) -> None:
        link = self._links.get(peer) if isinstance(peer, int) else None
        if link is None:
            raise PeerLost(f"an S-worker of {self.address} has closed its end")
        link._inbox.put(frames)

    def close(self) -> None:
        """Ends a ``recv_frames`` that waits in another thread, too."""
        with _ports_lock:
            if _ports.get(self.address) is self:
                del _ports[self.address]
        self._closed = True
        self._inbox.put(None)
        for link in list(self._links.values()):
            link._inbox.put(None)


def connect(address: str) -> InprocLink:
    with _ports_lock:
        port = _ports.get(address)
    if port is None:
        raise AddressError(f"no R-worker of this process listens on {address}; start it first")
    return InprocLink(port)


def listen(address: str) -> InprocPort:
    if not address.removeprefix(_SCHEME):
        raise AddressError(f"{address!r} has no name; write inproc://NAME")
    with _ports_lock:
        if address in _ports:
            raise AddressError(f"{address} is taken in this process")
        _ports[address] = port = InprocPort(address)
    return port
