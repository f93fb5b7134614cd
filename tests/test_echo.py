"""The prompt in the answer: its text and tokens before what is generated, over HTTP, streamed, and in batch files."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from conftest import quiet
from serving import live_server, with_chat_template
from test_batch import run, write

from fastdecode import LLM, SamplingParams
from fastdecode.api.outputs import RequestOutput
from fastdecode.errors import RequestError
from fastdecode.openai_api import make_echo, read_request
from fastdecode.text.tokenizer import Tokenizer
from tokenizer_kinds import KINDS, SLOW, make_tokenizer

TEXT = "def f(x):\n    return"
CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "import os"}]


@pytest.fixture(scope="module")
def model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_chat_template(demo_model, tmp_path_factory.mktemp("chat") / "")


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model) as llm:
        yield llm


@pytest.fixture(scope="module")
def whole(llm: LLM) -> RequestOutput:
    """What the Python API says of TEXT."""
    (output,) = quiet(llm, TEXT, SamplingParams(temperature=0, max_tokens=5, logprobs=2, prompt_logprobs=2))
    return output


def serve(model: Path, *bodies: dict[str, Any], path: str = "/v1/completions") -> list[Any]:
    """Answers, parsed if they are JSON."""

    async def ask() -> list[Any]:
        async with live_server(model) as live:
            answers = [await live.post({"model": "demo", "temperature": 0, **body}, path) for body in bodies]
            await live.idle()
        is_event = [answer.headers["content-type"].startswith("text/event") for answer in answers]
        return [answer.text if event else answer.json() for answer, event in zip(answers, is_event, strict=True)]

    return asyncio.run(ask())


def check_prompt(choice: dict[str, Any], whole: RequestOutput, num_logprobs: int = 2) -> None:
    """Of TEXT: each token's name stands at its place, and has the number that the Python API gives."""
    told, prompt = choice["logprobs"], whole.prompt_token_ids
    assert whole.prompt_logprobs is not None
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None and told["text_offset"][0] == 0
    assert choice["text"].startswith(TEXT)
    assert "".join(told["tokens"][: len(prompt)]) == TEXT
    for place, (token_id, entries) in enumerate(zip(prompt, whole.prompt_logprobs, strict=True)):
        begin, name = told["text_offset"][place], told["tokens"][place]
        assert choice["text"][begin : begin + len(name)] == name
        if entries is not None:
            assert told["token_logprobs"][place] == pytest.approx(entries[token_id].logprob, abs=1e-5)
            expected = {e.decoded_token for i, e in entries.items() if i == token_id or e.rank <= num_logprobs}
            assert told["top_logprobs"][place].keys() == expected


def test_echo(model: Path, whole: RequestOutput) -> None:
    generated = whole.outputs[0]
    ids = {"prompt": [whole.prompt_token_ids, whole.prompt_token_ids[:3]]}
    both, plain, scores, listed, nothing = serve(
        model,
        {"prompt": TEXT, "echo": True, "logprobs": 2, "max_tokens": 5, "n": 2},
        {"prompt": TEXT, "echo": True, "max_tokens": 5},
        {"prompt": TEXT, "echo": True, "logprobs": 2, "max_tokens": 0},
        {**ids, "echo": True, "logprobs": 1, "max_tokens": 1},
        {"prompt": TEXT, "echo": True, "max_tokens": 0},
    )
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    for choice in both["choices"]:
        check_prompt(choice, whole)
        told, num_prompt = choice["logprobs"], len(whole.prompt_token_ids)
        assert choice["text"] == TEXT + generated.text == "".join(told["tokens"])
        assert all(len(values) == num_prompt + 5 for values in told.values())
        for begin, name in zip(told["text_offset"], told["tokens"], strict=True):
            assert choice["text"][begin : begin + len(name)] == name
    assert both["usage"].pop("prompt_tokens_details")["cached_tokens"] < num_prompt
    assert both["usage"] == {"prompt_tokens": num_prompt, "completion_tokens": 10, "total_tokens": num_prompt + 10}
    (choice,) = plain["choices"]
    assert choice["text"] == TEXT + generated.text and choice["logprobs"] is None
    (choice,) = scores["choices"]
    check_prompt(choice, whole)
    assert (
        choice["text"] == TEXT
        and choice["finish_reason"] == "length"
        and len(choice["logprobs"]["tokens"]) == num_prompt
    )
    assert scores["usage"]["completion_tokens"] == 0
    first, second = listed["choices"]
    check_prompt(first, whole, num_logprobs=1)
    assert first["text"].startswith(TEXT) and TEXT.startswith("".join(second["logprobs"]["tokens"][:3]))
    assert nothing["choices"][0]["text"] == TEXT and nothing["choices"][0]["finish_reason"] == "length"


