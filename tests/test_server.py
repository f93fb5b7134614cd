"""``fastdecode serve`` as its users see it: OpenAI's own client, raw transcripts, errors, and a fuzzer."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest
import schemathesis
from hypothesis import Phase, given, settings
from prometheus_client.parser import text_string_to_metric_families
from serving import ServerProcess, live_server, with_chat_template

from fastdecode import LLM, SamplingParams

PROMPT = "def f(x):"
HI = [{"role": "user", "content": "import os"}]


@pytest.fixture(scope="module")
def chat_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_chat_template(demo_model, tmp_path_factory.mktemp("chat") / "")


@pytest.fixture(scope="module")
def server(chat_model: Path) -> Iterator[ServerProcess]:
    with ServerProcess(chat_model, "--served-model-name", "demo", "other", "--num-r-workers", 2) as server:
        yield server.ready()
        assert "Traceback" not in server.said
        server.process.terminate()
        assert server.ended() == 0 and "Traceback" not in server.said, server.said


@pytest.fixture(scope="module")
def offline(chat_model: Path) -> Iterator[LLM]:
    with LLM(chat_model, num_r_workers=2) as llm:
        yield llm


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openais_client(client: openai.OpenAI, offline: LLM) -> None:
    assert [model.id for model in client.models.list()] == ["demo", "other"]
    assert client.models.retrieve("other").model_dump()["max_model_len"] == offline.max_model_len
    (whole,) = offline.generate([PROMPT], SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    completion = client.completions.create(model="demo", prompt=PROMPT, max_tokens=20)
    assert completion.choices[0].text == whole.outputs[0].text and completion.choices[0].finish_reason == "length"
    assert completion.usage and completion.usage.prompt_tokens == len(whole.prompt_token_ids)
    (whole,) = offline.chat(HI, SamplingParams(temperature=0, max_tokens=20, logprobs=3), use_tqdm=False)  # type: ignore[arg-type]
    chat = client.chat.completions.create(
        model="demo", messages=HI, max_completion_tokens=20, logprobs=True, top_logprobs=3  # type: ignore[arg-type]
    )  # fmt: skip
    assert chat.choices[0].message.content == whole.outputs[0].text and chat.choices[0].message.role == "assistant"
    assert chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert len(chat.choices[0].logprobs.content) == 20
    streamed = client.chat.completions.create(
        model="demo", messages=HI, max_tokens=20, stream=True, stream_options={"include_usage": True}  # type: ignore[arg-type]
    )  # fmt: skip
    *chunks, last = list(streamed)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.outputs[0].text
    assert last.usage and last.usage.completion_tokens == 20 and not last.choices


def test_64_at_once_are_what_they_are_offline(server: ServerProcess, offline: LLM) -> None:
    """Of all kinds: streamed and whole, texts and tokens, greedy and drawn, with stops, penalties, several samples."""
    bodies: list[dict[str, Any]] = []
    for i in range(64):
        body: dict[str, Any] = {"model": "demo", "max_tokens": 5 + i % 40, "seed": i, "temperature": (i % 3) * 0.5}
        body["prompt"] = [[5 + i, 9, 11], PROMPT, "class A" + "b" * i][i % 3]
        body["n"] = 2 if i % 3 and i % 5 == 0 else 1
        body |= [{}, {"stop": ["\n", "se"]}, {"frequency_penalty": 0.7}, {"top_p": 0.8, "logprobs": 2}][i % 4]
        bodies.append(body)

    async def ask(client: openai.AsyncOpenAI, i: int) -> list[str]:
        if i % 2:
            return [choice.text for choice in (await client.completions.create(**bodies[i])).choices]
        texts = [""] * bodies[i]["n"]
        async for chunk in await client.completions.create(**bodies[i], stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        return texts

    async def run() -> list[list[str]]:
        async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(64)))

    got = asyncio.run(run())
    params = [SamplingParams(**{k: v for k, v in body.items() if k not in ("model", "prompt")}) for body in bodies]
    outputs = offline.generate([body["prompt"] for body in bodies], params, use_tqdm=False)
    assert got == [[completion.text for completion in output.outputs] for output in outputs]
    assert any(output.outputs[0].finish_reason == "stop" for output in outputs)


def transcript(server: ServerProcess, path: str, **body: Any) -> list[Any]:
    """The events of a streamed answer; the last must be [DONE]."""
    with httpx.stream("POST", server.url + path, json={**body, "stream": True}, timeout=60) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        text = answer.read().decode()
    assert text.endswith("\n\n")
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_chat_transcript(server: ServerProcess, offline: LLM) -> None:
    options = {"include_usage": True}
    events = transcript(
        server, "/v1/chat/completions", messages=HI, max_tokens=3, logprobs=True, top_logprobs=2, stream_options=options
    )
    (whole,) = offline.chat(HI, SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)  # type: ignore[arg-type]
    heads = [{name: event[name] for name in ("id", "object", "created", "model")} for event in events]
    assert heads == [heads[0]] * 6 and heads[0]["object"] == "chat.completion.chunk" and heads[0]["model"] == "demo"
    first, *middle, end, usage = events
    no_end = {"logprobs": None, "stop_reason": None}
    assert set(first) == {"id", "object", "created", "model", "choices", "usage"} and first["usage"] is None
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, **no_end, "finish_reason": None}
    ]
    assert "".join(event["choices"][0]["delta"]["content"] for event in middle) == whole.outputs[0].text
    for event in middle:
        (choice,) = event["choices"]
        (token,) = choice["logprobs"]["content"]
        assert choice["finish_reason"] is None and set(choice["delta"]) == {"content"} and event["usage"] is None
        assert len(token["top_logprobs"]) == 2 and token["top_logprobs"][0]["token"] == token["token"]
    assert end["choices"] == [
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    ]
    assert usage["choices"] == []
    tokens = len(whole.prompt_token_ids)
    assert usage["usage"] == {
        "prompt_tokens": tokens,
        "completion_tokens": 3,
        "total_tokens": tokens + 3,
        "prompt_tokens_details": {"cached_tokens": 0},  # it is shorter than what is worth a fork
    }


def test_text_transcript_of_several_prompts_and_samples(server: ServerProcess) -> None:
    """Choices are numbered prompt * n + sample, and each is what it is in the answer that comes whole."""
    body = {
        "prompt": [PROMPT, "import"],
        "n": 2,
        "temperature": 1.0,
        "seed": 3,
        "max_tokens": 12,
        "logprobs": 1,
        "stop": "e",
    }
    whole = httpx.post(server.url + "/v1/completions", json=body, timeout=60).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3] and whole["object"] == "text_completion"
    events = transcript(server, "/v1/completions", **body)
    assert {event["object"] for event in events} == {"text_completion"} and not any(
        "usage" in event for event in events
    )
    for choice in whole["choices"]:
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        assert [part["finish_reason"] for part in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
        assert own[-1]["stop_reason"] == choice["stop_reason"]
        for name, values in choice["logprobs"].items():
            assert [value for part in own if part["logprobs"] for value in part["logprobs"][name]] == values
    tokens = [[5, 6], [7]]
    assert len(httpx.post(server.url + "/v1/completions", json={"prompt": tokens}, timeout=60).json()["choices"]) == 2


def test_greedy_choices_are_all_the_same(server: ServerProcess) -> None:
    """A model that is greedy by itself, too: then n alone asks for them."""
    one = httpx.post(server.url + TEXT, json={"prompt": PROMPT, "temperature": 0}, timeout=60).json()["choices"]
    for body in ({"prompt": PROMPT, "n": 3}, {"prompt": PROMPT, "n": 3, "temperature": 0}):
        choices = httpx.post(server.url + TEXT, json=body, timeout=60).json()["choices"]
        assert [choice["index"] for choice in choices] == [0, 1, 2]
        assert [choice["text"] for choice in choices] == [one[0]["text"]] * 3
        streamed = [event["choices"][0] for event in transcript(server, TEXT, **body)]
        texts = ["".join(part["text"] for part in streamed if part["index"] == index) for index in range(3)]
        assert texts == [one[0]["text"]] * 3


TEXT, CHAT = "/v1/completions", "/v1/chat/completions"


def check_error(answer: httpx.Response, status: int, code: str, param: str | None, text: str) -> None:
    assert answer.status_code == status and answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    numbers = {name: error.pop(name) for name in ("n_prompt_tokens", "n_ctx") if name in error}
    assert bool(numbers) == (code == "context_length_exceeded") and all(type(n) is int for n in numbers.values())
    assert set(error) == {"message", "type", "param", "code"} and isinstance(error["type"], str)
    assert (error["code"], error["param"]) == (code, param) and text in error["message"]


@pytest.mark.parametrize(
    "method, path, body, status, code, param, text",
    [
        ("GET", "/nope", None, 404, "not_found", None, "GET /nope"),
        ("GET", "/v1/models/", None, 404, "model_not_found", "model", "'' is not"),
        ("GET", "/v1/models/gpt", None, 404, "model_not_found", "model", "'demo' or 'other'"),
        ("GET", TEXT, None, 405, "method_not_allowed", None, "Method Not Allowed"),
        ("POST", "/health", {}, 405, "method_not_allowed", None, "Method Not Allowed"),
        ("POST", TEXT, {"prompt": "x", "model": "gpt"}, 404, "model_not_found", "model", "is not served"),
        ("POST", TEXT, {"prompt": [5] * 1024}, 400, "context_length_exceeded", "prompt", "1024 tokens; with one"),
        ("POST", TEXT, {"prompt": "x" * 9000}, 400, "context_length_exceeded", "prompt", "max_model_len = 1024"),
        ("POST", TEXT, {"prompt": "x" * 10**6}, 400, "context_length_exceeded", "prompt", "1000000 characters, at"),
        (
            "POST",
            CHAT,
            {"messages": [{"role": "user", "content": "x" * 10**6}]},
            400,
            "context_length_exceeded",
            "messages",
            "characters, at least",
        ),
        ("POST", TEXT, {"prompt": [9999] * 10**6}, 400, "context_length_exceeded", "prompt", "1000000 tokens"),
        ("POST", TEXT, {"prompt": [4096]}, 400, "invalid_request", "prompt", "from 0 to 4095"),
        ("POST", TEXT, [1], 400, "invalid_request", None, "JSON object"),
    ],
)
def test_errors(
    method: str, path: str, body: Any, status: int, code: str, param: str | None, text: str, server: ServerProcess
) -> None:
    check_error(httpx.request(method, server.url + path, json=body), status, code, param, text)
    if method == "POST" and isinstance(body, dict):
        check_error(httpx.post(server.url + path, json={**body, "stream": True}), status, code, param, text)


@pytest.mark.parametrize(
    "path, body, param, text",
    [
        (TEXT, {}, "prompt", "is required"),
        (TEXT, {"prompt": ""}, "prompt", "the prompt is empty"),
        (TEXT, {"prompt": ["x", ""]}, "prompt[1]", "prompt[1]: the prompt is empty"),
        (TEXT, {"prompt": [[5], [5], [-1]]}, "prompt[2]", "token id -1"),
        (TEXT, {"prompt": []}, "prompt", "a list of texts"),
        (TEXT, {"prompt": ["x", 5]}, "prompt", "a list of texts"),
        (TEXT, {"prompt": {"a": 1}}, "prompt", "Expected"),
        (TEXT, {"prompt": "x", "n": "2"}, "n", "Expected `int"),
        (TEXT, {"prompt": "x", "n": 10**6}, "n", "from 1 to 1024"),
        (TEXT, {"prompt": "x", "seed": 2**70}, "seed", ""),
        (TEXT, {"prompt": "x", "logprobs": 10**6}, "logprobs", "to 1000"),
        (TEXT, {"prompt": "x", "max_tokens": 0}, "max_tokens", "from 1"),
        (TEXT, {"prompt": "x", "min_tokens": 20}, "min_tokens", "at most max_tokens"),
        (TEXT, {"prompt": "x", "stop": ["x"] * 1000}, "stop", "at most 256"),
        (TEXT, {"prompt": "x", "priority": 2**40}, "priority", "lower goes first"),
        (TEXT, {"prompt": "x", "stream_options": {}}, "stream_options", "needs stream"),
        (CHAT, {"messages": HI, "echo": True}, "echo", "not supported"),
        (TEXT, {"prompt": "x", "suffix": "y"}, "suffix", "not supported"),
        (TEXT, {"prompt": "x", "best_of": 2}, "best_of", "not supported"),
        (TEXT, {"prompt": "x", "logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100, got 101"),
        (TEXT, {"prompt": "x", "logit_bias": {"99999": 1}}, "logit_bias", "token id 99999 is not in the vocabulary"),
        (TEXT, {"prompt": "x", "allowed_token_ids": [99999]}, "allowed_token_ids", "99999 is not in the vocabulary"),
        (TEXT, {"prompt": "x", "use_beam_search": True}, "use_beam_search", "not supported"),
        (CHAT, {"messages": HI, "tools": [{}]}, "tools", "not supported"),
        (CHAT, {"messages": HI, "response_format": {"type": "json_object"}}, "response_format", "not supported"),
        (CHAT, {"messages": HI, "chat_template": "{{ x }}"}, "chat_template", "not supported"),
        (CHAT, {"messages": HI, "stream": True, "stream_options": {"x": 1}}, "stream_options.x", "not supported"),
        (CHAT, {"messages": []}, "messages", "at least one"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
            "'text' only",
        ),
        ("/tokenize", {}, "prompt", "either"),
        ("/tokenize", {"messages": [{}]}, "messages[0].role", "is required"),
        ("/detokenize", {"tokens": [-1]}, "tokens", "0 to 4095"),
        ("/detokenize", {"tokens": [2**80]}, "tokens", "0 to 4095"),
    ],
)
def test_wrong_fields_are_named(path: str, body: Any, param: str | None, text: str, server: ServerProcess) -> None:
    check_error(httpx.post(server.url + path, json=body), 400, "invalid_request", param, text)


@pytest.mark.parametrize(
    "bad", ["", [4096], "x" * 9000, [5] * 2000, "x" * 10**6], ids=["", "id", "text", "ids", "long"]
)
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_bad_prompt_in_a_list_is_told_before_anything_is_computed(
    bad: Any, is_streamed: bool, server: ServerProcess
) -> None:
    good = "Hello" if isinstance(bad, str) else [5]
    before = _counted(server)
    body = {"prompt": [good, good, bad, good], "max_tokens": 200, "ignore_eos": True, "stream": is_streamed}
    answer = httpx.post(server.url + TEXT, json=body, timeout=60)
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == "prompt[2]" and error["message"].startswith("prompt[2]: ")
    assert _counted(server) == before


def test_usage_with_every_chunk(server: ServerProcess) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"messages": HI, "max_tokens": 5, "ignore_eos": True, "stream_options": options}
    *events, last = transcript(server, CHAT, **body)
    told = [event["usage"]["completion_tokens"] for event in events]
    assert told == sorted(told) and told[-1] == 5 == last["usage"]["completion_tokens"] and set(told) >= {1, 2, 3, 4}
    assert {event["usage"]["prompt_tokens"] for event in events} == {last["usage"]["prompt_tokens"]}
    assert {event["usage"]["total_tokens"] - event["usage"]["completion_tokens"] for event in events} == {
        last["usage"]["prompt_tokens"]
    }


def test_messages_as_the_template_writes_them(server: ServerProcess) -> None:
    """llama.cpp's /apply-template; what a template is told, and a conversation with a call of a tool in it."""

    def post(**body: Any) -> httpx.Response:
        return httpx.post(server.url + "/apply-template", json=body)

    assert post(messages=HI).json() == {"prompt": "user: import os\n#"}
    assert post(messages=HI, add_generation_prompt=False, max_tokens=5).json() == {"prompt": "user: import os\n"}
    begun: list[Any] = [*HI, {"role": "assistant", "content": "Yes"}]
    assert post(messages=begun, continue_final_message=True).json() == {"prompt": "user: import os\nassistant: Yes"}
    assert post(messages=[{"role": "developer", "content": "x"}]).json() == {"prompt": "system: x\n#"}
    check_error(post(messages=[]), 400, "invalid_request", "messages", "at least one")
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    replayed = [*HI, {"role": "assistant", "content": None, "tool_calls": [call]}]
    replayed.append({"role": "tool", "tool_call_id": "c", "content": "5"})
    assert post(messages=replayed).json() == {"prompt": "user: import os\nassistant: \ntool: 5\n#"}
    body = {"messages": replayed, "max_tokens": 2, "chat_template_kwargs": {"enable_thinking": False}}
    assert httpx.post(server.url + CHAT, json=body, timeout=60).status_code == 200


