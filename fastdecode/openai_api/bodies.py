"""The fields that a request's body may have, and their types.  Names are OpenAI's, or vLLM's where it has none.

Bounds are what /openapi.json says of them; `SamplingParams` checks them, in its own words.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec

from fastdecode.api.sampling_params import MAX_BAD_WORDS, MAX_LOGPROBS, MAX_SAMPLES, MAX_STOPS
from fastdecode.errors import RequestError
from fastdecode.openai_api.neutral import NEUTRAL_FOR_CHAT, NEUTRAL_FOR_COMPLETIONS, asks_for_nothing

MAX_PRIORITY = 2**31 - 1
NO_LIMIT = -1  # as max_tokens: many clients write it

_NOT_SUPPORTED = "not supported here"
_AS_IT_IS = ("messages",)  # with nulls, which mean something within the arguments of a tool


def _told(**schema: Any) -> msgspec.Meta:
    return msgspec.Meta(extra_json_schema=schema)


_Samples = Annotated[int, _told(minimum=1, maximum=MAX_SAMPLES)]
_MaxTokens = Annotated[int, _told(minimum=NO_LIMIT, maximum=2**31 - 1, description="-1: no limit")]
_Count = Annotated[int, _told(minimum=0, maximum=2**31 - 1)]
_TopK = Annotated[int, _told(minimum=-1, maximum=2**31 - 1, description="0 or -1: all")]
_Logprobs = Annotated[int, _told(minimum=0, maximum=MAX_LOGPROBS)]
_Seed = Annotated[int, _told(minimum=-(2**63), maximum=2**64 - 1)]
_Priority = Annotated[int, _told(minimum=-MAX_PRIORITY, maximum=MAX_PRIORITY, description="lower goes first")]
_Salt = Annotated[str, _told(minLength=1, description="who has another one finds no KV of this prompt")]
_Temperature = Annotated[float, _told(minimum=0, maximum=100)]
_TopP = Annotated[float, _told(exclusiveMinimum=0, maximum=1)]
_Fraction = Annotated[float, _told(minimum=0, maximum=1)]
_Penalty = Annotated[float, _told(minimum=-2, maximum=2)]
_Repetition = Annotated[float, _told(minimum=0.01, maximum=100)]
_Texts = Annotated[list[str], _told(maxItems=MAX_STOPS)]
_TokenIds = Annotated[list[int], _told(maxItems=MAX_STOPS)]
_Allowed = Annotated[list[int], _told(minItems=1)]
_BadWords = Annotated[list[str], _told(maxItems=MAX_BAD_WORDS)]
_Biases = Annotated[dict[str, float], _told(description="token id -> -100 to 100")]
_Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
_Verbosity = Literal["low", "medium", "high"]
_Messages = Annotated[list[dict[str, Any]], _told(minItems=1)]


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # of vLLM: with every chunk
    include_obfuscation: Annotated[bool, _told(enum=[False])] = False


class _Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: str | None = None
    n: _Samples | None = None
    max_tokens: _MaxTokens | None = None
    temperature: _Temperature | None = None
    top_p: _TopP | None = None
    seed: _Seed | None = None
    stop: str | _Texts | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    logit_bias: _Biases | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Of vLLM
    priority: _Priority = 0
    cache_salt: _Salt | None = None
    top_k: _TopK | None = None
    min_p: _Fraction | None = None
    repetition_penalty: _Repetition | None = None
    min_tokens: _Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: _TokenIds | None = None
    allowed_token_ids: _Allowed | None = None
    bad_words: _BadWords | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    prompt_logprobs: _Logprobs | None = None
    # About the caller, or about caches; not about the answer
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    session_id: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    cache_prompt: bool | None = None


class CompletionBody(_Body):
    neutral = NEUTRAL_FOR_COMPLETIONS

    prompt: str | list[str | int | list[int]]  # one as text or token ids, or a list of either
    logprobs: _Logprobs | None = None
    echo: bool = False


class ChatBody(_Body):
    neutral = NEUTRAL_FOR_CHAT

    messages: _Messages
    max_completion_tokens: _MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: _Logprobs | None = None
    parallel_tool_calls: bool | None = None  # of none
    # As in TemplateBody: a struct has one base
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: _Effort | None = None
    verbosity: _Verbosity | None = None


class TemplateBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Messages for the chat template, and what else it is told."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"tools": ([],), "documents": ([],)}

    model: str | None = None
    messages: _Messages | None = None
    add_generation_prompt: bool | None = None  # None: unless the final message is continued
    continue_final_message: bool = False
    chat_template: str | None = None  # taken from who is trusted
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: _Effort | None = None
    verbosity: _Verbosity | None = None


Body = TypeVar("Body", bound=msgspec.Struct)


def read_body(body: object, kind: type[Body]) -> Body:
    """Null, at any depth, is what was not said.  Raises RequestError, which names the field."""
    if not isinstance(body, Mapping):
        raise RequestError("invalid_request", f"body must be a JSON object, not {type(body).__name__}")
    neutral, known = getattr(kind, "neutral", {}), kind.__struct_fields__
    try:
        wanted = {
            name: value if name in _AS_IT_IS else _without_nulls(value)
            for name, value in body.items()
            if value is not None
        }
    except RecursionError as error:
        raise RequestError("invalid_request", "body is nested too deeply") from error
    if "best_of" in neutral and wanted.get("best_of") == wanted.get("n", 1):
        wanted.pop("best_of", None)  # nothing is chosen among as many as are wanted
    wanted = {name: value for name, value in wanted.items() if not asks_for_nothing(name, value, neutral)}
    for name in wanted:
        if name not in known:
            shown = name if name.isprintable() else ascii(name)[1:-1]
            raise RequestError("invalid_request", f"{shown}: {_NOT_SUPPORTED}", shown)
    try:
        return msgspec.convert(wanted, kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from error
    except (UnicodeError, RecursionError) as error:  # half a surrogate pair in a name; nested too deeply
        raise RequestError("invalid_request", f"body cannot be read: {error}") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _explained(complaint: str) -> RequestError:
    """Of msgspec's "Object contains unknown field `tools`", "Expected `int`, got `str` - at `$.n`"."""
    what, _, where = complaint.partition(" - at `$")
    where = where.rstrip("`").lstrip(".")
    if "field `" in what:  # unknown, or missing
        name = what.split("field `", 1)[1].rstrip("`")
        where = f"{where}.{name}" if where else name
        what = _NOT_SUPPORTED if "unknown field" in what else "is required"
    return RequestError("invalid_request", f"{where}: {what}" if where else what, where or None)