def test_loglikelihoods_as_a_harness_reads_them(model: Path, llm: LLM) -> None:
    """lm_eval's `local-completions`: token ids, echo, one token more than it wants; greedy if all are the likeliest."""
    contexts, continuations = ["def f(", "import", "x = "], ["x):", " zebra", "1"]
    assert llm.tokenizer is not None
    encoded = [tuple(llm.tokenizer.encode(text) for text in pair) for pair in zip(contexts, continuations, strict=True)]
    prompts = [context + continuation for context, continuation in encoded]
    (answer,) = serve(model, {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "seed": 1234})
    outputs = quiet(llm, prompts, SamplingParams(max_tokens=0, prompt_logprobs=1))
    for choice, (context, continuation), output in zip(
        sorted(answer["choices"], key=itemgetter("index")), encoded, outputs, strict=True
    ):
        told = {name: values[len(context) : -1] for name, values in choice["logprobs"].items()}
        assert output.prompt_logprobs is not None
        own = [
            entries[token]
            for entries, token in zip(output.prompt_logprobs[len(context) :], continuation, strict=True)
            if entries
        ]
        assert sum(told["token_logprobs"]) == pytest.approx(sum(entry.logprob for entry in own), abs=1e-4)
        is_greedy = all(
            token == max(top.values()) for token, top in zip(told["token_logprobs"], told["top_logprobs"], strict=True)
        )
        assert is_greedy == all(entry.rank == 1 for entry in own)


def test_streamed(model: Path, whole: RequestOutput) -> None:
    """The prompt comes first, whole; what comes after it goes on with its places."""
    body = {"prompt": TEXT, "echo": True, "logprobs": 2, "n": 2, "stream": True}
    several, scores, plain, answer = serve(
        model,
        {**body, "max_tokens": 5},
        {**body, "max_tokens": 0},
        {"prompt": [TEXT, "import"], "echo": True, "max_tokens": 2, "stream": True},
        {**body, "max_tokens": 5, "stream": False},
    )
    for events, max_tokens in ((several, 5), (scores, 0)):
        for index in (0, 1):
            chunks = [choice for choice in _choices(events) if choice["index"] == index]
            assert chunks[0]["text"] == TEXT and chunks[0]["finish_reason"] is None
            told: dict[str, list[Any]] = {}
            for chunk in chunks:
                for name, values in (chunk["logprobs"] or {}).items():
                    told.setdefault(name, []).extend(values)
            text = "".join(chunk["text"] for chunk in chunks)
            check_prompt({"text": text, "logprobs": told}, whole)
            assert [chunk["finish_reason"] for chunk in chunks][-1] == "length"
            if max_tokens:
                (same,) = (choice for choice in answer["choices"] if choice["index"] == index)
                assert (text, told["tokens"], told["text_offset"]) == (
                    same["text"], same["logprobs"]["tokens"], same["logprobs"]["text_offset"],
                )  # fmt: skip
            else:
                assert text == TEXT
    firsts = {index: next(c["text"] for c in _choices(plain) if c["index"] == index) for index in (0, 1)}
    assert firsts == {0: TEXT, 1: "import"}


