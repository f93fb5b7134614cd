"""Chat templates: what they are told, what they leave out without a word, and whatever they raise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fastdecode import LLM, SamplingParams
from fastdecode.api.conversation import Conversation
from fastdecode.errors import ConfigError, RequestError
from fastdecode.text.chat_template import render
from fastdecode.text.prompts import read_prompt
from fastdecode.text.tokenizer import Tokenizer

# The shapes of templates that are published: any role, those that are known, and those that complain.
ANY_ROLE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}#{% endif %}"
)
KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role == 'system' %}S:{{ m.content | trim }}{% elif m.role == 'user' %}"
    "U:{{ m.content }}{% elif m.role == 'assistant' %}A:{{ m.content.split('</think>')[-1] }}{% endif %}|{% endfor %}"
)
NO_SYSTEM = "{% for m in messages %}{% if m.role in ('user', 'assistant') %}{{ m.content }}{% endif %}{% endfor %}"
DEVELOPER = "{% for m in messages %}{% if m.role == 'developer' %}D:{{ m.content }}{% endif %}{% endfor %}"
STRICT = (
    "{% for m in messages %}{% if m.role not in ('system', 'user') %}{{ raise_exception('role ' + m.role) }}{% endif %}"
    "{{ m.role }}:{{ m.content }}{% endfor %}{# developer #}"
)
ONE_SYSTEM = (
    "{% if messages[0].role == 'system' %}S:{{ messages[0].content }}{% endif %}"
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
AS_JSON = "{% for m in messages %}{{ m.content | tojson | upper }}{% endfor %}"
THINKING = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if enable_thinking is defined and not enable_thinking %}"
    "<no>{% endif %}{{ reasoning_effort | default('') }}"
)


@pytest.fixture(scope="module")
def bare() -> PreTrainedTokenizerFast:
    """A tokenizer without a template."""
    return PreTrainedTokenizerFast(tokenizer_object=Backend(WordLevel({"[U]": 0}, "[U]")))


def said(*contents: str, **options: Any) -> Conversation:
    """contents: "role: text" """
    messages = [dict(zip(("role", "content"), content.split(": ", 1), strict=True)) for content in contents]
    return Conversation(messages, **options)


@pytest.mark.parametrize(
    "template, contents, written",
    [
        (ANY_ROLE, ("developer: Be brief.", "user: hi"), "<system>Be brief.\n<user>hi\n#"),
        (KNOWN_ROLES, ("developer: Be brief.", "user: hi"), "S:Be brief.|U:hi|"),
        (
            KNOWN_ROLES,
            ("system:  Be brief. ", "user: hi", "assistant: <think>x</think>ho"),
            "S:Be brief.|U:hi|A:ho|",
        ),
        (DEVELOPER, ("developer: Be brief.",), "D:Be brief."),
        (STRICT, ("developer: Be brief.", "user: hi"), "system:Be brief.user:hi"),
        (ONE_SYSTEM, ("system: Be brief.", "developer: Be kind."), "S:Be brief.<developer>Be kind."),
        (AS_JSON, ('tool: {"a": "b"}', "banana: x"), '"{\\"A\\": \\"B\\"}""X"'),
        (NO_SYSTEM, ("system:  ", "user: hi"), "hi"),
    ],
)
def test_every_message_is_in_the_prompt(
    template: str, contents: tuple[str, ...], written: str, bare: PreTrainedTokenizerFast
) -> None:
    assert render(bare, said(*contents, chat_template=template)) == written


@pytest.mark.parametrize(
    "template, contents, place",
    [
        (NO_SYSTEM, ("system: i", "user: hi"), "messages[0].role"),
        (NO_SYSTEM, ("user: hi", "developer: Be brief."), "messages[1].role"),
        (DEVELOPER, ("system: Be brief.",), "messages[0].role"),
        (KNOWN_ROLES, ("user: 5", "tool: 5"), "messages[1].role"),
        (KNOWN_ROLES, ("User: 5", "user: 5"), "messages[0].role"),
    ],
)
def test_what_a_template_leaves_out_is_refused(
    template: str, contents: tuple[str, ...], place: str, bare: PreTrainedTokenizerFast
) -> None:
    """Also where its text happens to stand elsewhere in the prompt."""
    with pytest.raises(RequestError, match="leaves messages of role") as refused:
        render(bare, said(*contents, chat_template=template))
    assert refused.value.param == place and repr(contents[int(place[9])].split(":")[0]) in str(refused.value)


@pytest.mark.parametrize(
    "template, written",
    [
        ("{% for a, b in call.arguments.items() %}{{ a }}={{ b }}{% endfor %}", "a=None"),
        ("{{ call.arguments | tojson }}", '{"a": null}'),
        ("{{ 'f(' + call.arguments + ')' }}", 'f({"a":null})'),
    ],
)
def test_arguments_of_tools_are_what_the_template_expects(
    template: str, written: str, bare: PreTrainedTokenizerFast
) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":null}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    whole = "{% set call = messages[0].tool_calls[0].function %}" + template
    assert render(bare, Conversation([message], whole)) == written


def test_a_template_that_looks_into_contents(bare: PreTrainedTokenizerFast) -> None:
    """It cannot be asked with other ones, so that its text itself has to do."""
    template = (
        "{% for m in messages %}{{ {'a': 'a', 'b': ''}[m.content] ~ (1 // ('ab'.count(m.content))) }}{% endfor %}"
    )
    assert render(bare, said("system: a", chat_template=template)) == "a1"
    with pytest.raises(RequestError, match="leaves messages of role 'system' out"):
        render(bare, said("system: b", chat_template=template))


@pytest.mark.parametrize(
    "template, told",
    [
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'x' * 10 ** 13 }}", "Error"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
        ("{{ messages[7].content }}", "does not take"),
        ("{{ 'a' + 5 }}", "TypeError"),
        ("{{ [1][5:].pop() }}", "does not take"),
        ("{% if %}", "does not take"),
        ("{{ messages | nope }}", "does not take"),
        ("{{ messages.__class__.__mro__ }}", "does not take"),
        ("{{ '%d' % 'x' }}", "TypeError"),
        ("{{ raise_exception('roles must alternate') }}", "conversation: roles must alternate"),
    ],
)
def test_whatever_a_template_raises_is_that_conversations_error(
    template: str, told: str, bare: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(RequestError, match=told) as refused:
        render(bare, said("user: hi", chat_template=template))
    assert refused.value.code == "invalid_request"


class Panic(BaseException):
    """What the tokenizers library raises when its own code panics is no Exception either."""


@pytest.mark.parametrize("error", [Panic("called `Option::unwrap()` on a `None` value"), OSError("disk"), KeyError(5)])
def test_whatever_a_tokenizer_raises_is_that_prompts_error(error: BaseException, demo_model: Path) -> None:
    tokenizer = Tokenizer(demo_model)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    tokenizer._tokenizer = fail  # type: ignore[assignment]
    with pytest.raises(RequestError, match=type(error).__name__):
        read_prompt("text", tokenizer)
    tokenizer._tokenizer = lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        read_prompt("text", tokenizer)


def test_no_template_is_told_as_such(bare: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RequestError, match="no chat template.*--chat-template FILE") as refused:
        render(bare, said("user: hi"))
    assert refused.value.param == "messages"


def test_variables_of_the_template(bare: PreTrainedTokenizerFast) -> None:
    def write(**options: Any) -> str:
        return render(bare, said("user: hi", **{"chat_template": THINKING, **options}))

    assert write() == "hi"
    assert write(template_kwargs={"enable_thinking": False}) == "hi<no>"
    assert write(template_kwargs={"enable_thinking": True, "unheard_of": 1}) == "hi"
    assert write(reasoning_effort="none") == "hi<no>none" and write(reasoning_effort="low") == "hilow"
    assert write(reasoning_effort="low", template_kwargs={"enable_thinking": False}) == "hi<no>low"
    assert write(reasoning_effort="none", chat_template=ANY_ROLE) == "<user>hi\n#"
    with pytest.raises(RequestError, match="has no use for it") as refused:
        write(reasoning_effort="low", chat_template=ANY_ROLE)
    assert refused.value.param == "reasoning_effort"


def test_the_final_message_is_continued(bare: PreTrainedTokenizerFast) -> None:
    options = {"chat_template": ANY_ROLE, "add_generation_prompt": False}
    contents = ("system: Be brief.", "user: hi", "assistant: Well,")
    assert render(bare, said(*contents, **options)) == "<system>Be brief.\n<user>hi\n<assistant>Well,\n"
    continued = render(bare, said(*contents, **options, continue_final_message=True))
    assert continued == "<system>Be brief.\n<user>hi\n<assistant>Well,"
    with pytest.raises(RequestError, match="set add_generation_prompt to false"):
        said("user: hi", continue_final_message=True)


def test_tokens_are_those_of_transformers(demo_model: Path) -> None:
    """The text that is shown, and refused by its length, is the one that is encoded."""
    tokenizer = Tokenizer(demo_model)
    conversation = said("system: Be brief.", "user: import os <|endoftext|>", chat_template=ANY_ROLE)
    expected = tokenizer._tokenizer.apply_chat_template(
        list(conversation.messages), chat_template=ANY_ROLE, add_generation_prompt=True, return_dict=True
    )
    read = read_prompt(conversation, tokenizer)
    assert read.token_ids == list(expected["input_ids"])
    assert read.text == "<system>Be brief.\n<user>import os <|endoftext|>\n#"
    with pytest.raises(RequestError, match="at least .* tokens; the limit is max_model_len = 9") as refused:
        read_prompt(said("user: " + "x" * 10**6, chat_template=ANY_ROLE), tokenizer, max_model_len=9)
    assert refused.value.code == "context_length_exceeded" and refused.value.numbers["n_ctx"] == 9


def test_chat_of_the_python_api(demo_model: Path) -> None:
    """Contents as the server takes them; a conversation that cannot be served has its own error."""
    greedy = SamplingParams(temperature=0, max_tokens=2)
    good: Any = [{"role": "user", "content": "import"}]
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "import"}]}]
    image: Any = [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]}]
    with LLM(demo_model) as llm:

        def chat(messages: Any, template: str = ANY_ROLE, **options: Any) -> Any:
            return llm.chat(messages, greedy, use_tqdm=False, chat_template=template, **options)

        plain, same, refused, last = chat([good, parts, image, good])
        assert plain.prompt == "<user>import\n#" and plain.outputs == same.outputs == last.outputs
        assert plain.prompt_token_ids == same.prompt_token_ids and plain.error is None
        assert refused.error.code == "invalid_request" and refused.error.param == "messages[0].content[1]"
        by_length = "{{ 7 // (messages[0].content|length - 3) }}"
        errors = [
            output.error for output in chat([[{"role": "user", "content": c}] for c in ("good", "two")], by_length)
        ]
        assert errors[0] is None and "ZeroDivisionError" in errors[1].message
        assert chat(good, continue_final_message=True)[0].prompt == "<user>import"
        assert chat(good, THINKING, chat_template_kwargs={"enable_thinking": False})[0].prompt == "import<no>"
        assert chat([[]])[0].error.param == "messages" and chat([]) == []
        for wrong in (
            {"continue_final_message": True, "add_generation_prompt": True},
            {"chat_template_kwargs": {"a b": 1}},
        ):
            with pytest.raises(ConfigError, match="message cannot be continued|a b"):
                chat(good, **wrong)
        with pytest.raises(ConfigError, match="messages is a list"):
            chat("hi")
