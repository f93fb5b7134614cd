"""ZeroMQ: ``ipc://PATH`` on one machine, ``tcp://HOST:PORT`` beyond it.

An S-worker's link is a DEALER, an R-worker's port a ROUTER that refuses to drop messages silently.  ZMTP
heartbeats run in libzmq's own thread, so neither a busy kernel nor a long forward can starve them; a peer
that is killed shows as a disconnect on the socket's monitor at once, one that is stopped or cut off within two
seconds.

What crosses a network is encrypted and authenticated with the job's keys (CURVE), or at least has a checksum.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import cast

import zmq
from zmq.utils.monitor import recv_monitor_message

from transport.channel import Arrival, BadDelivery
from transport.codec import LIMITS, Buffer
from transport.doorkeeper import Doorkeeper
from transport.errors import (
    AddressError,
    BrokenOff,
    ChannelClosed,
    PeerLost,
    PeerRefused,
    PeerTimeout,
    ProtocolError,
)
from transport.forked import let_go_in_children
from transport.hosts import check_bind, check_host
from transport.keys import Keys
from transport.monitor import open_monitor
from transport.multipart import checksum, drop_rest, end_message, receive, send
from transport.paths import check_not_taken, check_path

HEARTBEAT_INTERVAL_MS = 300
# A heartbeat waits behind the frame that is being sent, so a frame has to cross within this time; and libzmq's thread
# for the processor, which took up to 1.5 s where two R-workers compiled their kernels on two busy cores.
HEARTBEAT_TIMEOUT_MS = 4000
HANDSHAKE_TIMEOUT_MS = 10_000  # for whoever connects to a port, and holds a file descriptor of it meanwhile
# An R-worker with another key says nothing and hangs up, and one that wants a key may be quicker with that than with
# its greeting.  One that is just ending hangs up, too, but not so often.
_MAX_HANG_UPS = 5
_CURVE_BYTES = 64  # that encryption adds to a frame, at most

_FAILURES = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH


class ZeroMQLink:
    def __init__(self, address: str, keys: Keys | None) -> None:
        self.peer = f"R-worker at {address}"
        self._address, self._keys = address, keys
        self._has_checksum = _is_network(address) and keys is None
        self._context = zmq.Context()
        self._socket = _make_socket(self._context, zmq.DEALER, address)
        if keys:
            self._socket.curve_serverkey = self._socket.curve_publickey = keys.public
            self._socket.curve_secretkey = keys.secret
        # Send only over finished connections, so that a send to nobody times out instead of piling up.
        self._socket.immediate = True
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _FAILURES
        self._monitor = open_monitor(self._socket, events)
        self._poller = zmq.Poller()
        self._poller.register(self._monitor, zmq.POLLIN)
        self._poller.register(self._socket, zmq.POLLIN)
        # These are written before what they tell of is begun, and when it has ended: an interrupt (Ctrl-C) may come
        # anywhere between, and leave them true.
        self._is_sending = self._is_reading = self._is_reading_monitor = False
        self._connected = self._has_shaken_hands = self._lost = self._closed = False
        self._num_hang_ups = 0  # before a connection came about
        self._refusal = ""  # why one never will
        self._noted: dict[int, int] = {}
        let_go_in_children(self)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close()
            raise AddressError(f"cannot connect to {address}: {error}") from error

    def send_frames(self, frames: Sequence[Buffer], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        if self._has_checksum:
            frames = [*frames, checksum(frames)]
        self._wait(zmq.POLLOUT, timeout_s, "does not take messages")
        # The peer may vanish between the two lines; then there is no pipe to send to, and a send would wait.
        self._socket.sndtimeo = max(1, round((deadline - time.monotonic()) * 1000))
        if self._is_sending:
            end_message(self._socket)
        self._is_sending = True
        try:
            send(self._socket, frames)
        except zmq.Again:
            self._wait(zmq.POLLOUT, 0.0, "does not take messages")
            raise PeerTimeout(f"{self.peer} does not take messages (waited {timeout_s:.3g} s)") from None
        self._is_sending = False

    def recv_frames(self, timeout_s: float) -> Sequence[Buffer]:
        if self._is_reading and not self._closed:
            drop_rest(self._socket)
        self._wait(zmq.POLLIN, timeout_s, "did not answer")
        self._is_reading = True
        frames = receive(self._socket, has_checksum=self._has_checksum)
        self._is_reading = False
        self._connected = True  # an interrupt may have lost the monitor's word for it
        return frames

    def is_readable(self) -> bool:
        if self._closed or self._lost or self._refusal:
            return True
        self._poller.register(self._socket, zmq.POLLIN)
        if self._is_reading_monitor:
            self._look_again()
        ready = dict(self._poller.poll(0))
        if self._monitor in ready:
            self._read_monitor()
        return self._socket in ready or self._lost or bool(self._refusal)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close(linger=0)
            self._context.term()

    def let_go(self) -> None:
        """libzmq, whose threads are not here, is left as it is (pyzmq does so, too); its connection is closed."""
        if not self._closed:
            self._closed = True
            for descriptor, inode in (self._noted | _connections(self._address)).items():
                with suppress(OSError):
                    if os.fstat(descriptor).st_ino == inode:
                        os.close(descriptor)

    def note(self) -> None:
        """Of a connection whose peer has ended nobody can tell where it led."""
        self._noted = {} if self._closed else _connections(self._address)

    def _wait(self, event: int, timeout_s: float, complaint: str) -> None:
        """Until the socket is ready for `event`; what arrived before a loss is still delivered."""
        if self._closed:
            raise ChannelClosed(f"the channel to {self.peer} was closed by this side")
        deadline = time.monotonic() + timeout_s
        self._poller.register(self._socket, event)
        if self._is_reading_monitor:
            self._look_again()
        while True:
            left_ms = max(0, round((deadline - time.monotonic()) * 1000))
            ready = dict(self._poller.poll(0 if self._lost or self._refusal else left_ms))
            if self._monitor in ready:
                self._read_monitor()
            if ready.get(self._socket) and not (self._lost and event == zmq.POLLOUT):
                return
            if self._refusal:
                raise PeerRefused(f"{self.peer} {self._refusal}")
            if self._lost:
                raise PeerLost(f"{self.peer} is gone: its process ended, hung or was cut off")
            if left_ms == 0:
                state = complaint if self._connected else "does not answer; is it running, and is the address right?"
                raise PeerTimeout(f"{self.peer} {state} (waited {timeout_s:.3g} s)")

    def _look_again(self) -> None:
        """After an interrupt, with which an event may have been lost."""
        drop_rest(self._monitor)
        # Only over finished connections can anything be sent, and never so much waits that it could not.
        if self._connected and not cast(int, self._socket.get(zmq.EVENTS)) & zmq.POLLOUT:
            self._lost = True
        self._is_reading_monitor = False

    def _read_monitor(self) -> None:
        self._is_reading_monitor = True
        message = recv_monitor_message(self._monitor, zmq.NOBLOCK)
        self._take_event(message["event"], message["value"])
        self._is_reading_monitor = False

    def _take_event(self, event: int, value: int) -> None:
        if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            # A second time: the end of the first connection was told while this side was interrupted.
            self._lost = self._lost or self._has_shaken_hands
            self._connected = self._has_shaken_hands = True
        elif self._connected:
            # libzmq would reconnect, to a worker that no longer knows this session: lost is lost.
            self._lost = True
        elif event & _FAILURES and not self._refusal:
            self._num_hang_ups += event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            self._refusal = self._why_refused(event, value)
            if self._refusal:
                self._socket.disconnect(self._address)  # it would try for ever

    def _why_refused(self, event: int, value: int) -> str:
        """Nothing, if another try may succeed."""
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            if value != zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
                return "does not speak this protocol: is it an R-worker, and is the address right?"
            if self._keys:
                return "has no key: start it with --key-file, or leave key_file out here"
            return "wants a key: give the key file it was started with (key_file, --key-file)"
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return "refused this side's key: give both ends the same key file"
        if self._num_hang_ups < _MAX_HANG_UPS:
            return ""
        if self._keys:
            return "hangs up, as one does that has another key or none: give both ends the same key file"
        return "hangs up, as one does that wants a key: give the key file it was started with (key_file, --key-file)"


class ZeroMQPort:
    def __init__(self, address: str, keys: Keys | None) -> None:
        self._is_network = _is_network(address)
        self._has_checksum = self._is_network and keys is None
        self._context = zmq.Context()
        self._socket = _make_socket(self._context, zmq.ROUTER, address)
        self._socket.router_mandatory = True
        self._socket.handshake_ivl = HANDSHAKE_TIMEOUT_MS
        self._doorkeeper = Doorkeeper(self._socket, keys) if self._is_network else None
        self._is_sending = self._is_reading = False  # as a link's
        self._closed = False
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise AddressError(f"cannot listen on {address}: {error}") from error
        self.address = cast(bytes, self._socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()

    def recv_frames(self, timeout_s: float) -> Arrival:
        self._check_open()
        if self._is_reading:
            drop_rest(self._socket)
        if not self._socket.poll(round(timeout_s * 1000), zmq.POLLIN):
            raise PeerTimeout(f"nobody wrote to {self.address} within {timeout_s:.3g} s")
        self._is_reading = True
        first = self._socket.recv(copy=False)
        origin = _origin(first) if self._is_network else ""
        try:
            frames = receive(self._socket, has_checksum=self._has_checksum)
            self._is_reading = False
            return Arrival(first.bytes, frames, origin)
        except BrokenOff:
            raise
        except ProtocolError as error:
            raise BadDelivery(first.bytes, str(error), origin) from error

    def send_frames(self, peer: Hashable, frames: Sequence[Buffer], timeout_s: float) -> None:
        self._check_open()
        if self._has_checksum:
            frames = [*frames, checksum(frames)]
        # A peer that left is known to have left only once what it sent has been looked at, up to its end.
        self._socket.get(zmq.EVENTS)
        self._socket.sndtimeo = round(timeout_s * 1000)
        if self._is_sending:
            end_message(self._socket)
        self._is_sending = True
        try:
            send(self._socket, [cast(bytes, peer), *frames])
        except zmq.Again:
            raise PeerTimeout(f"an S-worker of {self.address} takes no answers (waited {timeout_s:.3g} s)") from None
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                raise PeerLost(f"an S-worker of {self.address} is gone") from error
            raise
        self._is_sending = False

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._doorkeeper:
                self._doorkeeper.close()
            self._socket.close(linger=1000)  # the last answers still leave
            self._context.term()

    def _check_open(self) -> None:
        if self._closed:
            raise ChannelClosed("the port was closed by this side")


def connect(address: str, keys: Keys | None = None) -> ZeroMQLink:
    _check_address(address)
    return ZeroMQLink(address, keys)


def listen(address: str, keys: Keys | None = None, insecure_network: bool = False) -> ZeroMQPort:
    _check_address(address)
    if _is_network(address):
        check_bind(address, has_keys=keys is not None, insecure_network=insecure_network)
    else:
        check_not_taken(address.removeprefix("ipc://"), address)
    return ZeroMQPort(address, keys)


def _is_network(address: str) -> bool:
    return address.startswith("tcp://")


def _check_address(address: str) -> None:
    if _is_network(address):
        check_host(address)
    else:
        check_path(address)


def _connections(address: str) -> dict[int, int]:
    """File descriptors of this process that are connected to `address`, and their inodes; libzmq does not tell.

    A host that is given by name is not recognised.
    """
    where = address.partition("://")[2]
    try:
        descriptors = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:  # not Linux
        return {}
    found = {}
    for descriptor in descriptors:
        try:
            what = os.fstat(descriptor)
            if not stat.S_ISSOCK(what.st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                peer = connection.getpeername()
        except OSError:  # not connected, or the list's own
            continue
        is_path = isinstance(peer, str)
        host, port = ("", 0) if is_path or len(peer) < 2 else peer[:2]
        if (peer if is_path else f"[{host}]:{port}" if ":" in host else f"{host}:{port}") == where:
            found[descriptor] = what.st_ino
    return found


def _origin(frame: zmq.Frame) -> str:
    try:
        return str(frame.get("Peer-Address"))
    except zmq.ZMQError:  # it left meanwhile
        return ""


def _make_socket(context: zmq.Context, kind: int, address: str) -> zmq.Socket:
    made = context.socket(kind)
    made.linger = 0
    # No limit on what waits to be read: where libzmq stops reading from a peer that floods, its heartbeats go
    # unread, too, and tearing the connection down then can abort the process (libzmq issue 3937).
    made.rcvhwm = 0
    made.maxmsgsize = LIMITS.max_array_bytes + _CURVE_BYTES  # libzmq drops the connection of whoever sends more
    made.heartbeat_ivl = HEARTBEAT_INTERVAL_MS
    made.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
    made.heartbeat_ttl = HEARTBEAT_TIMEOUT_MS
    made.ipv6 = "[" in address
    return made
