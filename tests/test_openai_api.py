"""Bodies in, bodies out: every field means what OpenAI says, or is refused by name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from fastdecode.api.conversation import Conversation, read_messages
from fastdecode.api.outputs import CompletionOutput, Logprob, OutputError, RequestOutput
from fastdecode.api.sampling_params import SamplingParams
from fastdecode.errors import RequestError
from fastdecode.openai_api import completion_body, error_body, read_line, read_request, status_of

DEFAULTS = SamplingParams(temperature=0.7, top_k=20)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "hi"}]


def test_completion_fields() -> None:
    body = {
        "model": "m", "prompt": "x", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "n": 2, "stop": "a", "seed": 7,
        "presence_penalty": 1, "frequency_penalty": -1, "logprobs": 3, "min_p": 0.1, "top_k": None, "user": "u",
        "repetition_penalty": 1.1, "min_tokens": 1, "stop_token_ids": [4], "ignore_eos": True, "stream": False,
    }  # fmt: skip
    request = read_request(COMPLETIONS, body, DEFAULTS)
    assert (request.model, request.prompt, request.is_chat) == ("m", "x", False)
    assert request.params == SamplingParams(
        max_tokens=5, temperature=0.5, top_p=0.9, n=2, stop="a", seed=7, presence_penalty=1, frequency_penalty=-1,
        logprobs=3, min_p=0.1, top_k=20, repetition_penalty=1.1, min_tokens=1, stop_token_ids=[4], ignore_eos=True,
    )  # fmt: skip
    assert read_request(COMPLETIONS, {"prompt": [1, 2]}, DEFAULTS).prompt == [1, 2]
    assert read_request(COMPLETIONS, {"prompt": ["x"]}, DEFAULTS).prompt == "x"
    assert read_request(COMPLETIONS, {"prompt": "x"}, DEFAULTS).params == SamplingParams(temperature=0.7, top_k=20)


def test_chat_fields() -> None:
    request = read_request(CHAT, {"messages": HI}, DEFAULTS)
    assert isinstance(request.prompt, Conversation) and request.prompt.messages == HI and request.is_chat
    assert request.params.max_tokens is None and request.params.logprobs is None
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    body = {"messages": parts, "max_tokens": 1, "max_completion_tokens": 9, "logprobs": True, "top_logprobs": 2}
    request = read_request(CHAT, body, DEFAULTS)
    assert isinstance(request.prompt, Conversation) and request.prompt.messages == [{"role": "user", "content": "a\nb"}]
    assert (request.params.max_tokens, request.params.logprobs) == (9, 2)
    assert read_request(CHAT, {"messages": HI, "logprobs": True}, DEFAULTS).params.logprobs == 0


@pytest.mark.parametrize(
    "url, body, said",
    [
        ("/v1/embeddings", {}, "none of /v1/chat"),
        (CHAT, [1], "JSON object"),
        (CHAT, {}, "messages"),
        (CHAT, {"messages": []}, "at least one"),
        (CHAT, {"messages": [{"content": "x"}]}, "role"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type 'text' only"),
        (CHAT, {"messages": HI, "tools": [{}]}, "tools: not supported"),
        (CHAT, {"messages": HI, "top_logprobs": 3}, "needs logprobs"),
        (COMPLETIONS, {"prompt": "x", "best_of": 3}, "best_of: not supported"),
        (COMPLETIONS, {"prompt": "x", "use_beam_search": True}, "use_beam_search: not supported"),
        (COMPLETIONS, {"prompt": "x", "stream": True}, "stream"),
        (COMPLETIONS, {"prompt": ["x", "y"]}, "one for each request"),
        (COMPLETIONS, {"prompt": 5}, "prompt"),
        (COMPLETIONS, {"prompt": "x", "n": "two"}, "n: Expected `int"),
        (COMPLETIONS, {"prompt": "x", "temperature": -1}, "temperature must be from 0 to 100"),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 0}, "max_tokens must be"),
        (COMPLETIONS, {"prompt": "x", "top_p": float("nan")}, "top_p"),
        (COMPLETIONS, {"prompt": "x", "seed": 2**70}, "seed"),
    ],
)
def test_refused(url: str, body: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        read_line(url, body, DEFAULTS)
    assert refused.value.code == "invalid_request"


def refusal(url: str, body: Any) -> RequestError:
    with pytest.raises(RequestError) as refused:
        read_request(url, body, DEFAULTS)
    assert refused.value.code == "invalid_request"
    return refused.value


# What clients write out without meaning anything by it.
OF_BOTH: dict[str, Any] = {
    "n": None, "best_of": 1, "logit_bias": {}, "bad_words": [], "allowed_token_ids": None, "length_penalty": 1,
    "detokenize": True, "spaces_between_special_tokens": True, "return_token_ids": False,
    "truncate_prompt_tokens": None,
    "response_format": {"type": "text", "json_schema": None}, "echo": False, "use_beam_search": False, "user": "me",
    "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h", "service_tier": "auto",
    "store": False, "metadata": {"a": None}, "stream_options": None, "guided_json": None, "cache_salt": None,
    "return_tokens_as_token_ids": False, "thinking_token_budget": -1, "structured_outputs": None,
    "logits_processors": [], "lora": [], "timings_per_token": False, "repeat_penalty": 1.0, "dry_multiplier": 0,
    "dynatemp_range": 0.0, "xtc_probability": 0,
}  # fmt: skip
OF_COMPLETIONS = {"suffix": "", "prompt_embeds": [], "add_special_tokens": True, "logprobs": False}
OF_CHAT = {
    "top_logprobs": 0, "logprobs": False, "tools": [], "tool_choice": "auto", "parallel_tool_calls": False,
    "functions": [], "function_call": "none", "audio": None, "prediction": None, "web_search_options": None,
    "modalities": ["text"], "continue_final_message": False, "include_reasoning": True, "add_special_tokens": False,
    "chat_template": None, "chat_template_kwargs": {}, "documents": None, "max_tokens": None,
}  # fmt: skip


@pytest.mark.parametrize(
    "url, minimal, fields",
    [(COMPLETIONS, {"prompt": "x"}, OF_BOTH | OF_COMPLETIONS), (CHAT, {"messages": HI}, OF_BOTH | OF_CHAT)],
)
def test_values_that_ask_for_nothing_change_nothing(url: str, minimal: Any, fields: dict[str, Any]) -> None:
    plain = read_request(url, minimal, DEFAULTS)
    for name, value in fields.items():
        assert read_request(url, minimal | {name: value}, DEFAULTS) == plain, name
    assert read_request(url, minimal | fields, DEFAULTS) == plain


@pytest.mark.parametrize(
    "name, value",
    [
        ("suffix", "y"), ("best_of", 2), ("length_penalty", 2), ("detokenize", False),
        ("response_format", {"type": "json_object"}), ("guided_json", {}), ("truncate_prompt_tokens", 5),
        ("no such", 1), ("return_token_ids", 1),
        ("spaces_between_special_tokens", False), ("use_beam_search", True), ("\ud800", 1), ("typical_p", 0.5),
        ("logits_processors", ["x"]), ("repeat_penalty", 1.1), ("dry_multiplier", 0.8), ("xtc_probability", 0.5),
    ],
)  # fmt: skip
def test_values_that_mean_something_are_refused_by_name(name: str, value: Any) -> None:
    for url, minimal in ((COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": HI})):
        error = refusal(url, {**minimal, name: value})
        assert error.param == ascii(name)[1:-1] and "not supported here" in str(error)
        str(error).encode()  # half a surrogate pair is written out


def test_samples_that_are_all_wanted_are_no_choice() -> None:
    assert read_request(COMPLETIONS, {"prompt": "x", "best_of": 3, "n": 3}, DEFAULTS).params.n == 3
    assert refusal(COMPLETIONS, {"prompt": "x", "best_of": 1, "n": 3, "stop": [""]}).param == "stop"


@pytest.mark.parametrize(
    "url, body, param, said",
    [
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens must be from 1"),
        (CHAT, {"max_tokens": 0}, "max_tokens", "max_tokens must be from 1"),
        (CHAT, {"max_completion_tokens": 3, "min_tokens": 9}, "min_tokens", "at most max_completion_tokens (3)"),
        (CHAT, {"logprobs": True, "top_logprobs": -1}, "top_logprobs", "top_logprobs must be from 0"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        (COMPLETIONS, {"logprobs": -1}, "logprobs", "logprobs must be from 0"),
        (COMPLETIONS, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "bool"),
        (COMPLETIONS, {"stream": True, "stream_options": {"include_obfuscation": True}},
         "stream_options.include_obfuscation", "not supported"),
        (CHAT, {"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message", "to false"),
        (CHAT, {"chat_template": "x"}, "chat_template", "not supported here"),
        (CHAT, {"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs.tokenize", "no variable"),
        (CHAT, {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "no variable"),
        (CHAT, {"reasoning_effort": "much"}, "reasoning_effort", "'much'"),
    ],
)  # fmt: skip
def test_errors_name_the_field_that_was_sent(url: str, body: Any, param: str, said: str) -> None:
    error = refusal(url, {**({"messages": HI} if url == CHAT else {"prompt": "x"}), **body})
    assert error.param == param and said in str(error)


def test_null_is_what_was_not_said_at_any_depth() -> None:
    options = {"include_usage": None, "continuous_usage_stats": None, "unheard_of": None}
    request = read_request(COMPLETIONS, {"prompt": "x", "stream": True, "stream_options": options}, DEFAULTS)
    assert request == read_request(COMPLETIONS, {"prompt": "x", "stream": True}, DEFAULTS)
    message = {"role": "user", "name": None, "content": [{"type": "text", "text": "hi", "image_url": None}]}
    body = {"messages": [message], "chat_template_kwargs": {"enable_thinking": None}}
    assert read_request(CHAT, body, DEFAULTS) == read_request(CHAT, {"messages": HI}, DEFAULTS)


def test_no_limit_and_usage_so_far() -> None:
    for url, minimal in ((COMPLETIONS, {"prompt": "x"}), (CHAT, {"messages": HI})):
        assert read_request(url, {**minimal, "max_tokens": -1}, DEFAULTS).params.max_tokens is None
        streamed = {**minimal, "stream": True, "stream_options": {"continuous_usage_stats": True}}
        request = read_request(url, streamed, DEFAULTS)
        assert request.with_usage and request.with_usage_so_far
    assert read_request(CHAT, {"messages": HI, "max_completion_tokens": -1}, DEFAULTS).params.max_tokens is None


def test_a_salt_goes_with_every_prompt() -> None:
    read = read_request(COMPLETIONS, {"prompt": ["x", "y"], "cache_salt": "s"}, DEFAULTS)
    assert read.prompts == [{"prompt": "x", "cache_salt": "s"}, {"prompt": "y", "cache_salt": "s"}]
    read = read_line(COMPLETIONS, {"prompt": [5, 6], "cache_salt": "s"}, DEFAULTS)
    assert read.prompt == {"prompt_token_ids": [5, 6], "cache_salt": "s"}
    assert read_line(CHAT, {"messages": HI, "cache_salt": "s"}, DEFAULTS).prompt == Conversation(HI, cache_salt="s")


def test_what_a_chat_template_is_told() -> None:
    def read(trust_chat_template: bool = False, **body: Any) -> Conversation:
        body = {"messages": HI, **body}
        prompt = read_request(CHAT, body, DEFAULTS, "ours", trust_chat_template=trust_chat_template).prompt
        assert isinstance(prompt, Conversation)
        return prompt

    assert read() == Conversation(HI, "ours")
    assert read(continue_final_message=True) == Conversation(HI, "ours", False, True)
    assert read(add_generation_prompt=False) == Conversation(HI, "ours", False)
    kwargs = {"enable_thinking": False}
    assert read(chat_template_kwargs=kwargs) == Conversation(HI, "ours", template_kwargs=kwargs)
    assert read(reasoning_effort="low").reasoning_effort == "low"
    assert read(verbosity="low").template_kwargs == {"verbosity": "low"}
    assert read(trust_chat_template=True, chat_template="theirs") == Conversation(HI, "theirs")


@pytest.mark.parametrize(
    "url",
    [
        "/v1/{}", "v1/{}", "/{}", "{}", "/v1/{}/", "https://api.openai.com/v1/{}", "http://localhost:8000/proxy/v1/{}/",
        "/openai/deployments/gpt-4o/{}?api-version=2024-10-21", "https://x.openai.azure.com/openai/deployments/m/{}",
    ],
)  # fmt: skip
def test_forms_of_urls_in_batch_files(url: str) -> None:
    assert read_line(url.format("chat/completions"), {"messages": HI}, DEFAULTS).is_chat
    assert not read_line(url.format("completions"), {"prompt": "x"}, DEFAULTS).is_chat


def test_a_body_may_tell_its_url() -> None:
    for url in (None, ""):
        assert read_line(url, {"messages": HI}, DEFAULTS).is_chat
        assert not read_line(url, {"prompt": "x", "messages": None}, DEFAULTS).is_chat
        for body in ({}, {"prompt": "x", "messages": HI}, None, [1]):
            with pytest.raises(RequestError, match="does not tell"):
                read_line(url, body, DEFAULTS)
    for other in ("/v1/embeddings", "/v1/chat/completion", "/v1/xcompletions", "/v2/responses", "completions#x"):
        with pytest.raises(RequestError, match="is none of"):
            read_line(other, {"prompt": "x", "messages": HI}, DEFAULTS)


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": null}'}}


@pytest.mark.parametrize(
    "message, place",
    [
        ("hi", ""),
        ({}, ".role"),
        ({"content": "x"}, ".role"),
        ({"role": 5, "content": "x"}, ".role"),
        ({"role": "user"}, ".content"),
        ({"role": "user", "content": None}, ".content"),
        ({"role": "user", "content": None, "tool_calls": [CALL]}, ".content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, ".content"),
        ({"role": "user", "content": 5}, ".content"),
        ({"role": "user", "content": True}, ".content"),
        ({"role": "user", "content": {"text": "x"}}, ".content"),
        ({"role": "user", "content": [5]}, ".content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}, ".content[1]"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, ".content[0]"),
        ({"role": "user", "content": [{"text": "x"}]}, ".content[0]"),
        ({"role": "user", "content": [{"type": "text"}]}, ".content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, ".content[0].text"),
        ({"role": "user", "content": [{"type": "text", "text": "", "image_url": "u"}]}, ".content[0].image_url"),
        ({"role": "assistant", "audio": {"id": "a"}}, ".audio"),
        ({"role": "assistant", "tool_calls": 5}, ".tool_calls"),
        ({"role": "assistant", "tool_calls": [5]}, ".tool_calls[0]"),
    ],
)
def test_messages_are_refused_by_their_place(message: Any, place: str) -> None:
    for read in (lambda: refusal(CHAT, {"messages": [*HI, message]}), lambda: _refused_messages([*HI, message])):
        error = read()
        assert error.param == f"messages[1]{place}" and (place == "" or str(error).startswith(error.param))


def _refused_messages(messages: Any) -> RequestError:
    with pytest.raises(RequestError) as refused:
        read_messages(messages)
    return refused.value


def test_contents_become_one_text() -> None:
    cached = {"type": "text", "text": "b", "cache_control": {"type": "ephemeral"}}
    for given, read in (
        ({"role": "user", "content": [{"type": "text", "text": "a"}, cached]}, {"role": "user", "content": "a\nb"}),
        ({"role": "user", "content": []}, {"role": "user", "content": ""}),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]},
         {"role": "assistant", "content": "", "tool_calls": [CALL]}),
        ({"role": "assistant", "tool_calls": [CALL]}, {"role": "assistant", "content": "", "tool_calls": [CALL]}),
        ({"role": "assistant", "content": None, "refusal": "no"},
         {"role": "assistant", "content": "no", "refusal": "no"}),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
         {"role": "assistant", "content": "no"}),
        ({"role": "tool", "content": "x", "tool_call_id": "c"}, {"role": "tool", "content": "x", "tool_call_id": "c"}),
    ):  # fmt: skip
        assert read_messages([given]) == [read] == read_messages([read])


def an_output(asked: int) -> RequestOutput:
    """Token 5 was drawn, the second likeliest."""
    entries = {5: Logprob(-1.0, 2, "b"), 4: Logprob(-0.5, 1, "a"), 6: Logprob(-3.0, 3, "ü")}
    entries = dict(list(entries.items())[: max(asked, 1)] if asked < 3 else entries.items())
    choice = CompletionOutput(0, "b", [5], -1.0, [entries], "stop", "x")
    return RequestOutput("0", None, [1, 2, 3], [choice], num_cached_tokens=2)


def test_chat_response() -> None:
    body = completion_body([an_output(3)], is_chat=True, body_id="c-1", model="m", created=9, num_logprobs=2)
    (choice,) = body.pop("choices")
    assert body == {
        "id": "c-1", "object": "chat.completion", "created": 9, "model": "m",
        "usage": {
            "prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }  # fmt: skip
    assert choice["message"] == {"role": "assistant", "content": "b"} and choice["finish_reason"] == "stop"
    (token,) = choice["logprobs"]["content"]
    assert (token["token"], token["logprob"], token["bytes"]) == ("b", -1.0, [98])
    assert [top["token"] for top in token["top_logprobs"]] == ["a", "b"]
    none = completion_body([an_output(0)], is_chat=True, body_id="c", model="m", created=9, num_logprobs=0)
    assert none["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_text_response() -> None:
    body = completion_body([an_output(3)], is_chat=False, body_id="c-1", model="m", created=9, num_logprobs=3)
    (choice,) = body["choices"]
    assert body["object"] == "text_completion" and choice["text"] == "b" and choice["stop_reason"] == "x"
    assert choice["logprobs"] == {
        "tokens": ["b"], "token_logprobs": [-1.0], "top_logprobs": [{"b": -1.0, "a": -0.5, "ü": -3.0}],
        "text_offset": [0],
    }  # fmt: skip
    plain = completion_body([an_output(1)], is_chat=False, body_id="c", model="m", created=9, num_logprobs=None)
    assert plain["choices"][0]["logprobs"] is None


@pytest.mark.parametrize("is_chat", [True, False])
def test_logprobs_that_json_cannot_say(is_chat: bool) -> None:
    """A token that the model cannot take has -inf; bodies say vLLM's -9999.0."""
    entries = {5: Logprob(-0.5, 1, "b"), 4: Logprob(-math.inf, 2, "a")}
    completion = CompletionOutput(0, "ba", [5, 4], -math.inf, [entries, entries], "stop")
    output = RequestOutput("0", None, [1], [completion])
    body = completion_body([output], is_chat=is_chat, body_id="c", model="m", created=9, num_logprobs=2)
    assert json.loads(json.dumps(body, allow_nan=False)) == body
    logprobs = body["choices"][0]["logprobs"]
    if is_chat:
        assert [token["logprob"] for token in logprobs["content"]] == [-0.5, -9999.0]
        assert [top["logprob"] for top in logprobs["content"][0]["top_logprobs"]] == [-0.5, -9999.0]
    else:
        assert logprobs["token_logprobs"] == [-0.5, -9999.0]
        assert logprobs["top_logprobs"] == [{"b": -0.5, "a": -9999.0}] * 2


def test_errors_are_in_openais_envelope() -> None:
    error = OutputError("context_length_exceeded", "too long")
    assert status_of(error) == 400 and status_of(OutputError("timeout", "")) == 408
    assert error_body(error) == {
        "error": {
            "message": "too long", "type": "invalid_request_error", "param": None, "code": "context_length_exceeded",
        }
    }  # fmt: skip
    assert error_body(OutputError("worker_lost", "x"))["error"]["type"] == "server_error"
