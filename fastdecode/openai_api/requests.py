"""From a request's body to prompts and sampling parameters.  What cannot be done is refused, never left out.

What a body does not say comes from the model's generation_config.json, as with vLLM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastdecode.api.conversation import Conversation, read_messages
from fastdecode.api.sampling_params import SamplingParams
from fastdecode.errors import RequestError
from fastdecode.openai_api.bodies import MAX_PRIORITY, NO_LIMIT, ChatBody, CompletionBody, TemplateBody, read_body
from fastdecode.text.prompts import Prompt

CHAT_URL, COMPLETIONS_URL = "/v1/chat/completions", "/v1/completions"
URLS = (CHAT_URL, COMPLETIONS_URL)

_URL = re.compile(r"(https?://[^?#]*?)?/?(openai/)?(deployments/[^/]+/)?(v1/)?(?P<chat>chat/)?completions/?(\?[^#]*)?")
_COMPLETION_TOKENS = 16  # OpenAI's default for completions; a chat goes on to the end of the context
_AS_THEY_ARE = (
    "n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "skip_special_tokens",
    "include_stop_str_in_output", "logit_bias", "allowed_token_ids", "bad_words",
)  # fmt: skip
_FIELDS = {
    *_AS_THEY_ARE,
    "max_tokens",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "prompt_logprobs",
}  # that SamplingParams may complain about


@dataclass(frozen=True)
class ReadRequest:
    model: str | None  # as the body calls it
    prompts: list[Prompt]  # at least one
    params: SamplingParams  # of each
    is_chat: bool
    is_streamed: bool = False
    with_usage: bool = False  # in a last chunk
    with_usage_so_far: bool = False  # in every chunk
    priority: int = 0  # lower goes first
    is_echoed: bool = False  # the prompt stands before what is generated
    num_prompt_logprobs: int | None = None  # of prompt_logprobs, as vLLM has them beside the answer; None: none

    @property
    def places(self) -> list[str]:
        """What errors call each of the prompts."""
        if len(self.prompts) > 1:
            return [f"prompt[{index}]" for index in range(len(self.prompts))]
        return ["messages" if self.is_chat else "prompt"]

    @property
    def prompt(self) -> Prompt:
        """Of a request that has one."""
        (prompt,) = self.prompts
        return prompt


def read_line(url: str | None, body: object, defaults: SamplingParams, chat_template: str | None = None) -> ReadRequest:
    """Of a batch file: one prompt, answered whole, in the file's turn.  Takes and raises what read_request does.

    url: None, or empty: the body tells.
    """
    request = read_request(_endpoint(url, body), body, defaults, chat_template)
    if request.is_streamed:
        raise _wrong("stream", "this answer comes whole; leave it out or set it to false")
    if len(request.prompts) > 1:
        raise _wrong("prompt", f"one for each request, not {len(request.prompts)}")
    if request.priority:
        raise _wrong("priority", "a batch file has no line that goes first; leave it out")
    return request


def _endpoint(url: str | None, body: object) -> str:
    """Files for other servers have hosts, other versions of the path (Azure's), or slashes more or less."""
    if not url:
        told = [of for name, of in (("messages", CHAT_URL), ("prompt", COMPLETIONS_URL)) if _says(body, name)]
        if len(told) != 1:
            raise _wrong("url", f"is missing, and the body does not tell which of {', '.join(URLS)} it is")
        return told[0]
    found = _URL.fullmatch(url)
    return url if not found else CHAT_URL if found["chat"] else COMPLETIONS_URL


def _says(body: object, name: str) -> bool:
    return isinstance(body, Mapping) and body.get(name) is not None


def read_request(
    url: str,
    body: object,
    defaults: SamplingParams,
    chat_template: str | None = None,
    *,
    trust_chat_template: bool = False,
) -> ReadRequest:
    """defaults: the model's own; chat_template: None: the tokenizer's; trust_chat_template: a request may bring one.

    Raises RequestError, which says what field is wrong, and why.
    """
    if url not in URLS:
        raise RequestError("invalid_request", f"url {url!r} is none of {', '.join(URLS)}", "url")
    if url == COMPLETIONS_URL:
        return _read_completion(body, defaults)
    return _read_chat(body, defaults, chat_template, trust_chat_template)


def _read_completion(raw: object, defaults: SamplingParams) -> ReadRequest:
    body = read_body(raw, CompletionBody)
    max_tokens = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    params = _params(
        body,
        defaults,
        {},
        max_tokens=_limit(max_tokens),
        logprobs=body.logprobs,
        prompt_logprobs=_most(body.prompt_logprobs, body.logprobs if body.echo else None),
    )
    return _request(body, _salted(_prompts(body.prompt), body.cache_salt), params, is_chat=False)


def _read_chat(raw: object, defaults: SamplingParams, chat_template: str | None, trust: bool) -> ReadRequest:
    body = read_body(raw, ChatBody)
    if body.top_logprobs and not body.logprobs:
        raise _wrong("top_logprobs", "needs logprobs to be true")
    conversation = read_conversation(body, chat_template, trust_chat_template=trust)
    sent_as = {"logprobs": "top_logprobs"}
    max_tokens = body.max_tokens
    if body.max_completion_tokens is not None:
        max_tokens, sent_as["max_tokens"] = body.max_completion_tokens, "max_completion_tokens"
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = _params(
        body,
        defaults,
        sent_as,
        max_tokens=_limit(max_tokens),
        logprobs=logprobs,
        prompt_logprobs=body.prompt_logprobs,
    )
    return _request(body, [replace(conversation, cache_salt=body.cache_salt)], params, is_chat=True)


def read_conversation(
    body: ChatBody | TemplateBody, chat_template: str | None, *, trust_chat_template: bool
) -> Conversation:
    """Takes and raises what read_request does."""
    if body.chat_template is not None and not trust_chat_template:
        told = "not supported here: a template is a program, and this one takes none from a request"
        raise _wrong("chat_template", f"{told} (--chat-template FILE sets one for all)")
    begins, continues = body.add_generation_prompt, body.continue_final_message
    variables = dict(body.chat_template_kwargs or {})
    if body.verbosity is not None:
        variables.setdefault("verbosity", body.verbosity)  # for templates that read it, as a hint
    return Conversation(
        read_messages(body.messages),
        body.chat_template or chat_template,
        add_generation_prompt=not continues if begins is None else begins,
        continue_final_message=continues,
        template_kwargs=variables,
        reasoning_effort=body.reasoning_effort,
    )


def _request(
    body: CompletionBody | ChatBody, prompts: list[Prompt], params: SamplingParams, *, is_chat: bool
) -> ReadRequest:
    options = body.stream_options
    if options and not body.stream:
        raise _wrong("stream_options", "needs stream to be true")
    if options and options.include_obfuscation:
        raise _wrong("stream_options.include_obfuscation", "not supported here")
    if abs(body.priority) > MAX_PRIORITY:
        raise _wrong("priority", f"from {-MAX_PRIORITY} to {MAX_PRIORITY}, lower goes first; got {body.priority}")
    if body.prompt_logprobs is not None and body.stream:
        raise _wrong("prompt_logprobs", "a streamed answer has no place for them; leave out stream, or use echo")
    return ReadRequest(
        body.model,
        prompts,
        params,
        is_chat,
        is_streamed=body.stream,
        with_usage=bool(options and (options.include_usage or options.continuous_usage_stats)),
        with_usage_so_far=bool(options and options.continuous_usage_stats),
        priority=body.priority,
        is_echoed=isinstance(body, CompletionBody) and body.echo,
        num_prompt_logprobs=body.prompt_logprobs,
    )


def _most(*counts: int | None) -> int | None:
    return max((count for count in counts if count is not None), default=None)


def _limit(max_tokens: int | None) -> int | None:
    return None if max_tokens == NO_LIMIT else max_tokens


def _prompts(given: str | list[Any]) -> list[Prompt]:
    """A text, token ids, or a list of either: of one kind."""
    if isinstance(given, str):
        return [given]
    kinds = {type(item) for item in given}
    if not given or len(kinds) > 1:
        raise _wrong("prompt", "a text, a list of token ids, or a list of texts or of such lists; with something in it")
    return [given] if kinds == {int} else list(given)


def _salted(prompts: list[Prompt], salt: str | None) -> list[Prompt]:
    if salt is None:
        return prompts
    return [
        {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt, "cache_salt": salt} for prompt in prompts
    ]


def _params(
    body: CompletionBody | ChatBody, defaults: SamplingParams, sent_as: Mapping[str, str], **more: Any
) -> SamplingParams:
    """sent_as: what the body calls some of SamplingParams' fields."""
    shows_prompt = more["prompt_logprobs"] is not None or (isinstance(body, CompletionBody) and body.echo)
    if more["max_tokens"] == 0 and not shows_prompt:
        name = sent_as.get("max_tokens", "max_tokens")
        told = f"{name} must be from 1, got 0, which goes with echo or prompt_logprobs alone"
        raise RequestError("invalid_request", told, name)
    said = {name: getattr(body, name) for name in _AS_THEY_ARE if getattr(body, name) is not None}
    try:
        return replace(defaults, **said, **more)
    except ValueError as error:
        told = re.sub(r"[a-z_]+", lambda word: sent_as.get(word[0], word[0]), str(error))
        name = (re.match(r"[a-z_]+", told) or [""])[0]  # its first word is the field's name
        raise RequestError("invalid_request", told, name if name in _FIELDS else None) from error


def _wrong(name: str, why: str) -> RequestError:
    return RequestError("invalid_request", f"{name}: {why}", name)
