"""Streamed, whole or cut: one text, which is what the tokenizer's own `decode` adds to the prompt."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdecode.text.tokenizer import Tokenizer
from tokenizer_kinds import CORPUS, KINDS, SLOW, make_tokenizer

ALL = [*KINDS, SLOW]
HAVE_PIECES = ["byte_level", "llama", "mistral", "gemma", "unigram", "word_piece", "words"]
UNDECODABLE = "\ufffd"


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """kind -> one of it; under "KIND in a window" the same, read as if its tokens had no pieces."""
    made = {}
    for kind in ALL:
        directory = make_tokenizer(kind, tmp_path_factory.mktemp(kind))
        made[kind] = Tokenizer(directory)
        if kind in HAVE_PIECES:
            made[f"{kind} in a window"] = other = Tokenizer(directory)
            other._vocabulary = None
    return made


def test_kinds_with_pieces(tokenizers: dict[str, Tokenizer]) -> None:
    """None falls back to a window without being seen to."""
    assert [kind for kind in ALL if tokenizers[kind]._vocabulary] == HAVE_PIECES


WORDS = st.sampled_from([*" ".join(CORPUS).split(), *" .,?!'", "n't", " 's", " ' ", "  ", "\n", " n", " 've"])
CHARACTERS = st.characters(codec="utf-8", exclude_characters="\u2581\ufffd")
OTHERS = st.sampled_from("\U0001f600\U0001f469\u200d\U0001f680\u0e01\u0e33\u4e2d\u3042a\u0301\u00e9\x00\x07\t\u2028")
TEXTS = st.lists(st.one_of(WORDS, CHARACTERS, OTHERS), min_size=1, max_size=25).map("".join)


def at_once(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool) -> str:
    text = tokenizer.output_text(prompt, None, skip_special_tokens=skip)
    text.push_all(output)
    text.finish()
    return text.whole(text.num_characters)


def in_parts(tokenizer: Tokenizer, prompt: list[int], output: list[int], skip: bool) -> list[str]:
    stream = tokenizer._stream(prompt, skip)
    return [*(stream.push([token]) for token in output), stream.flush()]


def split(ids: list[int], place: float) -> tuple[list[int], list[int]]:
    return ids[: int(place * len(ids))], ids[int(place * len(ids)) :]


def told_before(tokenizer: Tokenizer, prompt: list[int], after: str, skip: bool, is_byte_level: bool) -> str:
    """The prompt's text, without a character that the output completes.

    With ByteFallback a character's first bytes are tokens, and spoil the bytes before them; byte-level tokens may end
    inside a character and begin with others.
    """
    text = tokenizer.decode(prompt, skip_special_tokens=skip)
    if is_byte_level:
        return text if after.startswith(text) else text.rstrip(UNDECODABLE)
    for num_left_out in range(4):
        text = tokenizer.decode(prompt[: len(prompt) - num_left_out], skip_special_tokens=skip)
        if after.startswith(text) or not text.endswith(UNDECODABLE):
            break
    return text


@pytest.mark.parametrize("kind", ALL + [f"{kind} in a window" for kind in HAVE_PIECES])
@settings(max_examples=50)
@given(text=TEXTS, place=st.floats(0, 1), skip=st.booleans())
def test_a_text_in_two(kind: str, text: str, place: float, skip: bool, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    prompt, output = split(ids, place)
    whole = at_once(tokenizer, prompt, output, skip)
    assert "".join(in_parts(tokenizer, prompt, output, skip)) == whole
    after = tokenizer.decode(ids, skip_special_tokens=skip)
    before = told_before(tokenizer, prompt, after, skip, "byte_level" in kind)
    if after.startswith(before):
        assert before + whole == after


@pytest.mark.parametrize("kind", ALL)
@settings(max_examples=50)
@given(data=st.data(), place=st.floats(0, 1), skip=st.booleans())
def test_tokens_at_random(
    kind: str, data: st.DataObject, place: float, skip: bool, tokenizers: dict[str, Tokenizer]
) -> None:
    """Bytes that are no text, special tokens, ids that no token has: all told alike, and as `decode` says it."""
    tokenizer = tokenizers[kind]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer._tokenizer) + 1), min_size=1, max_size=30))
    prompt, output = split(ids, place)
    whole = at_once(tokenizer, prompt, output, skip)
    assert "".join(in_parts(tokenizer, prompt, output, skip)) == whole
    before, after = (tokenizer.decode(part, skip_special_tokens=skip) for part in (prompt, ids))
    if after.startswith(before) and not (before.endswith(UNDECODABLE) or after.count(UNDECODABLE) > 1):
        assert before + whole == after


@pytest.mark.parametrize("kind", HAVE_PIECES)
@settings(max_examples=50)
@given(data=st.data(), place=st.floats(0, 1))
def test_pieces_say_the_text(kind: str, data: st.DataObject, place: float, tokenizers: dict[str, Tokenizer]) -> None:
    """The bytes beside log-probabilities, one token's after the other, are the answer's."""
    tokenizer = tokenizers[kind]
    size = len(tokenizer._tokenizer)
    prompt = [tokenizer.encode("the", add_special_tokens=False)[0]]
    output = data.draw(st.lists(st.integers(0, size - 1), max_size=20))
    said = b"".join(tokenizer.piece(token).data for token in output)
    stream = tokenizer._stream(prompt, False)
    text = tokenizer._clean_up(said.decode(errors="replace")) if tokenizer._clean_up else said.decode(errors="replace")
    if UNDECODABLE not in text:
        assert stream.push(output) + stream.flush() == text


@pytest.mark.parametrize("kind", ["byte_level", "llama", "byte_level in a window", "llama in a window", SLOW])
@pytest.mark.parametrize("what", [b"\x80", b"\xf0\x9f\x98\x80", b"\xf0\x9f\x98", b"a", b" \n"])
def test_no_run_holds_a_stream_up(
    kind: str, what: bytes, tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Undecodable bytes, too, are told after a few tokens, and no step looks at more than a few."""
    tokenizer = tokenizers[kind]
    output = [token_of_byte(tokenizers, kind, byte) for byte in what] * 200
    lengths = [0]

    def watched(token_ids: list[int], **options: bool) -> str:
        lengths.append(len(token_ids))
        return Tokenizer._decode_plain(tokenizer, token_ids, **options)

    monkeypatch.setattr(tokenizer, "_decode_plain", watched)
    told = in_parts(tokenizer, output[:50], output, True)
    assert max(lengths) <= 100
    assert kind == SLOW or all("".join(told[i : i + 12]) for i in range(len(told) - 12)), (
        "it leaves out what is no text"
    )
    assert "".join(told) == at_once(tokenizer, output[:50], output, True)


def token_of_byte(tokenizers: dict[str, Tokenizer], kind: str, byte: int) -> int:
    if kind == SLOW:
        return byte + 3
    tokenizer = tokenizers[kind.removesuffix(" in a window")]
    return next(i for i in range(len(tokenizer._tokenizer)) if tokenizer.piece(i).data == bytes([byte]))
