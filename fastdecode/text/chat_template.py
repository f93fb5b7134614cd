"""From a conversation to the text that the model's chat template makes of it.

A template is a program of whoever published the model.  Whatever it raises is told as that conversation's error, and a
message that it has no branch for is refused: templates leave out roles that they do not know without a word.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fastdecode.api.conversation import Conversation, read_messages
from fastdecode.errors import RequestError

_ALWAYS_KNOWN = ("user", "assistant")  # roles of every template


@contextmanager
def foreign_code(what: str, code: str = "invalid_request") -> Iterator[None]:
    """What code of others raises, of whatever class, becomes a RequestError of that code: `what`, and why.

    Also what is no Exception: a panic of the tokenizers library derives from BaseException.
    """
    try:
        yield
    except (RequestError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        name = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        told = str(error)
        raise RequestError(code, f"{what}: {name}{told[:500]}") from error


def render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    """Raises RequestError, by the place of what is wrong."""
    messages = read_messages(conversation.messages)
    source = _source(tokenizer, conversation.chat_template)
    kwargs = {**conversation.template_kwargs, **_effort(conversation, source)}

    def write_as_it_is(messages: Sequence[dict[str, Any]]) -> str:
        with foreign_code("the chat template does not take this conversation"):
            return str(tokenizer.apply_chat_template(
                messages,
                chat_template=source,
                add_generation_prompt=conversation.add_generation_prompt,
                continue_final_message=conversation.continue_final_message,
                tokenize=False,
                **kwargs,
            ))  # fmt: skip

    def write(messages: Sequence[dict[str, Any]]) -> str:
        with_objects = [_with_argument_objects(message) for message in messages]
        return _first_that_works([with_objects, messages] if with_objects != messages else [messages], write_as_it_is)

    def attempt(messages: Sequence[dict[str, Any]]) -> str:
        text = write(messages)
        if (lost := _first_lost(messages, text, write)) is not None:
            role = conversation.messages[lost]["role"]
            raise RequestError(
                "invalid_request",
                f"messages[{lost}].role: the model's chat template leaves messages of role {role!r} out; give their "
                "text to another role",
                f"messages[{lost}].role",
            )
        return text

    # OpenAI's newer name for what most templates call system; some write any role as it is.
    as_system = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
    if as_system == messages:
        return attempt(messages)
    return _first_that_works([messages, as_system] if "developer" in source else [as_system, messages], attempt)


def _first_that_works(
    forms: Sequence[Sequence[dict[str, Any]]], write: Callable[[Sequence[dict[str, Any]]], str]
) -> str:
    """Raises what the first one raises if none does."""
    first: RequestError | None = None
    for form in forms:
        try:
            return write(form)
        except RequestError as error:
            first = first or error
    assert first is not None, "there is a form"
    raise first


def _with_argument_objects(message: dict[str, Any]) -> dict[str, Any]:
    """Arguments of tools travel as JSON in a string; most templates expect the object, as vLLM gives it to them."""
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [_with_argument_object(call) for call in message["tool_calls"]]}


def _with_argument_object(call: Mapping[str, Any]) -> Mapping[str, Any]:
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(arguments, str):
        return call
    try:
        read = json.loads(arguments) if arguments else {}
    except (ValueError, RecursionError):
        return call  # a template may still print it
    return {**call, "function": {**function, "arguments": read}} if isinstance(read, dict) else call


def _source(tokenizer: PreTrainedTokenizerBase, given: str | None) -> str:
    if given is None and not tokenizer.chat_template:
        raise RequestError(
            "invalid_request",
            "this model's tokenizer has no chat template, so that it takes no messages: give one when you start "
            "(--chat-template FILE, or chat_template=... of LLM.chat), or ask for completions of a prompt",
            "messages",
        )
    with foreign_code("the model's chat template cannot be found"):
        return str(tokenizer.get_chat_template(given))


def _effort(conversation: Conversation, source: str) -> dict[str, Any]:
    """Variables for reasoning_effort; many templates know only whether to think at all."""
    effort, given = conversation.reasoning_effort, conversation.template_kwargs
    if effort is None:
        return {}
    made: dict[str, Any] = {}
    if "reasoning_effort" in source:
        made["reasoning_effort"] = effort
    if "enable_thinking" in source and "enable_thinking" not in given:
        made["enable_thinking"] = effort != "none"
    if not made and effort != "none":
        told = "this model's chat template has no use for it"
        raise RequestError("invalid_request", f"reasoning_effort: {told}; leave it out", "reasoning_effort")
    return made


def _first_lost(
    messages: Sequence[dict[str, Any]], text: str, write: Callable[[Sequence[dict[str, Any]]], str]
) -> int | None:
    """The place of a message that the template says nothing of, if its role is not one of those that all know.

    Its own words may stand elsewhere by chance, or be written in another way (as JSON, say), so numbers that nobody
    has said take their place and the template is asked once more.
    """
    marks = {
        index: str(secrets.randbelow(9 * 10**17) + 10**17)  # digits: no filter changes them
        for index, message in enumerate(messages)
        if message["role"] not in _ALWAYS_KNOWN and message["content"].strip()
    }
    if not marks:
        return None
    try:
        marked = write([{**m, "content": marks[i]} if i in marks else m for i, m in enumerate(messages)])
    except RequestError:  # it looks into contents: then the words themselves have to do
        return next((i for i in marks if messages[i]["content"].strip() not in text), None)
    return next((i for i, mark in marks.items() if mark not in marked), None)
