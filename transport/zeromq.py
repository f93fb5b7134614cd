"""ZeroMQ: ``ipc://PATH`` on one machine, ``tcp://HOST:PORT`` beyond it.

An S-worker's link is a DEALER, an R-worker's port a ROUTER that refuses to drop messages silently.  ZMTP
heartbeats run in libzmq's own thread, so neither a busy kernel nor a long forward can starve them; a peer
that is killed shows as a disconnect on the socket's monitor at once, one that is stopped or cut off within two
seconds.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Hashable, Sequence
from typing import cast
from urllib.parse import urlsplit

import zmq
from zmq.utils.monitor import recv_monitor_message

from transport.channel import Arrival
from transport.codec import LIMITS, Buffer
from transport.errors import AddressError, ChannelClosed, PeerLost, PeerTimeout, ProtocolError
from transport.paths import check_not_taken, check_path

HEARTBEAT_INTERVAL_MS = 300
# A heartbeat waits behind the frame that is being sent, so a frame has to cross within this time.
HEARTBEAT_TIMEOUT_MS = 1600
# Frames under this size are cheaper to copy than to track (pyzmq's own threshold is the same order).
COPY_BELOW_BYTES = 16 << 10


class ZeroMQLink:
    def __init__(self, address: str) -> None:
        self.peer = f"R-worker at {address}"
        self._context = zmq.Context()
        self._socket = _make_socket(self._context, zmq.DEALER, address)
        # Send only over finished connections, so that a send to nobody times out instead of piling up.
        self._socket.immediate = True
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        self._monitor = self._socket.get_monitor_socket(events)
        self._poller = zmq.Poller()
        self._poller.register(self._monitor, zmq.POLLIN)
        self._connected = self._lost = self._closed = False
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise AddressError(f"cannot connect to {address}: {error}") from error

    def send_frames(self, frames: Sequence[Buffer], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        self._wait(zmq.POLLOUT, timeout_s, "does not take messages")
        # The peer may vanish between the two lines; then there is no pipe to send to, and a send would wait.
        self._socket.sndtimeo = max(1, round((deadline - time.monotonic()) * 1000))
        try:
            _send(self._socket, frames)
        except zmq.Again:
            self._wait(zmq.POLLOUT, 0.0, "does not take messages")
            raise PeerTimeout(f"{self.peer} does not take messages (waited {timeout_s:.3g} s)") from None

    def recv_frames(self, timeout_s: float) -> Sequence[Buffer]:
        self._wait(zmq.POLLIN, timeout_s, "did not answer")
        return _recv(self._socket)

    def is_readable(self) -> bool:
        if self._closed or self._lost:
            return True
        self._poller.register(self._socket, zmq.POLLIN)
        ready = dict(self._poller.poll(0))
        if self._monitor in ready:
            self._read_monitor()
        return self._socket in ready or self._lost

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=0)
            self._context.term()

    def _wait(self, event: int, timeout_s: float, complaint: str) -> None:
        """Until the socket is ready for `event`; what arrived before a loss is still delivered."""
        if self._closed:
            raise ChannelClosed(f"the channel to {self.peer} was closed by this side")
        deadline = time.monotonic() + timeout_s
        self._poller.register(self._socket, event)
        while True:
            left_ms = max(0, round((deadline - time.monotonic()) * 1000))
            ready = dict(self._poller.poll(0 if self._lost else left_ms))
            if self._monitor in ready:
                self._read_monitor()
            if ready.get(self._socket) and not (self._lost and event == zmq.POLLOUT):
                return
            if self._lost:
                raise PeerLost(f"{self.peer} is gone: its process ended, hung or was cut off")
            if left_ms == 0:
                state = complaint if self._connected else "does not answer; is it running, and is the address right?"
                raise PeerTimeout(f"{self.peer} {state} (waited {timeout_s:.3g} s)")

    def _read_monitor(self) -> None:
        event = recv_monitor_message(self._monitor, zmq.NOBLOCK)["event"]
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._connected = True
        elif self._connected:
            # libzmq would reconnect, to a worker that no longer knows this session: lost is lost.
            self._lost = True


class ZeroMQPort:
    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = _make_socket(self._context, zmq.ROUTER, address)
        self._socket.router_mandatory = True
        self._closed = False
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise AddressError(f"cannot listen on {address}: {error}") from error
        self.address = cast(bytes, self._socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()

    def recv_frames(self, timeout_s: float) -> Arrival:
        self._check_open()
        if not self._socket.poll(round(timeout_s * 1000), zmq.POLLIN):
            raise PeerTimeout(f"nobody wrote to {self.address} within {timeout_s:.3g} s")
        identity = self._socket.recv()
        try:
            return Arrival(identity, _recv(self._socket))
        except ProtocolError:
            return Arrival(identity, ())  # no frames: the codec refuses them, and the sender is told

    def send_frames(self, peer: Hashable, frames: Sequence[Buffer], timeout_s: float) -> None:
        self._check_open()
        # A peer that left is known to have left only once what it sent has been looked at, up to its end.
        self._socket.get(zmq.EVENTS)
        self._socket.sndtimeo = round(timeout_s * 1000)
        try:
            _send(self._socket, [cast(bytes, peer), *frames])
        except zmq.Again:
            raise PeerTimeout(f"an S-worker of {self.address} takes no answers (waited {timeout_s:.3g} s)") from None
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise PeerLost(f"an S-worker of {self.address} is gone") from error
            raise

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._socket.close(linger=1000)  # the last answers still leave
            self._context.term()

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelClosed("the port was closed by this side")


def connect(address: str) -> ZeroMQLink:
    _check_address(address)
    return ZeroMQLink(address)


def listen(address: str) -> ZeroMQPort:
    _check_address(address)
    if address.startswith("tcp://"):
        _check_loopback(address)
    else:
        check_not_taken(address.removeprefix("ipc://"), address)
    return ZeroMQPort(address)


def _make_socket(context: zmq.Context, kind: int, address: str) -> zmq.Socket:
    made = context.socket(kind)
    made.linger = 0
    # No limit on what waits to be read: where libzmq stops reading from a peer that floods, its heartbeats go
    # unread, too, and tearing the connection down then can abort the process (libzmq issue 3937).
    made.rcvhwm = 0
    made.maxmsgsize = LIMITS.max_array_bytes  # libzmq drops the connection of whoever sends more
    made.heartbeat_ivl = HEARTBEAT_INTERVAL_MS
    made.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
    made.heartbeat_ttl = HEARTBEAT_TIMEOUT_MS
    made.ipv6 = "[" in address
    return made


def _send(over: zmq.Socket, frames: Sequence[Buffer]) -> None:
    last, sent = len(frames) - 1, 0
    try:
        for i, frame in enumerate(frames):
            large = memoryview(frame).nbytes >= COPY_BELOW_BYTES
            over.send(frame, zmq.SNDMORE if i < last else 0, copy=not large)
            sent += 1
    except BaseException:
        if 0 < sent <= last:
            # Interrupted halfway (Ctrl-C): ended here, so that the next message is not taken for its rest.
            over.send(b"", zmq.NOBLOCK)
        raise


def _recv(over: zmq.Socket) -> list[memoryview]:
    """What is left of a multipart message that is there; too many parts are read to their end and refused."""
    frames, num_frames, more = [], 0, True
    try:
        while more:
            frame = over.recv(zmq.NOBLOCK, copy=False)
            num_frames, more = num_frames + 1, frame.more
            if num_frames <= LIMITS.max_frames:
                frames.append(frame.buffer)
    except BaseException:
        while more and over.get(zmq.RCVMORE):
            over.recv(zmq.NOBLOCK)
        raise
    if num_frames > LIMITS.max_frames:
        raise ProtocolError(f"a message of {num_frames} frames; the limit is {LIMITS.max_frames}")
    return frames


def _check_address(address: str) -> None:
    if address.startswith("ipc://"):
        check_path(address)
        return
    try:
        parts = urlsplit(address)
        complete = parts.hostname and parts.port is not None
    except ValueError:
        complete = False
    if not complete:
        raise AddressError(f"{address!r}: a tcp address is tcp://HOST:PORT with a port from 0 to 65535")


def _check_loopback(address: str) -> None:
    """R-workers trust whoever reaches them, so they listen on this machine alone."""
    host = urlsplit(address).hostname or ""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise AddressError(
            f"{address}: R-workers listen on loopback only (tcp://127.0.0.1:PORT), because their traffic is neither "
            "encrypted nor authenticated; reach other machines through an SSH tunnel, or use mpi://"
        )
