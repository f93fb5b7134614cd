"""From a conversation to the text that the model's chat template makes of it.

A template is a program of whoever published the model.  Whatever it raises is told as that conversation's error, and a
message that it has no branch for is refused: templates leave out roles that they do not know without a word.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fastdecode.conversation import Conversation, read_messages
from fastdecode.errors import RequestError

_ALWAYS_KNOWN = ("user", "assistant")  # roles of every template


@contextmanager
def foreign_code(what: str) -> Iterator[None]:
    """What code of others raises, of whatever class, becomes a RequestError: `what`, and why.

    Also what is no Exception: a panic of the tokenizers library derives from BaseException.
    """
    try:
        yield
    except (RequestError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        name = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        told = str(error)
        raise RequestError("invalid_request", f"{what}: {name}{told[:500]}") from error


def render(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> str:
    """Raises RequestError, by the place of what is wrong."""
    messages = read_messages(conversation.messages)
    source = _source(tokenizer, conversation.chat_template)
    kwargs = {**conversation.template_kwargs, **_effort(conversation, source)}

    def write(messages: Sequence[dict[str, Any]]) -> str:
        with foreign_code("the chat template does not take this conversation"):
            return str(tokenizer.apply_chat_template(
                messages,
                chat_template=source,
                add_generation_prompt=conversation.add_generation_prompt,
                continue_final_message=conversation.continue_final_message,
                tokenize=False,
                **kwargs,
            ))  # fmt: skip

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

    if all(message["role"] != "developer" for message in messages):
        return attempt(messages)
    # OpenAI's newer name for what most templates call system.
    as_system = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
    if "developer" not in source:
        return attempt(as_system)
    try:
        return attempt(messages)
    except RequestError as error:
        try:
            return attempt(as_system)
        except RequestError:
            raise error from None


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


def _first_lost(messages: Sequence[dict[str, Any]], text: str, write: Any) -> int | None:
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
