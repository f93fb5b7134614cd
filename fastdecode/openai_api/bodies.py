"""The fields that a request's body may have, and their types.  Names are OpenAI's, or vLLM's where it has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from fastdecode.errors import RequestError

# Fields that are not supported, at the value that asks for nothing: clients write their defaults out.
_ASKS_FOR_NOTHING: dict[str, Any] = {
    "echo": False,
    "use_beam_search": False,
    "best_of": 1,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "tool_choice": "none",
}


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool = False


class _Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Of vLLM
    priority: int = 0
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    # About the caller, not about the answer
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None


class CompletionBody(_Body):
    prompt: str | list[str | int | list[int]]  # one as text or token ids, or a list of either
    logprobs: int | None = None


class ChatBody(_Body):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True


Body = TypeVar("Body", bound=msgspec.Struct)


def read_body(body: object, kind: type[Body]) -> Body:
    """Raises RequestError, which names the field."""
    if not isinstance(body, Mapping):
        raise RequestError("invalid_request", f"body must be a JSON object, not {type(body).__name__}")
    wanted = {
        name: value
        for name, value in body.items()
        if value is not None and not (name in _ASKS_FOR_NOTHING and value == _ASKS_FOR_NOTHING[name])  # null: not said
    }
    try:
        return msgspec.convert(wanted, kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from error


def _explained(complaint: str) -> RequestError:
    """Of msgspec's "Object contains unknown field `tools`", "Expected `int`, got `str` - at `$.n`"."""
    what, _, where = complaint.partition(" - at `$")
    where = where.rstrip("`").lstrip(".")
    if "field `" in what:  # unknown, or missing
        name = what.split("field `", 1)[1].rstrip("`")
        where = f"{where}.{name}" if where else name
        what = "not supported here" if "unknown field" in what else "is required"
    return RequestError("invalid_request", f"{where}: {what}" if where else what, where or None)
