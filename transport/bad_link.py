"""A TCP link that does harm on purpose, for tests and benchmarks: it stands between an S-worker and one R-worker.

    S-worker ◄──► BadLink.address ◄──► R-worker         whole ZeroMQ messages are dropped, held back, doubled, damaged

It reads ZMTP 3 as far as it has to, to tell messages from handshakes and heartbeats (rfc.zeromq.org/spec/37): a
greeting of 64 bytes, then frames of flags (1: more follow, 2: long, 4: a command), length and body.  Encrypted
messages (CURVE) are commands, so only `cut` and `silence` work on them.
"""

from __future__ import annotations

import random
import select
import socket
import threading
import time

HARMS = ("drop", "delay", "duplicate", "corrupt", "swap", "cut", "silence")
_GREETING_BYTES = 64
_MORE, _LONG, _COMMAND = 1, 2, 4
_DELAY_S = 0.2
_LOOK_S = 0.1


class BadLink:
    """Passes everything on but for what `strike` asks for.  Close it."""

    def __init__(self, host: str, port: int, seed: int = 0) -> None:
        """host, port: the R-worker's."""
        self._target = host, port
        self._random = random.Random(seed)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self._listening.getsockname()[1]}"
        self._lock = threading.Lock()
        self._harm: str | None = None
        self._until_harm = 0  # messages that still pass
        self._silent: set[socket.socket] = set()
        self._ends: list[socket.socket] = []
        self._is_closed = False
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def strike(self, harm: str, after: int = 0) -> None:
        """One of HARMS, once, to the message that comes after so many others, whichever way it goes."""
        assert harm in HARMS
        with self._lock:
            self._harm, self._until_harm = harm, after

    @property
    def is_pending(self) -> bool:
        """What was asked for last has not happened yet."""
        return self._harm is not None

    def close(self) -> None:
        self._is_closed = True
        self._listening.close()
        self._cut()
        self._thread.join(5)

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                ready, _, _ = select.select([self._listening], [], [], _LOOK_S)
                near = self._listening.accept()[0] if ready else None
            except (OSError, ValueError):  # closed
                return
            if near is None:
                continue
            try:
                far = socket.create_connection(self._target, 5)
            except OSError:  # nobody is there, and whoever came learns of it
                near.close()
                continue
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._ends.append(end)
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        """One direction of one connection, until either end closes."""
        held: list[bytes] = []  # a message that the next one overtakes
        try:
            stream = source.makefile("rb")
            for _ in range(_GREETING_BYTES):  # at once: either end waits for the other's first ones
                self._send(sink, _read(stream, 1))
            message = b""
            while True:
                head = _read(stream, 1)
                size = _read(stream, 8 if head[0] & _LONG else 1)
                frame = head + size + _read(stream, int.from_bytes(size, "big"))
                if head[0] & _COMMAND:
                    self._send(sink, frame)
                    continue
                message += frame
                if not head[0] & _MORE:
                    for changed in self._pass(message, source, sink, held):
                        self._send(sink, changed)
                    message = b""
        except (OSError, EOFError, ValueError):
            pass
        for end in (source, sink):
            _close(end)

    def _pass(self, message: bytes, source: socket.socket, sink: socket.socket, held: list[bytes]) -> list[bytes]:
        """What arrives in place of `message`."""
        with self._lock:
            harm = self._harm if self._until_harm <= 0 else None
            self._until_harm -= 1
            if harm:
                self._harm = None
        match harm:
            case "drop":
                return []
            case "delay":
                time.sleep(_DELAY_S)
            case "duplicate":
                return [message, message]
            case "corrupt":
                return [self._damage(message)]
            case "swap":
                held.append(message)
                return []
            case "cut":
                self._cut()
            case "silence":
                self._silent.update((source, sink))
        late = held[:]
        held.clear()
        return [message, *late]

    def _damage(self, message: bytes) -> bytes:
        """One bit of a frame's body; lengths stay, or the stream would be no stream any more."""
        bodies, at = list[int](), 0
        while at < len(message):
            long = bool(message[at] & _LONG)
            begin = at + (9 if long else 2)
            at = begin + int.from_bytes(message[at + 1 : begin], "big")
            bodies += range(begin, at) if at - begin < 256 else [self._random.randrange(begin, at) for _ in range(256)]
        if not bodies:
            return message
        place = self._random.choice(bodies)
        return message[:place] + bytes([message[place] ^ 1 << self._random.randrange(8)]) + message[place + 1 :]

    def _send(self, sink: socket.socket, data: bytes) -> None:
        if sink not in self._silent:
            sink.sendall(data)

    def _cut(self) -> None:
        for end in self._ends:
            _close(end)
        self._ends.clear()


def _read(stream: object, num_bytes: int) -> bytes:
    data: bytes = stream.read(num_bytes)  # type: ignore[attr-defined]
    if len(data) < num_bytes:
        raise EOFError
    return data


def _close(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    end.close()
