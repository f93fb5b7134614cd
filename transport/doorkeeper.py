"""Who may come in at an R-worker's ``tcp://`` port, decided before a message of theirs is read; who may not is logged.

    accepted ──► greeting, CURVE: do they hold the key? ──► in
                   │ no, not in time, or not even ZeroMQ
                   └► disconnected, and told in the log: once for each address and cause

libzmq asks over ZAP (ZeroMQ RFC 27) and tells the rest on the socket's monitor; both are read by one thread, so that a
kernel that is busy keeps nobody waiting.  pyzmq's own ThreadAuthenticator would leave the refused unnamed, and the
monitor to somebody else.
"""

from __future__ import annotations

import logging
import os
import socket
import threading

import zmq
from zmq.utils import z85
from zmq.utils.monitor import recv_monitor_message

from transport.keys import Keys
from transport.monitor import open_monitor
from transport.refusals import Refusals

logger = logging.getLogger(__name__)

_ZAP_DOMAIN = b"fastdecode"
_FAILURES = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
_EVENTS = (
    _FAILURES
    | zmq.EVENT_ACCEPTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_ACCEPT_FAILED
    | zmq.EVENT_MONITOR_STOPPED
)
_OTHER_KEY = "was refused: its key is another one; copy this job's key file to it"


class Doorkeeper:
    """For one port with a context of its own.  Made before the port is bound, closed before it is closed."""

    def __init__(self, port: zmq.Socket, keys: Keys | None) -> None:
        self._port, self._keys = port, keys
        self._refusals = Refusals(logger)
        self._addresses: dict[int, str] = {}  # of those that are connected, by file descriptor
        self._strangers: set[int] = set()  # of them, those that have not said who they are
        self._cause = ""  # of the disconnection that comes next
        self._zap = port.context.socket(zmq.REP)
        self._zap.bind("inproc://zeromq.zap.01")
        # Without keys, too: libzmq then refuses ZMTP 1 and 2, as which it would take any bytes, and messages, at all.
        port.zap_domain = _ZAP_DOMAIN
        port.zap_enforce_domain = True  # should nobody answer over ZAP, nobody comes in
        if keys:
            port.curve_server, port.curve_publickey, port.curve_secretkey = True, keys.public, keys.secret
        self._monitor = open_monitor(port, _EVENTS)
        self._thread = threading.Thread(target=self._run, name="doorkeeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._port.disable_monitor()  # whose last event ends the thread
        self._thread.join()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._monitor, zmq.POLLIN)
        poller.register(self._zap, zmq.POLLIN)
        try:
            while True:
                ready = dict(poller.poll())
                if self._zap in ready:
                    self._zap.send_multipart(self._judge(self._zap.recv_multipart()))
                if self._monitor in ready:
                    event = recv_monitor_message(self._monitor)
                    if event["event"] == zmq.EVENT_MONITOR_STOPPED:
                        return
                    try:
                        self._note(event["event"], event["value"])
                    except Exception:  # it is for the log alone, and without this thread nobody comes in any more
                        logger.exception("an event of the port was not understood")
        finally:
            self._monitor.close(linger=0)
            self._zap.close(linger=0)

    def _judge(self, request: list[bytes]) -> list[bytes]:
        """The reply to: version, request, domain, address, identity, mechanism, public key (of CURVE alone)."""
        wanted = [b"CURVE", self._keys.public] if self._keys else [b"NULL"]
        mechanism, *keys = request[5:]
        may_enter = request[2] == _ZAP_DOMAIN and [mechanism, *map(z85.encode, keys)] == wanted
        status = (b"200", b"OK") if may_enter else (b"400", b"unknown key")
        return [b"1.0", request[1], *status, b"", b""]

    def _note(self, event: int, value: int) -> None:
        match event:
            case zmq.EVENT_ACCEPTED:
                self._addresses[value] = _peer_address(value)
                self._strangers.add(value)
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._strangers.clear()  # which of them it was is not said, and there is hardly ever a second one
            case zmq.EVENT_DISCONNECTED:
                origin = self._addresses.pop(value, "")
                if self._cause or value in self._strangers:
                    self._refusals.tell(self._cause or "was refused: it does not speak ZeroMQ", origin)
                self._strangers.discard(value)
                self._cause = ""
            case zmq.EVENT_ACCEPT_FAILED:
                self._refusals.tell(f"could not let anybody else in: {os.strerror(value)}")
            case _:
                self._cause = self._why(event, value)

    def _why(self, event: int, value: int) -> str:
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH or value == zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC:
            return _OTHER_KEY
        if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            if self._keys:
                return "was refused: it came without a key; give it this job's key file"
            return "was refused: it came with a key, and this R-worker has none"
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            return "was refused: it breaks ZeroMQ's protocol"
        return "left, or was sent away for its silence, before it had said who it is"


def _peer_address(fd: int) -> str:
    """Of the other end, for the log alone: if it is closed by now it is not known, or already another one's."""
    try:
        with socket.socket(fileno=os.dup(fd)) as connection:
            return str(connection.getpeername()[0])
    except (OSError, IndexError):
        return ""
