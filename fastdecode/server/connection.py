"""uvicorn, with what it lacks: patience has an end on both sides of a connection, and signals are somebody else's.

A client has `client_timeout_s` to send a request's headers.  One that is sent more than it reads has as long to read
anything at all; then its connection is cut, which the application sees as a disconnect.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any

import h11
import msgspec
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastdecode.errors import ConfigError
from fastdecode.openai_api import envelope
from fastdecode.server.guard import MAX_HEADER_BYTES
from fastdecode.server.options import ServerOptions

_KEEP_ALIVE_S = 65  # longer than proxies keep theirs, so that they do not use one that is being closed
_GRACE_S = 5  # for answers still on their way when the server ends
_BACKLOG = 2048
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_TELL_AGAIN_S = 10.0

logger = logging.getLogger(__name__)


class HTTPServer(uvicorn.Server):
    """Serves until `should_exit` is set."""

    def __init__(self, app: FastAPI, options: ServerOptions) -> None:
        client_timeout_s = options.client_timeout_s

        class Connection(_Connection):
            timeout_s = client_timeout_s

        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_GRACE_S,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                # asyncio accepts so many at once, and when file descriptors are used up it tries, complains and sets
                # a timer as often.  The queue is the socket's, see `startup`.
                backlog=1,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(LoopErrors())
        await super().startup(sockets)
        for bound in sockets or ():
            bound.listen(_BACKLOG)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class LoopErrors:
    """What asyncio tells of itself: that no connection can be taken, in one line and not for each try."""

    def __init__(self) -> None:
        self._tell_at_s = 0.0

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in _OUT_OF_FILES or "accept" not in context["message"]:
            loop.default_exception_handler(context)
        elif time.monotonic() >= self._tell_at_s:
            self._tell_at_s = time.monotonic() + _TELL_AGAIN_S
            logger.warning(
                "new connections wait: %s; raise the limit on open files of this process (ulimit -Hn, LimitNOFILE) or "
                "have a proxy that limits connections",
                error.strerror,
            )


def bind(host: str, port: int) -> socket.socket:
    """host: ``::`` or nothing: every address, of both families.  Raises ConfigError."""
    host = host.removeprefix("[").removesuffix("]")
    try:
        if host in ("", "::"):
            bound = _bind_all(host, port)
        else:
            family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
            bound = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}; see --host and --port") from error
    bound.setblocking(False)
    return bound


def _bind_all(host: str, port: int) -> socket.socket:
    """Raises OSError."""
    try:
        return socket.create_server(
            ("::", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=socket.has_dualstack_ipv6()
        )
    except OSError:
        if host:
            raise
        return socket.create_server(("0.0.0.0", port), backlog=_BACKLOG)  # a machine without IPv6


class _Connection(H11Protocol):
    timeout_s: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None  # until headers are there, or while the client does not read
        self._unread = 0  # bytes, when the timer was set

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.timeout_s, self._no_request)

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_timer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unset_timer()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unset_timer()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or has headers that are too large."""
        if self.conn.our_state is not h11.IDLE and self.conn.our_state is not h11.SEND_RESPONSE:
            self.transport.close()  # in the middle of an answer
            return
        told = f"{msg} A request's line and headers may have {MAX_HEADER_BYTES} bytes."
        body = msgspec.json.encode(envelope("invalid_request", told))
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _no_request(self) -> None:
        self._timer = None
        if self.cycle is None:
            self.transport.abort()

    def _watch_reader(self) -> None:
        self._unread = self.transport.get_write_buffer_size()
        self._timer = self.loop.call_later(self.timeout_s, self._still_unread)

    def _still_unread(self) -> None:
        if self.transport.get_write_buffer_size() >= self._unread:
            self.transport.abort()
        else:
            self._watch_reader()

    def _unset_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
