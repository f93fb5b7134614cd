"""Messages as OpenAI's chat API has them, read once for every door: Python, batch files, HTTP.

What a chat template cannot be given is refused by its place (``messages[2].content[0]``), whatever the template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdecode.errors import RequestError

_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}  # type -> its key
_ABOUT_CACHES = {"cache_control", "prompt_cache_breakpoint"}  # of a part; they change no answer
_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")  # of an assistant
# What a template is given by fields of their own, or by nobody.
_NOT_IN_KWARGS = {
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens", "self",
}  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """A prompt that the chat template still has to write, so that one it refuses fails alone.

    messages: as `read_messages` takes them.  chat_template: None: the tokenizer's.  continue_final_message: the last
    message stays open, for the model to go on with.  template_kwargs: further variables of the template; those it does
    not read change nothing, as with vLLM.  reasoning_effort: OpenAI's; refused where the template has no use for it.
    cache_salt: who has another one finds no KV of it.
    """

    messages: Sequence[Mapping[str, Any]]
    chat_template: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    reasoning_effort: str | None = None
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        """Raises RequestError."""
        if self.add_generation_prompt and self.continue_final_message:
            raise _wrong(
                "continue_final_message",
                "the last message cannot be continued and be followed by a new one: set add_generation_prompt to false",
            )
        for name in self.template_kwargs:
            if not isinstance(name, str) or not name.isidentifier() or name in _NOT_IN_KWARGS:
                why = "is no variable that a template can be given here"
                raise _wrong(f"chat_template_kwargs.{name}" if isinstance(name, str) else "chat_template_kwargs", why)


def read_messages(messages: object, name: str = "messages") -> list[dict[str, Any]]:
    """With contents that are one text each; nulls are what was not said.  Reading what was read changes nothing.

    name: of the field, for errors.  Raises RequestError.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise _wrong(name, f"a list of messages like {{'role': 'user', 'content': '...'}}, not {_kind(messages)}")
    if not messages:
        raise _wrong(name, "at least one message")
    return [_read_message(message, f"{name}[{index}]") for index, message in enumerate(messages)]


def _read_message(message: object, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _wrong(place, f"a message is an object with role and content, not {_kind(message)}")
    said = {key: value for key, value in message.items() if value is not None}
    role = said.get("role")
    if not isinstance(role, str) or not role:
        told = "is required, like 'user'" if role is None else f"is a string like 'user', not {_kind(role)}"
        raise _wrong(f"{place}.role", told)
    if "audio" in said:
        raise _wrong(f"{place}.audio", "not supported here: this model reads text")
    if "tool_calls" in said:
        said["tool_calls"] = _read_tool_calls(said["tool_calls"], f"{place}.tool_calls")
    if "content" in said:
        content = _read_content(said["content"], f"{place}.content")
    elif isinstance(said.get("refusal"), str):
        content = said["refusal"]  # what the assistant said instead
    elif role == "assistant" and any(said.get(key) for key in _INSTEAD_OF_CONTENT):
        content = ""
    else:
        raise _wrong(f"{place}.content", "is required: a string, or a list of text parts")
    return {**said, "content": content}


def _read_content(content: object, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise _wrong(place, f"a string, or a list of text parts, not {_kind(content)}")
    return "\n".join(_read_part(part, f"{place}[{index}]") for index, part in enumerate(content))


def _read_part(part: object, place: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise _wrong(place, f"a part is an object like {{'type': 'text', 'text': '...'}}, not {_kind(part)}")
    said = {key: value for key, value in part.items() if value is not None}
    kind = said.get("type")
    if not isinstance(kind, str) or kind not in _TEXT_PARTS:
        told = "it has no type" if kind is None else f"{kind!r} is not supported: this model reads text"
        raise _wrong(place, f"content may have parts of type 'text' only; {told}")
    key = _TEXT_PARTS[kind]
    if not isinstance(said.get(key), str):
        raise _wrong(f"{place}.{key}", "is required, a string")
    for other in said:
        if other not in ("type", key) and other not in _ABOUT_CACHES and said[other] != []:
            raise _wrong(f"{place}.{other}", f"not supported in a part of type {kind!r}")
    return str(said[key])


def _read_tool_calls(calls: object, place: str) -> list[Any]:
    if not isinstance(calls, list | tuple):
        raise _wrong(place, f"a list of calls, not {_kind(calls)}")
    for index, call in enumerate(calls):
        if not isinstance(call, Mapping):
            raise _wrong(f"{place}[{index}]", f"a call is an object, not {_kind(call)}")
    return list(calls)


def _kind(value: object) -> str:
    """In JSON's words, where it has any."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "an object" if isinstance(value, Mapping) else "a list" if isinstance(value, list) else type(value).__name__


def _wrong(place: str, why: str) -> RequestError:
    return RequestError("invalid_request", f"{place}: {why}", place)
