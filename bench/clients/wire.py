"""A wire between a client and a server that passes every byte on as it is, and tells afterwards what was asked."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Exchange:
    began: float  # seconds since 1970
    path: str
    status: int  # 0: no answer came
    fields: list[str]  # of the body that was sent
    refusal: dict[str, Any] | None  # the error of an answer that is one


@dataclass
class _Connection:
    began: float
    asked: bytearray = field(default_factory=bytearray)
    answered: bytearray = field(default_factory=bytearray)
    asked_at: list[tuple[int, float]] = field(default_factory=list)  # offset in `asked` and when it came


class Wire:
    """To 127.0.0.1:port of the server; clients are given `url`."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connections: list[_Connection] = []
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def exchanges(self) -> list[Exchange]:
        """In the order they began, as far as they have come."""
        found = [exchange for connection in self._connections for exchange in _exchanges(connection)]
        return sorted(found, key=lambda exchange: exchange.began)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:  # closed
                return
            far = socket.create_connection(("127.0.0.1", self._port))
            connection = _Connection(time.time())
            self._connections.append(connection)
            for source, sink, is_asked in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pass_on, args=(source, sink, connection, is_asked), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, connection: _Connection, is_asked: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if is_asked:
                    connection.asked_at.append((len(connection.asked), time.time()))
                    connection.asked += data
                else:
                    connection.answered += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # one of them is gone: so is the other
            for one in (source, sink):
                one.close()


def _exchanges(connection: _Connection) -> Iterator[Exchange]:
    answers = _messages(bytes(connection.answered))
    for offset, first, body in _messages(bytes(connection.asked)):
        began = max(at for start, at in connection.asked_at if start <= offset)
        status, answer = 0, b""
        for _, line, said_then in answers:
            status, answer = int(line.split()[1]), said_then
            if status >= 200:  # not "100 Continue"
                break
        sent = _json(body)
        said = _json(answer) if status >= 400 else None
        yield Exchange(
            began,
            path=first.split()[1].partition("?")[0],
            status=status,
            fields=sorted(sent) if isinstance(sent, dict) else [],
            refusal=said["error"] if isinstance(said, dict) and isinstance(said.get("error"), dict) else None,
        )


def _messages(data: bytes) -> Iterator[tuple[int, str, bytes]]:
    """Of one direction of HTTP/1.1: offset, first line, body.  One that is cut off ends them."""
    at = 0
    while (end := data.find(b"\r\n\r\n", at)) >= 0:
        first, *lines = data[at:end].decode("latin-1").split("\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        start, offset = end + 4, at
        if headers.get("transfer-encoding", "").lower() == "chunked":
            body, at = _chunked(data, start)
        else:
            at = start + int(headers.get("content-length", 0))
            body = data[start:at]
        yield offset, first, body


def _chunked(data: bytes, at: int) -> tuple[bytes, int]:
    """A body and where it ends, which is the data's end if it is cut off."""
    body = b""
    while (end := data.find(b"\r\n", at)) >= 0:
        size = int(data[at:end].partition(b";")[0], 16)
        body += data[end + 2 : end + 2 + size]
        at = end + 2 + size + 2
        if size == 0:
            return body, at
    return body, len(data)


def _json(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None
