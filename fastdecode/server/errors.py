"""Every error of every route in OpenAI's envelope; which code has which status: `fastdecode.openai_api.errors`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from fastdecode.errors import FastDecodeError, RequestError
from fastdecode.openai_api import envelope, kind_of

logger = logging.getLogger(__name__)

_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed"}
_OURS = "a fault of this server, not of the request; its log has the traceback"


class JSONBody(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def add_error_handlers(app: FastAPI) -> None:
    for kind in (FastDecodeError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _answer)


def error_response(
    code: str,
    message: str,
    param: str | None = None,
    numbers: Mapping[str, int] | None = None,
    *,
    beside: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """numbers: of the error; beside: more of the body."""
    kind = kind_of(code)
    retry = {} if kind.retry_after_s is None else {"Retry-After": str(kind.retry_after_s)}
    body = {**(beside or {}), **envelope(code, message, param, numbers)}
    return JSONBody(body, kind.status, {**(headers or {}), **retry})


def error_event(error: Exception) -> dict[str, Any]:
    """For the middle of a stream, whose status was told already."""
    if not isinstance(error, FastDecodeError):
        logger.error("in the middle of a stream", exc_info=error)
    return envelope(*_told(error))


def _told(error: Exception) -> tuple[str, str, str | None, Mapping[str, int]]:
    """What `envelope` takes."""
    if isinstance(error, RequestError):
        return error.code, str(error), error.param, error.numbers
    if isinstance(error, FastDecodeError):
        return "engine_dead", f"the engine has ended: {error}", None, {}
    return "internal_error", _OURS, None, {}


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        code = _CODES.get(error.status_code, "internal_error" if error.status_code >= 500 else "invalid_request")
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONBody(envelope(code, message), error.status_code, dict(error.headers or {}))
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"]))
        return JSONBody(envelope("invalid_request", f"{param}: {first['msg']}", param), 422)
    return error_response(*_told(error))