def _choices(events: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: {")]
    return [choice for line in lines for choice in json.loads(line)["choices"]]


def test_prompt_logprobs_beside_the_answer(model: Path, whole: RequestOutput) -> None:
    """As vLLM has them: in each choice of a completion, beside the choices of a chat."""
    alone, beside, none = serve(
        model,
        {"prompt": TEXT, "prompt_logprobs": 1, "max_tokens": 0},
        {"prompt": TEXT, "prompt_logprobs": 0, "echo": True, "logprobs": 2, "max_tokens": 1},
        {"prompt": TEXT, "max_tokens": 1},
    )
    for answer, num_logprobs in ((alone, 1), (beside, 0)):
        (choice,) = answer["choices"]
        told = choice["prompt_logprobs"]
        assert told[0] is None and len(told) == len(whole.prompt_token_ids) and whole.prompt_logprobs is not None
        for token_id, entries, given in zip(
            whole.prompt_token_ids[1:], whole.prompt_logprobs[1:], told[1:], strict=True
        ):
            assert entries is not None
            kept = {i: e for i, e in entries.items() if i == token_id or e.rank <= num_logprobs}
            assert given == {
                str(i): {
                    "logprob": pytest.approx(e.logprob, abs=1e-5),
                    "rank": e.rank,
                    "decoded_token": e.decoded_token,
                }
                for i, e in kept.items()
            }
    assert alone["choices"][0]["text"] == "" and "prompt_logprobs" not in none["choices"][0]
    check_prompt(beside["choices"][0], whole)
    (chat,) = serve(model, {"messages": HI, "prompt_logprobs": 2, "max_completion_tokens": 0}, path=CHAT)
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"] and chat["prompt_logprobs"][0] is None
    assert chat["choices"][0]["message"]["content"] == "" and "prompt_logprobs" not in chat["choices"][0]


def test_in_a_batch_file(llm: LLM, whole: RequestOutput, tmp_path: Path) -> None:
    def line(name: str, **body: Any) -> dict[str, Any]:
        return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"temperature": 0, **body}}

    source = write(tmp_path / "in.jsonl", [
        line("both", prompt=TEXT, echo=True, logprobs=2, max_tokens=5),
        line("scores", prompt=whole.prompt_token_ids, echo=True, logprobs=2, max_tokens=0),
        line("beside", prompt=TEXT, prompt_logprobs=2, max_tokens=0),
        line("nothing", prompt=TEXT, max_tokens=0),
    ])  # fmt: skip
    result = run(llm, source, tmp_path / "out.jsonl")
    assert (result.num_done, result.num_errors, result.num_new_tokens) == (4, 1, 5)
    records = [json.loads(record) for record in (tmp_path / "out.jsonl").read_text().splitlines()]
    bodies = {record["custom_id"]: record["response"]["body"] for record in records}
    for name in ("both", "scores"):
        check_prompt(bodies[name]["choices"][0], whole)
    assert bodies["both"]["choices"][0]["text"] == TEXT + whole.outputs[0].text
    assert len(bodies["beside"]["choices"][0]["prompt_logprobs"]) == len(whole.prompt_token_ids)
    assert "goes with echo or prompt_logprobs" in bodies["nothing"]["error"]["message"]


@pytest.mark.parametrize(
    "url, body, field, said",
    [
        (CHAT, {"messages": HI, "echo": True}, "echo", "not supported"),
        (CHAT, {"messages": HI, "max_completion_tokens": 0}, "max_completion_tokens", "from 1"),
        ("/v1/completions", {"prompt": "x", "max_tokens": 0}, "max_tokens", "goes with echo"),
        ("/v1/completions", {"prompt": "x", "echo": "yes"}, "echo", "bool"),
        ("/v1/completions", {"prompt": "x", "echo": True, "logprobs": 1001}, "logprobs", "0 to 1000"),
        ("/v1/completions", {"prompt": "x", "prompt_logprobs": -1}, "prompt_logprobs", "0 to 1000"),
        ("/v1/completions", {"prompt": "x", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "streamed"),
        (CHAT, {"messages": HI, "prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "streamed"),
    ],
)
def test_refused(url: str, body: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(RequestError, match=said) as refused:
        read_request(url, body, SamplingParams())
    assert refused.value.param == field


def test_what_asks_for_nothing() -> None:
    assert not read_request(CHAT, {"messages": HI, "echo": False}, SamplingParams()).is_echoed
    request = read_request("/v1/completions", {"prompt": "x", "echo": True}, SamplingParams())
    assert request.is_echoed and request.params.prompt_logprobs is None


@pytest.mark.parametrize("kind", [*KINDS, SLOW])
@pytest.mark.parametrize(
    "text", ["Once upon a time, he didn't know.", "\u4f60\u597d\u4e16\u754c caf\u00e9 \U0001f600 done", " the  cat "]
)
def test_what_is_shown_of_any_tokenizer(kind: str, text: str, tmp_path: Path) -> None:
    """A text as it was given; token ids as what they say, so that the whole is what prompt and output say together."""
    tokenizer = Tokenizer(make_tokenizer(kind, tmp_path))
    ids = tokenizer.encode(text)
    echo = make_echo(tokenizer, text, ids, skip_special_tokens=True, is_all=False)
    assert echo.text == text and len(echo.text_offsets) == len(ids)
    assert sorted(echo.text_offsets) == echo.text_offsets and all(0 <= o <= len(text) for o in echo.text_offsets)
    for end in range(1, len(ids) + 1):
        prompt, output = ids[:end], ids[end:]
        echo = make_echo(tokenizer, prompt, prompt, skip_special_tokens=True, is_all=not output)
        after = tokenizer.decode(ids, skip_special_tokens=True)
        if after.startswith(echo.text) or kind not in ("word_piece", "words"):  # their clean-up looks over the border
            more = tokenizer.output_text(prompt, None, skip_special_tokens=True)
            more.push_all(output)
            more.finish()
            assert echo.text + more.whole(more.num_characters) == after, (prompt, output)
