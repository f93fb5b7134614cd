"""Bodies in, bodies out: every field means what OpenAI says, or is refused by name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from fastdecode.errors import RequestError
from fastdecode.openai_api import completion_body, error_body, read_line, read_request, status_of
from fastdecode.outputs import CompletionOutput, Logprob, OutputError, RequestOutput
from fastdecode.prompts import Conversation
from fastdecode.sampling_params import SamplingParams

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
        (CHAT, {"messages": HI, "tools": []}, "tools: not supported"),
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


def an_output(asked: int) -> RequestOutput:
    """Token 5 was drawn, the second likeliest."""
    entries = {5: Logprob(-1.0, 2, "b"), 4: Logprob(-0.5, 1, "a"), 6: Logprob(-3.0, 3, "ü")}
    entries = dict(list(entries.items())[: max(asked, 1)] if asked < 3 else entries.items())
    return RequestOutput("0", None, [1, 2, 3], [CompletionOutput(0, "b", [5], -1.0, [entries], "stop", "x")])


def test_chat_response() -> None:
    body = completion_body([an_output(3)], is_chat=True, body_id="c-1", model="m", created=9, num_logprobs=2)
    (choice,) = body.pop("choices")
    assert body == {
        "id": "c-1", "object": "chat.completion", "created": 9, "model": "m",
        "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
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
