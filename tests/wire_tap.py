"""A wire between two workers that is listened to, and bent on request."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

Bend = Callable[[bytes], bytes]


class WireTap:
    """Passes on what comes over TCP; `heard` is all of it, both ways.  There and back can be bent."""

    def __init__(self, target: str, *, there: Bend = bytes, back: Bend = bytes) -> None:
        parts = urlsplit(target)
        self._target, self._bends = (parts.hostname, parts.port), (there, back)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._sockets = [self._listening]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        self.address = f"tcp://127.0.0.1:{self._listening.getsockname()[1]}"
        self.heard = bytearray()

    def close(self) -> None:
        for one in self._sockets:
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            one.close()
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive()

    def __enter__(self) -> WireTap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
                far = socket.create_connection(self._target)
            except OSError:
                return
            self._sockets += [near, far]
            for source, sink, bend in ((near, far, self._bends[0]), (far, near, self._bends[1])):
                thread = threading.Thread(target=self._pass_on, args=(source, sink, bend))
                self._threads.append(thread)
                thread.start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, bend: Bend) -> None:
        try:
            while data := source.recv(1 << 16):
                self.heard += data
                sink.sendall(bend(data))
        except OSError:
            pass
        for one in (source, sink):
            try:
                one.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
