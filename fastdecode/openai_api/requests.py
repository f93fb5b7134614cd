"""From a request's body to prompts and sampling parameters.  What cannot be done is refused, never left out.

What a body does not say comes from the model's generation_config.json, as with vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastdecode.errors import RequestError
from fastdecode.openai_api.bodies import ChatBody, CompletionBody, read_body
from fastdecode.prompts import Conversation, Prompt
from fastdecode.sampling_params import SamplingParams

CHAT_URL, COMPLETIONS_URL = "/v1/chat/completions", "/v1/completions"
URLS = (CHAT_URL, COMPLETIONS_URL)

_COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat goes on to the end of the context
_MAX_PRIORITY = 2**31 - 1
_AS_THEY_ARE = (
    "n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "skip_special_tokens",
    "include_stop_str_in_output",
)  # fmt: skip
_FIELDS = {*_AS_THEY_ARE, "max_tokens", "logprobs"}  # that SamplingParams may complain about


@dataclass(frozen=True)
class ReadRequest:
    model: str | None  # as the body calls it
    prompts: list[Prompt]  # at least one
    params: SamplingParams  # of each
    is_chat: bool
    is_streamed: bool = False
    with_usage: bool = False  # in a last chunk
    priority: int = 0  # lower goes first

    @property
    def prompt(self) -> Prompt:
        """Of a request that has one."""
        (prompt,) = self.prompts
        return prompt


def read_line(url: str, body: object, defaults: SamplingParams) -> ReadRequest:
    """Of a batch file: one prompt, answered whole, in the file's turn.  Raises like read_request."""
    request = read_request(url, body, defaults)
    if request.is_streamed:
        raise _wrong("stream", "this answer comes whole; leave it out or set it to false")
    if len(request.prompts) > 1:
        raise _wrong("prompt", f"one for each request, not {len(request.prompts)}")
    if request.priority:
        raise _wrong("priority", "a batch file has no line that goes first; leave it out")
    return request


def read_request(url: str, body: object, defaults: SamplingParams, chat_template: str | None = None) -> ReadRequest:
    """defaults: the model's own; chat_template: None: the tokenizer's.

    Raises RequestError, which says what field is wrong, and why.
    """
    if url not in URLS:
        raise RequestError("invalid_request", f"url {url!r} is none of {', '.join(URLS)}")
    return _read_chat(body, defaults, chat_template) if url == CHAT_URL else _read_completion(body, defaults)


def _read_completion(raw: object, defaults: SamplingParams) -> ReadRequest:
    body = read_body(raw, CompletionBody)
    max_tokens = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    params = _params(body, defaults, max_tokens=max_tokens, logprobs=body.logprobs)
    return _request(body, _prompts(body.prompt), params, is_chat=False)


def _read_chat(raw: object, defaults: SamplingParams, chat_template: str | None) -> ReadRequest:
    body = read_body(raw, ChatBody)
    if not body.messages:
        raise _wrong("messages", "at least one")
    if body.top_logprobs is not None and not body.logprobs:
        raise _wrong("top_logprobs", "needs logprobs to be true")
    messages = [flatten(message) for message in body.messages]
    conversation = Conversation(messages, chat_template, body.add_generation_prompt)
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = _params(body, defaults, max_tokens=max_tokens, logprobs=logprobs)
    return _request(body, [conversation], params, is_chat=True)


def _request(
    body: CompletionBody | ChatBody, prompts: list[Prompt], params: SamplingParams, *, is_chat: bool
) -> ReadRequest:
    if body.stream_options and not body.stream:
        raise _wrong("stream_options", "needs stream to be true")
    if abs(body.priority) > _MAX_PRIORITY:
        raise _wrong("priority", f"from {-_MAX_PRIORITY} to {_MAX_PRIORITY}, lower goes first; got {body.priority}")
    with_usage = bool(body.stream_options and body.stream_options.include_usage)
    return ReadRequest(body.model, prompts, params, is_chat, body.stream, with_usage, body.priority)


def _prompts(given: str | list[Any]) -> list[Prompt]:
    """A text, token ids, or a list of either: of one kind."""
    if isinstance(given, str):
        return [given]
    kinds = {type(item) for item in given}
    if not given or len(kinds) > 1:
        raise _wrong("prompt", "a text, a list of token ids, or a list of texts or of such lists; with something in it")
    return [given] if kinds == {int} else list(given)


def _params(body: CompletionBody | ChatBody, defaults: SamplingParams, **more: Any) -> SamplingParams:
    if more.get("max_tokens") == 0:
        raise RequestError("invalid_request", "max_tokens must be from 1, got 0", "max_tokens")
    said = {name: getattr(body, name) for name in _AS_THEY_ARE if getattr(body, name) is not None}
    try:
        return replace(defaults, **said, **more)
    except ValueError as error:  # its first word is the field's name
        name = (re.match(r"[a-z_]+", str(error)) or [""])[0]
        raise RequestError("invalid_request", str(error), name if name in _FIELDS else None) from error


def flatten(message: Mapping[str, Any]) -> dict[str, Any]:
    """Content in parts, as newer clients write it, becomes one text, as chat templates want it."""
    if not isinstance(message.get("role"), str):
        raise _wrong("messages", "each has a role, like 'user'")
    parts = message.get("content")
    if not isinstance(parts, list):
        return dict(message)
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _wrong("messages", "content may have parts of type 'text' only")
        texts.append(part["text"])
    return {**message, "content": "\n".join(texts)}


def _wrong(name: str, why: str) -> RequestError:
    return RequestError("invalid_request", f"{name}: {why}", name)