def test_defaults_written_out_are_no_error(server: ServerProcess) -> None:
    body = {
        "prompt": "x", "echo": False, "best_of": 1, "logit_bias": {}, "suffix": None, "use_beam_search": False,
        "stream": False, "user": "me", "priority": 5, "max_tokens": 1,
    }  # fmt: skip
    assert httpx.post(server.url + "/v1/completions", json=body).status_code == 200


def test_the_description_forbids_nothing_that_is_taken(server: ServerProcess) -> None:
    """And has the bounds of what is."""
    schemas = httpx.get(server.url + "/openapi.json").json()["components"]["schemas"]
    taken = {"suffix": "", "best_of": 1, "bad_words": [], "length_penalty": 1.0, "detokenize": True, "max_tokens": -1}
    for name, value in (taken | {"n": 3, "temperature": 0.5, "prompt": "x", "verbosity": "low"}).items():
        for kind in ("CompletionBody", "ChatBody"):
            schema = schemas[kind]["properties"].get(name)
            assert schema is None or jsonschema_rs.is_valid({**schema, "components": {"schemas": schemas}}, value), name
    for name, value in {"n": 0, "temperature": 101, "top_p": 0, "top_k": -2, "suffix": "x", "echo": 1}.items():
        schema = schemas["CompletionBody"]["properties"][name]
        assert not jsonschema_rs.is_valid(schema, value), name


