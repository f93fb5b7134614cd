"""What a model says, token by token, is told right: whole, streamed, cut at stop strings, beside log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from fastdecode import LLM, RequestOutput, SamplingParams
from fastdecode.api.outputs import Delta
from fastdecode.openai_api import ChunkWriter, completion_body
from fastdecode.text.tokenizer import Tokenizer
from models import SCRIPT_POSITIONS, make_scripted
from tokenizer_kinds import make_tokenizer

EURO, SMILE, THAI = "\u20ac".encode(), "\U0001f600".encode(), "\u0e2a\u0e27".encode()
BOS, EOS = 1, 2


@dataclass(frozen=True)
class Said:
    """prompt, output: parts that are each spelled by as few tokens as can be, or token ids; text: what is right, of any
    kind or by kind.
    """

    prompt: tuple[bytes | int, ...]
    output: tuple[bytes | int, ...]
    text: str | dict[str, str]
    params: dict[str, Any] = field(default_factory=dict)
    finish: str = "length"
    stop: int | str | None = None


CASES = {
    "a space stays": Said((b"x",), (b" Once", b" a"), " Once a"),
    "after emoji": Said((b"x", SMILE, SMILE), (b" a", b" time"), " a time"),
    "an emoji after emoji": Said((b"x", SMILE, SMILE), (SMILE, b" a"), "\U0001f600 a"),
    "the prompt ends inside a character": Said((b"x", EURO[:2]), (EURO[2:], b" a"), "\u20ac a"),
    "... that never ends": Said((b"x", EURO[:2]), (b" a",), " a"),
    "... nor another": Said((b"x", EURO[:2]), (SMILE[:1], b" a"), "\ufffd a"),
    "the output ends inside a character": Said((b"x",), (b" a", SMILE[:1]), " a\ufffd"),
    "... after a stop string that was none": Said(
        (b"x",), (b" a", b"b", SMILE[:1]), " ab\ufffd", {"stop": ["b\U0001f600", " abc"]}
    ),
    "bytes that are no text": Said((b"x",), (b"\xff", b"\x80", b" a"), "\ufffd\ufffd a"),
    "no character is held up": Said((b"x",), (SMILE * 3,), "\U0001f600" * 3),
    "special tokens left out": Said((b"x",), (b" a", BOS, b" time"), " a time"),
    "special tokens kept": Said((b"x",), (b" a", BOS, b" time"), " a<s> time", {"skip_special_tokens": False}),
    "nothing before it": Said((BOS,), (b" a", b" time"), {"byte_level": " a time", "llama": "a time"}),
    "only a kept special token before it": Said((BOS,), (b" a",), " a", {"skip_special_tokens": False}),
    "the end": Said((b"x",), (b" a", EOS), " a", {}, "stop"),
    "the end, kept out of a text with special tokens": Said(
        (b"x",), (b" a", EOS), " a", {"skip_special_tokens": False}, "stop"
    ),
    "the end, included": Said(
        (b"x",), (b" a", EOS), " a</s>",
        {"skip_special_tokens": False, "include_stop_str_in_output": True}, "stop",
    ),
    "an end inside a character": Said(
        (b"x",), (b" a", SMILE[:2], EOS), {"byte_level": " a\ufffd", "llama": " a\ufffd\ufffd"}, {}, "stop"
    ),
    "a stop string across tokens": Said((b"x",), (b" a", b"b", b"c"), " ", {"stop": ["zz", "abc"]}, "stop", "abc"),
    "... included": Said(
        (b"x",), (b" a", b"b", b"c"), " abc", {"stop": ["abc"], "include_stop_str_in_output": True}, "stop", "abc"
    ),
    "... across characters": Said((b"x",), (THAI, b" a"), "", {"stop": "\u0e2a\u0e27"}, "stop", "\u0e2a\u0e27"),
    "two in one token": Said((b"x",), (b"time",), "t", {"stop": ["time", "im"]}, "stop", "im"),
    "two in one token, included": Said(
        (b"x",), (b"time",), "tim", {"stop": ["time", "im"], "include_stop_str_in_output": True}, "stop", "im"
    ),
    "two that end at once": Said((b"x",), (b"time",), "t", {"stop": ["m", "im"]}, "stop", "im"),
    "a beginning that is none": Said((b"x",), (b" a", b"b", b"d", b"e"), " abde", {"stop": ["abc"]}),
    "a beginning at the end": Said((b"x",), (b" a", b"b"), " ab", {"stop": ["abc"]}),
    "a stop string with the last token": Said((b"x",), (b" a", b"b"), " ", {"stop": ["ab"]}, "stop", "ab"),
    "a stop string of the prompt's": Said((b"x a",), (b"b", b"c"), "bc", {"stop": ["ab", "xa"]}),
    "too early": Said((b"x",), (b" a", b"b", b"c", b"d"), " ab", {"stop": ["a", "cd"], "min_tokens": 3}, "stop", "cd"),
}  # fmt: skip
KINDS = ("byte_level", "llama")


class Speaker:
    """All cases in one model: each has a place in its script, and a prompt that is as long as that place is far."""

    def __init__(
        self, kind: str, llm: LLM, tokenizer: Tokenizer, cases: dict[str, tuple[list[int], list[int]]]
    ) -> None:
        self.kind, self.llm, self.tokenizer, self.cases = kind, llm, tokenizer, cases

    def params(self, name: str, **more: Any) -> SamplingParams:
        return SamplingParams(
            temperature=0, max_tokens=len(self.cases[name][1]), **{"ignore_eos": False, **CASES[name].params, **more}
        )

    def whole(self, name: str, **more: Any) -> RequestOutput:
        (output,) = self.llm.generate([self.cases[name][0]], self.params(name, **more), use_tqdm=False)
        assert output.error is None
        return output

    def streamed(self, name: str, **more: Any) -> tuple[list[Delta], RequestOutput]:
        engine, deltas, outputs = self.llm._engine, [], []
        engine.add_request(
            engine.next_request_id(), self.cases[name][0], self.params(name, **more), on_delta=deltas.append
        )
        while engine.has_work:
            outputs += engine.step()
        (output,) = outputs
        return deltas, output


def spell(tokenizer: Tokenizer, size: int, parts: tuple[bytes | int, ...]) -> list[int]:
    by_piece = {tokenizer.piece(i).data: i for i in range(size) if not tokenizer.piece(i).is_special}
    ids = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
            continue
        while part:
            length = max(length for length in range(1, len(part) + 1) if part[:length] in by_piece)
            ids.append(by_piece[part[:length]])
            part = part[length:]
    return ids


@pytest.fixture(scope="module", params=KINDS)
def speaker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Speaker]:
    kind = request.param
    directory = make_tokenizer(kind, tmp_path_factory.mktemp(kind))
    tokenizer = Tokenizer(directory)
    size = len(tokenizer._tokenizer)
    script: dict[int, int] = {}
    cases, place = {}, 8
    for name, said in CASES.items():
        prompt, output = (spell(tokenizer, size, parts) for parts in (said.prompt, said.output))
        begin = BOS if prompt == [BOS] else prompt[0]
        cases[name] = [begin] * (place - len(prompt)) + prompt, output
        script |= {place - 1 + i: token for i, token in enumerate(output)}
        place += len(output)
    assert place < SCRIPT_POSITIONS
    model = make_scripted(tmp_path_factory.mktemp("model"), directory, script, size + 3)
    with LLM(model) as llm:
        yield Speaker(kind, llm, tokenizer, cases)


@pytest.mark.parametrize("name", CASES)
def test_one_text(name: str, speaker: Speaker) -> None:
    said = CASES[name]
    right = said.text if isinstance(said.text, str) else said.text[speaker.kind]
    completion = speaker.whole(name).outputs[0]
    assert completion.token_ids == speaker.cases[name][1][: len(completion.token_ids)], "the script is spoken"
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (right, said.finish, said.stop)
    for more in ({}, {"logprobs": 1}):
        deltas, output = speaker.streamed(name, **more)
        assert output.outputs[0].text == "".join(delta.text for delta in deltas) == right
        assert [token for delta in deltas for token in delta.token_ids] == completion.token_ids


@pytest.mark.parametrize("name", CASES)
def test_tokens_stand_where_they_are_said_to(name: str, speaker: Speaker) -> None:
    """OpenAI's text_offset: of a token that is a text by itself, that is there; in chunks as in the whole."""
    output = speaker.whole(name, logprobs=2)
    completion = output.outputs[0]
    assert completion.logprobs and completion.text_offsets
    names = []
    for token, entries, offset in zip(completion.token_ids, completion.logprobs, completion.text_offsets, strict=True):
        said = entries[token].decoded_token or ""
        names.append(said)
        is_whole = (
            not said.startswith("bytes:") and entries[token].token_bytes and offset + len(said) <= len(completion.text)
        )
        if is_whole and not (offset == 0 and speaker.cases[name][0][-1] == BOS):
            assert completion.text[offset : offset + len(said)] == said
        assert (
            len(entries) == 2
            and entries[token].rank == 1
            and entries[token].logprob == max(e.logprob for e in entries.values())
        )
    assert completion.text_offsets == sorted(completion.text_offsets)
    assert completion.text_offsets[-1] <= len(completion.text)
    heading: dict[str, Any] = {"body_id": "c", "model": "m", "created": 1, "num_logprobs": 2}
    whole = completion_body([output], is_chat=False, **heading)["choices"][0]
    assert whole["logprobs"]["tokens"] == names
    assert all(len(entries) == 2 for entries in whole["logprobs"]["top_logprobs"])
    writer = ChunkWriter(is_chat=False, prompt_tokens=1, with_usage=False, **heading)
    told, parts = "", []
    for delta in speaker.streamed(name, logprobs=2)[0]:
        for chunk in writer.chunks(0, delta):
            (choice,) = chunk["choices"]
            told += choice["text"]
            if choice["logprobs"]:
                parts.append(choice["logprobs"])
                assert choice["logprobs"]["text_offset"][-1] <= len(told), "nothing is placed where a text may not come"
    assert told == whole["text"]
    for what, values in whole["logprobs"].items():
        assert [value for part in parts for value in part[what]] == values


@pytest.mark.parametrize(
    "name", [name for name, said in CASES.items() if said.finish == "length" and "never" not in name]
)
def test_bytes_of_an_answer(name: str, speaker: Speaker) -> None:
    output = speaker.whole(name, logprobs=1)
    body = completion_body([output], is_chat=True, body_id="c", model="m", created=1, num_logprobs=1)
    content = body["choices"][0]["logprobs"]["content"]
    said = b"".join(bytes(token["bytes"]) for token in content)
    prompt = [part for part in CASES[name].prompt if isinstance(part, bytes)]
    if prompt and prompt[-1] == EURO[:2]:
        said = EURO[:2] + said
    text = body["choices"][0]["message"]["content"]
    assert said.decode(errors="ignore").strip() == text.replace("\ufffd", "").strip()
