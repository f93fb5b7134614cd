"""Shared memory between processes of one machine: ``shm://PATH``, a Unix socket beside an arena for each way.

A peer that dies shows as the end of the socket at once; one that is stopped is seen in the process table, where there
is one for both.  A port serves processes of its own user (and root's), which could reach into its memory anyway.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import time
from collections.abc import Hashable, Sequence
from pathlib import Path

from transport.arena import IS_SUPPORTED
from transport.channel import Arrival
from transport.codec import Buffer
from transport.errors import AddressError, ChannelClosed, PeerLost, PeerTimeout, ProtocolError
from transport.forked import let_go_in_children
from transport.packets import PacketSocket, credentials, make_socket, wait
from transport.paths import check_not_taken, check_path

_SCHEME = "shm://"
_MAX_PEERS = 256
_LOOK_S = 0.5  # between looks at whether a silent peer still runs
_RETRY_S = 0.02  # between attempts to connect
_ACCEPT_PAUSE_S = 1.0  # when file descriptors are used up
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

logger = logging.getLogger(__name__)


class SharedMemoryLink:
    def __init__(self, address: str) -> None:
        self.peer = f"R-worker at {address}"
        self._path = address.removeprefix(_SCHEME)
        self._end = PacketSocket(make_socket(), self.peer)
        self._is_connected = self._is_closed = False
        let_go_in_children(self)
        self._connect(time.monotonic())

    def send_frames(self, frames: Sequence[Buffer], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        self._await_connection(deadline, timeout_s)
        try:
            self._end.send(frames, deadline)
        except PeerTimeout as error:
            raise PeerTimeout(f"{error} (waited {timeout_s:.3g} s)") from None

    def recv_frames(self, timeout_s: float) -> Sequence[Buffer]:
        deadline = time.monotonic() + timeout_s
        self._await_connection(deadline, timeout_s)
        was_stopped = False
        while (frames := self._end.recv()) is None:
            if wait(self._end.socket, select.POLLIN, min(deadline, time.monotonic() + _LOOK_S)):
                continue
            is_stopped = self._end.is_stopped()
            if is_stopped and was_stopped:  # twice: a moment's stop is no loss
                self._end.socket.shutdown(socket.SHUT_RDWR)
                raise PeerLost(f"{self.peer} is gone: its process is stopped")
            was_stopped = is_stopped
            if time.monotonic() >= deadline:
                raise PeerTimeout(f"{self.peer} did not answer (waited {timeout_s:.3g} s)")
        return frames

    def is_readable(self) -> bool:
        return self._is_closed or (self._is_connected and wait(self._end.socket, select.POLLIN, 0.0))

    def close(self) -> None:
        self._is_closed = True
        self._end.close()

    def let_go(self) -> None:
        """Closing is this process's alone: nothing is said to the peer."""
        self.close()

    def _await_connection(self, deadline: float, timeout_s: float) -> None:
        if self._is_closed:
            raise ChannelClosed(f"the channel to {self.peer} was closed by this side")
        if not self._connect(deadline):
            raise PeerTimeout(
                f"{self.peer} does not answer; is it running, and is the address right? (waited {timeout_s:.3g} s)"
            )

    def _connect(self, deadline: float) -> bool:
        while not self._is_connected:
            try:
                self._end.socket.connect(self._path)
                self._is_connected = True
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):  # not there yet, or its queue is full
                if time.monotonic() >= deadline:
                    return False
                time.sleep(_RETRY_S)
            except OSError as error:
                if error.errno == errno.EISCONN:  # it came about as this side was interrupted
                    self._is_connected = True
                    break
                self.close()
                raise AddressError(f"cannot connect to {_SCHEME}{self._path}: {error}") from error
        return True