def test_a_chat_template_of_its_own(demo_model: Path, offline: LLM) -> None:
    """Of the server, that is; a request cannot bring one."""
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    params = SamplingParams(temperature=0, max_tokens=9)
    (whole,) = offline.chat(HI, params, chat_template=template, use_tqdm=False)  # type: ignore[arg-type]

    async def run() -> None:
        async with live_server(demo_model, chat_template=template) as live:
            answer = await live.post({"messages": HI, "max_tokens": 9}, CHAT)
            assert answer.json()["choices"][0]["message"]["content"] == whole.outputs[0].text
            assert (await live.post({"messages": HI}, "/tokenize")).json()["tokens"] == whole.prompt_token_ids
        async with live_server(demo_model) as live:
            check_error(
                await live.post({"messages": HI}, CHAT), 400, "invalid_request", "messages", "has no chat template"
            )

    asyncio.run(run())


def test_tokens_and_texts(server: ServerProcess, offline: LLM) -> None:
    def post(path: str, **body: Any) -> Any:
        return httpx.post(server.url + path, json=body).json()

    (whole,) = offline.generate([PROMPT], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    made = post("/tokenize", prompt=PROMPT, model="other", return_token_strs=True)
    assert made == {
        "count": len(whole.prompt_token_ids), "max_model_len": offline.max_model_len,
        "tokens": whole.prompt_token_ids, "token_strs": ["def", " f", "(", "x", "):"],
    }  # fmt: skip
    assert post("/detokenize", tokens=made["tokens"]) == {"prompt": PROMPT}
    (whole,) = offline.chat(HI, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)  # type: ignore[arg-type]
    assert post("/tokenize", messages=HI)["tokens"] == whole.prompt_token_ids
    assert len(post("/tokenize", messages=HI, add_generation_prompt=False)["tokens"]) < len(whole.prompt_token_ids)
    assert post("/tokenize", prompt="")["tokens"] == []
    assert httpx.get(server.url + "/version").json()["version"].count(".") == 2


def test_fuzzed_by_its_own_description(server: ServerProcess) -> None:
    """What /openapi.json describes, and what it does not: never a 500, and errors only in the envelope."""
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    seen: Counter[tuple[str, int]] = Counter()
    right_ones: dict[str, Any] = {"messages": HI, "prompt": PROMPT, "tokens": [5]}

    def call(case: schemathesis.Case) -> None:
        """And again without the field that is told to be wrong, or with a right one: so the rest is looked at, too."""
        body = case.body
        if case.path in (TEXT, CHAT) and isinstance(body, dict):
            for name, most in (("max_tokens", 3), ("max_completion_tokens", 3), ("n", 2)):  # so that it takes no hours
                value = body.get(name)
                body[name] = min(value, most) if type(value) is int else most if value is None else value
            if case.path == TEXT:
                del body["max_completion_tokens"]
        while True:
            answer = case.call(timeout=60)
            seen[case.path, answer.status_code] += 1
            assert answer.status_code < 500
            if answer.status_code < 400:
                return
            error = answer.json()["error"]
            assert {"message", "type", "param", "code"} <= set(error)
            param = error["param"] and re.split(r"[.\[]", error["param"])[0]  # the field with the place that is wrong
            if not isinstance(body, dict) or param not in body or body[param] == right_ones.get(param):
                return
            del body[param]
            body |= {param: right_ones[param]} if param in right_ones else {}

    for result in schema.get_all_operations():
        modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
        right, wrong = (result.ok().as_strategy(generation_mode=mode) for mode in modes)
        bounded = settings(max_examples=40, database=None, derandomize=True, phases=[Phase.generate])
        bounded(given(case=right | wrong)(lambda case: call(case)))()
    assert seen.total() > 150
    for path in (TEXT, CHAT, "/tokenize", "/detokenize"):
        assert seen[path, 200] and seen[path, 400], dict(seen)
    assert httpx.get(server.url + "/health").json() == {"status": "ok", "lost_r_workers": []}


@pytest.mark.parametrize(
    "path", ["/health", "/ping", "/version", "/v1/models", "/v1/models/demo", "/metrics", "/dashboard", "/openapi.json"]
)
def test_head_is_get_without_a_body(path: str, server: ServerProcess) -> None:
    """On one connection with what comes after it, which a body would disturb."""
    with httpx.Client(base_url=server.url) as client:
        head, get = client.head(path), client.get(path)
        assert (head.status_code, get.status_code) == (200, 200) and head.content == b"" != get.content
        assert head.headers["content-type"] == get.headers["content-type"]
        assert path == "/metrics" or head.headers["content-length"] == get.headers["content-length"]
        assert client.head("/nope").status_code == 404 and client.head(TEXT).status_code == 405


def test_metrics_and_dashboard(server: ServerProcess) -> None:
    """Behind the same door as the rest: what was generated is counted, and the page has its data."""
    asked = {"prompt": "Once", "max_tokens": 5, "ignore_eos": True}
    before = _counted(server)
    httpx.post(server.url + "/v1/completions", json=asked, timeout=60).raise_for_status()
    assert _counted(server) >= before + 5
    page = httpx.get(server.url + "/dashboard")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    told = httpx.get(server.url + "/dashboard/data").json()
    assert told["state"] == "ready" and sum(told["capacity"]) > 0


def _counted(server: ServerProcess) -> float:
    answer = httpx.get(server.url + "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    [family] = [f for f in text_string_to_metric_families(answer.text) if f.name == "vllm:generation_tokens"]
    return float(family.samples[0].value)
