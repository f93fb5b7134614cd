"""The forms in which a caller may give prompts, and how each becomes token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdecode.api.conversation import Conversation
from fastdecode.api.sampling_params import SamplingParams
from fastdecode.errors import ConfigError, RequestError
from fastdecode.text.chat_template import foreign_code
from fastdecode.text.tokenizer import Tokenizer

_PROMPT_KEYS = ("prompt", "prompt_token_ids", "cache_salt")
_FORMS = 'a prompt is a string, a list of token ids or {"prompt_token_ids": [...]}'

Prompt = str | Sequence[int] | Mapping[str, Any] | Conversation


@dataclass(frozen=True)
class ReadPrompt:
    text: str | None  # as it was given, or as the chat template wrote it; None: it was given as token ids
    token_ids: list[int]
    cache_salt: str | None = None  # see `Request`


def pair(
    prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
) -> list[tuple[Prompt, SamplingParams]]:
    """One prompt or many, one params for all or one each.  Raises ConfigError."""
    listed: Any = _plain(prompts)
    if isinstance(listed, bytes) or not isinstance(listed, str | Sequence | Mapping | Conversation):
        raise ConfigError(f"prompts: {_FORMS}, or a list of them; not {type(prompts).__name__}")
    if isinstance(listed, str | Mapping | Conversation) or (len(listed) and all(map(_is_token, listed))):
        listed = [listed]
    if isinstance(params, SamplingParams):
        each: Sequence[SamplingParams] = [params] * len(listed)
    elif isinstance(params, list | tuple):
        each = params
    else:
        raise ConfigError(f"sampling_params must be SamplingParams, or a list of them, got {type(params).__name__}")
    if len(each) != len(listed):
        raise ConfigError(f"{len(listed)} prompts and {len(each)} sampling params; give one for all, or one each")
    for given in each:
        if not isinstance(given, SamplingParams):
            raise ConfigError(f"sampling_params must be SamplingParams, got {type(given).__name__}")
    return list(zip(listed, each, strict=True))


def read_prompt(prompt: Prompt, tokenizer: Tokenizer | None, max_model_len: int | None = None) -> ReadPrompt:
    """max_model_len: texts that are longer for certain are refused before a tokenizer is kept busy with them.

    Raises RequestError, whatever foreign code raises; whether the ids are in the vocabulary is not looked at here.
    """
    salt = _read_salt(prompt)
    if isinstance(prompt, Mapping):
        prompt, text = _read_mapping(prompt)
        if text is not None:
            return ReadPrompt(text, _token_ids(prompt), salt)
    if not isinstance(prompt, str | Conversation):
        return ReadPrompt(None, _token_ids(prompt), salt)
    if tokenizer is None:
        raise RequestError("invalid_request", "a text prompt needs the tokenizer that skip_tokenizer_init left out")
    text = prompt if isinstance(prompt, str) else tokenizer.render_chat(prompt)
    if max_model_len is not None and tokenizer.fewest_tokens(text) > max_model_len:
        least = tokenizer.fewest_tokens(text)
        told = f"{len(text)} characters, at least {least} tokens; the limit is max_model_len = {max_model_len}"
        raise RequestError(
            "context_length_exceeded",
            f"the prompt has {told}: shorten it",
            numbers={"n_prompt_tokens": least, "n_ctx": max_model_len},
        )
    return ReadPrompt(text, tokenizer.encode(text, add_special_tokens=isinstance(prompt, str)), salt)


def _read_salt(prompt: Prompt) -> str | None:
    if isinstance(prompt, Mapping):
        salt = prompt.get("cache_salt")
    else:
        salt = prompt.cache_salt if isinstance(prompt, Conversation) else None
    if salt is not None and (not isinstance(salt, str) or not salt):
        told = f"cache_salt: a string that is not empty, got {salt!r}; leave it out to share with all who have none"
        raise RequestError("invalid_request", told, "cache_salt")
    return salt


def _read_mapping(given: Mapping[str, Any]) -> tuple[Any, str | None]:
    """The prompt, and what to call its text if it is token ids."""
    for key, value in given.items():
        is_empty = value is None or (isinstance(value, Mapping) and not value)
        if key not in _PROMPT_KEYS and not is_empty:
            raise RequestError(
                "invalid_request", f"prompt: {key!r} is not supported beside a prompt; {_FORMS}", str(key)
            )
    text, token_ids = given.get("prompt"), given.get("prompt_token_ids")
    if token_ids is None:
        return text, None
    if text is not None and not isinstance(text, str):
        raise RequestError("invalid_request", "prompt: beside prompt_token_ids it is their text, a string", "prompt")
    return token_ids, text


def _token_ids(value: object) -> list[int]:
    value = _plain(value)
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise RequestError("invalid_request", f"{_FORMS}, not {type(value).__name__}")
    with foreign_code(_FORMS):
        # numpy's and torch's integers become Python's; what is none stays, for the engine to refuse by value.
        return [int(token) if _is_token(token) and type(token) is not bool else token for token in value]


def _plain(value: Any) -> Any:
    """Arrays, of numpy or torch, as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_token(value: object) -> bool:
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0
