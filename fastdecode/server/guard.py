"""The door: who may come in, and how much may be carried through it.  Knows nothing of what is behind.

headers' size ─► key ─► content type ─► body, whole and within its limit ─► the application
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastdecode.server.dashboard import PAGE_PATH
from fastdecode.server.errors import error_response

# For who looks after the process; they tell nothing of what it does.  And a page without data, which asks for the key.
OPEN_PATHS = ("/health", "/ping", PAGE_PATH)
MAX_HEADER_BYTES = 32 << 10  # all of a request's
_LINGER_S = 2.0  # for a refused body: closing with data unread would reset the connection, and the answer with it


class Guard:
    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Sequence[str],
        max_body_bytes: int,
        client_timeout_s: float,
        root_path: str = "",
    ) -> None:
        """root_path: what paths may begin with, if whoever passes requests on leaves it there."""
        self._app, self._root_path = app, root_path
        self._digests = [_digest(key.encode()) for key in api_keys]
        self._max_body_bytes, self._client_timeout_s = max_body_bytes, client_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._root_path:
            scope = {**scope, "root_path": self._root_path}
        headers = dict(scope["headers"])
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            told = f"the headers are larger than {MAX_HEADER_BYTES} bytes"
            await _refuse(scope, receive, send, "headers_too_large", told)
            return
        if not self._has_key(self._route_of(scope["path"]), headers):
            told = "this server wants an API key: send the header Authorization: Bearer KEY, or X-Api-Key: KEY"
            await _refuse(scope, receive, send, "invalid_api_key", told)
            return
        if scope["method"] == "POST" and not _is_json(headers.get(b"content-type", b"")):
            # Other types need no preflight, so that any page in a browser could post them here.
            told = "send JSON, with the header Content-Type: application/json"
            await _refuse(scope, receive, send, "unsupported_media_type", told)
            return
        if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
            told = "send the body as it is: this server unpacks none, and it has a Content-Encoding"
            await _refuse(scope, receive, send, "unsupported_media_type", told)
            return
        try:
            body = await asyncio.wait_for(self._body(headers, receive), self._client_timeout_s)
        except TimeoutError:
            told = f"the body did not come within {self._client_timeout_s:g} s"
            await error_response("body_too_slow", told, headers={"Connection": "close"})(scope, receive, send)
            return
        except _TooLarge:
            told = f"the body is larger than {self._max_body_bytes} bytes; --max-body sets the limit"
            await _refuse(scope, receive, send, "body_too_large", told)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send)

    def _route_of(self, path: str) -> str:
        rest = path.removeprefix(self._root_path)
        return rest if rest.startswith("/") else path

    def _has_key(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if not self._digests or path in OPEN_PATHS:
            return True
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        given = [_digest(bearer.strip())] if scheme.lower() == b"bearer" else []
        given.append(_digest(headers.get(b"x-api-key", b"").strip()))
        # All of them, in the same time
        return any([secrets.compare_digest(digest, known) for digest in given for known in self._digests])

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """None: the client went away.  Raises _TooLarge, before reading where the length was told."""
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_body_bytes:
            raise _TooLarge
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_body_bytes:
                raise _TooLarge
            if not message.get("more_body", False):
                return b"".join(parts)


class _TooLarge(Exception):
    pass


def _digest(key: bytes) -> bytes:
    """Of one length whatever the key's, which the time of a comparison would tell otherwise."""
    return hashlib.sha256(key).digest()


def _is_json(content_type: bytes) -> bool:
    kind = content_type.split(b";")[0].strip().lower()
    return kind == b"application/json" or (kind.startswith(b"application/") and kind.endswith(b"+json"))


async def _refuse(scope: Scope, receive: Receive, send: Send, code: str, message: str) -> None:
    """Lets the client finish what it says, for a while, so that it can hear the answer."""

    async def hear_out() -> None:
        while (part := await receive())["type"] == "http.request" and part.get("more_body", False):
            pass

    headers = {"WWW-Authenticate": "Bearer"} if code == "invalid_api_key" else {}
    try:
        await asyncio.wait_for(hear_out(), _LINGER_S)
    except TimeoutError:
        headers["Connection"] = "close"
    await error_response(code, message, headers=headers)(scope, receive, send)


def _replay(body: bytes, receive: Receive) -> Receive:
    told = False

    async def replayed() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
