"""From a request's body to a prompt and its sampling parameters.  What cannot be done is refused, never left out.

Names are OpenAI's, and vLLM's for what OpenAI has no name for.  What a body does not say comes from the model's
generation_config.json, as with vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from fastdecode.errors import RequestError
from fastdecode.prompts import Conversation, Prompt
from fastdecode.sampling_params import SamplingParams

CHAT_URL, COMPLETIONS_URL = "/v1/chat/completions", "/v1/completions"
URLS = (CHAT_URL, COMPLETIONS_URL)

_COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat goes on to the end of the context
_AS_THEY_ARE = (
    "n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "skip_special_tokens",
    "include_stop_str_in_output",
)  # fmt: skip


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
    # Of vLLM
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
    prompt: str | list[int | str]
    logprobs: int | None = None


class ChatBody(_Body):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True


@dataclass(frozen=True)
class ReadRequest:
    model: str | None  # as the body calls it
    prompt: Prompt
    params: SamplingParams
    is_chat: bool


def read_request(url: str, body: object, defaults: SamplingParams) -> ReadRequest:
    """defaults: the model's own.  Raises RequestError, which says what field is wrong, and why."""
    if url not in URLS:
        raise RequestError("invalid_request", f"url {url!r} is none of {', '.join(URLS)}")
    if not isinstance(body, Mapping):
        raise RequestError("invalid_request", f"body must be a JSON object, not {type(body).__name__}")
    wanted = {name: value for name, value in body.items() if value is not None}  # null: not said
    if wanted.pop("stream", False):
        raise RequestError("invalid_request", "stream: this answer comes whole; leave it out or set it to false")
    try:
        if url == CHAT_URL:
            return _read_chat(msgspec.convert(wanted, ChatBody), defaults)
        return _read_completion(msgspec.convert(wanted, CompletionBody), defaults)
    except msgspec.ValidationError as error:
        raise RequestError("invalid_request", _explain(str(error))) from error
    except ValueError as error:  # out of SamplingParams' ranges
        if isinstance(error, RequestError):
            raise
        raise RequestError("invalid_request", str(error)) from error


def _read_completion(body: CompletionBody, defaults: SamplingParams) -> ReadRequest:
    prompt: Any = body.prompt
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
        if len(prompt) > 1:
            raise RequestError("invalid_request", f"prompt: one for each request, not {len(prompt)}")
        prompt = prompt[0]
    max_tokens = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    params = _params(body, defaults, max_tokens=max_tokens, logprobs=body.logprobs)
    return ReadRequest(body.model, prompt, params, is_chat=False)


def _read_chat(body: ChatBody, defaults: SamplingParams) -> ReadRequest:
    if not body.messages:
        raise RequestError("invalid_request", "messages: at least one")
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("invalid_request", "top_logprobs: needs logprobs to be true")
    conversation = Conversation([_flatten(message) for message in body.messages], None, body.add_generation_prompt)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return ReadRequest(
        body.model, conversation, _params(body, defaults, max_tokens=max_tokens, logprobs=logprobs), True
    )


def _params(body: _Body, defaults: SamplingParams, **more: Any) -> SamplingParams:
    said = {name: getattr(body, name) for name in _AS_THEY_ARE if getattr(body, name) is not None}
    return replace(defaults, **said, **more)


def _flatten(message: Mapping[str, Any]) -> dict[str, Any]:
    """Content in parts, as newer clients write it, becomes one text, as chat templates want it."""
    if not isinstance(message.get("role"), str):
        raise RequestError("invalid_request", "messages: each has a role, like 'user'")
    parts = message.get("content")
    if not isinstance(parts, list):
        return dict(message)
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError("invalid_request", "messages: content may have parts of type 'text' only")
        texts.append(part["text"])
    return {**message, "content": "\n".join(texts)}


def _explain(complaint: str) -> str:
    """msgspec's "Object contains unknown field `tools`", "Expected `int`, got `str` - at `$.n`"."""
    if "unknown field" in complaint:
        return f"{complaint.split('unknown field ', 1)[1].split(' ')[0].strip('`')}: not supported here"
    what, _, where = complaint.partition(" - at `$.")
    return f"{where.rstrip('`')}: {what}" if where else what
