"""The one table of errors: what a code means, its HTTP status, its type in OpenAI's envelope.

Codes come from `fastdecode.errors.RequestError` and, for what has to do with HTTP alone, from `fastdecode.server`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdecode.api.outputs import OutputError


@dataclass(frozen=True)
class Kind:
    status: int
    type: str
    retry_after_s: int | None = None  # where the same request may do better by then


_INVALID, _UNAVAILABLE, _SERVER = "invalid_request_error", "unavailable_error", "server_error"

KINDS = {
    # The request's own fault
    "invalid_request": Kind(400, _INVALID),  # a field, by name
    "context_length_exceeded": Kind(400, _INVALID),  # prompt and output are longer than max_model_len
    "kv_budget_exceeded": Kind(400, _INVALID),  # no R-worker could ever hold it
    "invalid_api_key": Kind(401, "authentication_error"),
    "model_not_found": Kind(404, _INVALID),
    "not_found": Kind(404, _INVALID),  # no such route
    "method_not_allowed": Kind(405, _INVALID),
    "body_too_slow": Kind(408, "timeout_error"),  # it did not come
    "body_too_large": Kind(413, _INVALID),
    "unsupported_media_type": Kind(415, _INVALID),  # not application/json
    "headers_too_large": Kind(431, _INVALID),
    # Not now
    "timeout": Kind(408, "timeout_error"),  # not finished within --timeout
    "queue_full": Kind(429, "rate_limit_error", retry_after_s=1),
    "loading": Kind(503, _UNAVAILABLE, retry_after_s=2),
    "draining": Kind(503, _UNAVAILABLE, retry_after_s=5),  # of another server, or of this one's successor
    "cancelled": Kind(503, _UNAVAILABLE),  # it was running when the server had to end
    "out_of_memory": Kind(503, _UNAVAILABLE, retry_after_s=5),  # the device has none for what runs, however little
    # Ours
    "invalid_logits": Kind(500, _SERVER),  # the model's logits were NaN or infinite; its neighbours go on
    "tokenizer_failed": Kind(500, _SERVER),  # the model's tokenizer cannot decode what was generated
    "worker_lost": Kind(500, _SERVER),  # its R-worker was lost, and no other had room
    "engine_dead": Kind(503, _UNAVAILABLE),  # no R-worker is left, or the engine failed: this process ends
    "internal_error": Kind(500, _SERVER),  # a fault of this program; its log has the traceback
}


def kind_of(code: str) -> Kind:
    """What is not listed is the request's fault."""
    return KINDS.get(code, KINDS["invalid_request"])


def envelope(
    code: str, message: str, param: str | None = None, numbers: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """param: the field that is wrong; numbers: of the message, for programs."""
    told = {"message": message, "type": kind_of(code).type, "param": param, "code": code}
    return {"error": {**told, **(numbers or {})}}


def status_of(error: OutputError) -> int:
    return kind_of(error.code).status


def error_body(error: OutputError) -> dict[str, Any]:
    return envelope(error.code, error.message, error.param, error.numbers)