class SharedMemoryPort:
    def __init__(self, address: str) -> None:
        self.address = address
        self._path = address.removeprefix(_SCHEME)
        self._listening = make_socket()
        self._epoll = select.epoll()
        self._peers: dict[Hashable, PacketSocket] = {}  # by a number that is never used twice
        self._numbers: dict[int, int] = {}  # of the peers, by file descriptor
        self._num_peers_ever = 0
        self._accepts_from_s = 0.0  # not before, since the last try found no file descriptor left
        self._is_closed = False
        try:
            self._listening.bind(self._path)
            os.chmod(self._path, 0o600)
            self._listening.listen(_MAX_PEERS)
        except OSError as error:
            self._close_sockets()
            raise AddressError(f"cannot listen on {address}: {error}") from error
        self._epoll.register(self._listening, select.EPOLLIN)

    def recv_frames(self, timeout_s: float) -> Arrival:
        self._check_open()
        deadline = time.monotonic() + timeout_s
        for end in self._peers.values():
            end.give_back()
        while ready := self._poll(deadline):
            fd = ready[0][0]
            if fd == self._listening.fileno():
                self._accept()
            elif (arrival := self._take(self._numbers[fd])) is not None:
                return arrival
        raise PeerTimeout(f"nobody wrote to {self.address} within {timeout_s:.3g} s")

    def send_frames(self, peer: Hashable, frames: Sequence[Buffer], timeout_s: float) -> None:
        self._check_open()
        if peer not in self._peers:
            raise PeerLost(f"an S-worker of {self.address} is gone")
        self._peers[peer].send(frames, time.monotonic() + timeout_s)

    def close(self) -> None:
        if not self._is_closed:
            Path(self._path).unlink(missing_ok=True)
            self._close_sockets()

    def _poll(self, deadline: float) -> list[tuple[int, int]]:
        """(file descriptor, events) of one that is ready; none at the deadline."""
        while self._accepts_from_s:
            left_s = self._accepts_from_s - time.monotonic()
            if left_s <= 0:
                self._accepts_from_s = 0.0
                self._epoll.register(self._listening, select.EPOLLIN)
                break
            if ready := self._epoll.poll(max(0.0, min(left_s, deadline - time.monotonic())), 1):
                return ready
            if time.monotonic() >= deadline:
                return []
        return self._epoll.poll(max(0.0, deadline - time.monotonic()), 1)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listening.accept()
        except OSError as error:
            if error.errno in _OUT_OF_FILES:  # whoever waits stays ready, and would be asked without a pause
                self._accepts_from_s = time.monotonic() + _ACCEPT_PAUSE_S
                self._epoll.unregister(self._listening)
                logger.warning("%s: new S-workers wait: %s", self.address, error.strerror)
            return  # or it left again
        _, uid = credentials(accepted)
        if len(self._peers) >= _MAX_PEERS or uid not in (os.geteuid(), 0):
            accepted.close()
            return
        self._num_peers_ever += 1
        self._peers[self._num_peers_ever] = PacketSocket(accepted, f"an S-worker of {self.address}")
        self._numbers[accepted.fileno()] = self._num_peers_ever
        self._epoll.register(accepted, select.EPOLLIN)

    def _take(self, number: int) -> Arrival | None:
        """What the peer wrote; None if it has left."""
        end = self._peers[number]
        try:
            frames = end.recv()
        except ProtocolError:
            return Arrival(number, ())  # no frames: the codec refuses them, and the sender is told
        except PeerLost:
            self._epoll.unregister(end.socket)
            del self._peers[number], self._numbers[end.socket.fileno()]
            end.close()
            return None
        return None if frames is None else Arrival(number, frames)

    def _close_sockets(self) -> None:
        self._is_closed = True
        for end in self._peers.values():
            end.close()
        self._listening.close()
        self._epoll.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise ChannelClosed("the port was closed by this side")


def connect(address: str) -> SharedMemoryLink:
    _check(address)
    return SharedMemoryLink(address)


def listen(address: str) -> SharedMemoryPort:
    _check(address)
    path = address.removeprefix(_SCHEME)
    check_not_taken(path, address)
    if Path(path).is_socket():
        Path(path).unlink()  # left behind by a process that was killed
    return SharedMemoryPort(address)


def _check(address: str) -> None:
    check_path(address)
    if not IS_SUPPORTED:
        raise AddressError(f"{address}: shared memory needs Linux; use ipc:// here")
