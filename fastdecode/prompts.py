"""The forms in which a caller may give prompts, and how each becomes token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastdecode.errors import ConfigError, RequestError
from fastdecode.sampling_params import SamplingParams
from fastdecode.text import Tokenizer


@dataclass(frozen=True)
class Conversation:
    """A prompt that the chat template still has to write, so that one it refuses fails alone."""

    messages: Sequence[Mapping[str, Any]]
    chat_template: str | None
    add_generation_prompt: bool


Prompt = str | Sequence[int] | Mapping[str, Any] | Conversation


@dataclass(frozen=True)
class ReadPrompt:
    text: str | None  # None: it was given as token ids
    token_ids: list[int]


def pair(
    prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams]
) -> list[tuple[Prompt, SamplingParams]]:
    """One prompt or many, one params for all or one each.  Raises ConfigError."""
    listed: Sequence[Any] = prompts  # type: ignore[assignment]
    if isinstance(prompts, str | Mapping) or (listed and all(isinstance(item, int) for item in listed)):
        listed = [prompts]
    each = [params] * len(listed) if isinstance(params, SamplingParams) else params
    if len(each) != len(listed):
        raise ConfigError(f"{len(listed)} prompts and {len(each)} sampling params; give one for all, or one each")
    for given in each:
        if not isinstance(given, SamplingParams):
            raise ConfigError(f"sampling_params must be SamplingParams, got {type(given).__name__}")
    return list(zip(listed, each, strict=True))


def read_prompt(prompt: Prompt, tokenizer: Tokenizer | None) -> ReadPrompt:
    """Raises RequestError; whether the ids are in the vocabulary is not looked at here."""
    if isinstance(prompt, Mapping):
        if "prompt_token_ids" in prompt:
            return ReadPrompt(prompt.get("prompt"), _token_ids(prompt["prompt_token_ids"]))
        prompt = prompt.get("prompt")  # type: ignore[assignment]
    if not isinstance(prompt, str | Conversation):
        return ReadPrompt(None, _token_ids(prompt))
    if tokenizer is None:
        raise RequestError("invalid_request", "a text prompt needs the tokenizer that skip_tokenizer_init left out")
    if isinstance(prompt, Conversation):
        return ReadPrompt(None, tokenizer.encode_chat(
            prompt.messages, chat_template=prompt.chat_template, add_generation_prompt=prompt.add_generation_prompt
        ))  # fmt: skip
    return ReadPrompt(prompt, tokenizer.encode(prompt))


def _token_ids(value: object) -> list[int]:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise RequestError(
            "invalid_request",
            f'a prompt is a string, a list of token ids or {{"prompt_token_ids": [...]}}, not {type(value).__name__}',
        )
    # numpy's and torch's integers become Python's; what is none stays as it is, for the engine to refuse by value.
    return [int(token) if hasattr(token, "__index__") and not isinstance(token, bool) else token for token in value]
