"""Tokens beside log-probabilities are named as OpenAI names them: with their spaces, each by itself, by its bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from fastdecode.api.outputs import Logprob
from fastdecode.api.sampling_params import SamplingParams
from fastdecode.engine.results import _named
from fastdecode.openai_api.responses import chat_logprobs, text_logprobs
from fastdecode.text.detokenize import TokenPiece
from fastdecode.text.tokenizer import Tokenizer
from gpu_sworker import TokenLogprob

SPACE = "\u2581"
FUSED = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]


def make(directory: Path, tokens: list[str], decoder: object, special: tuple[str, ...] = ("<unk>",)) -> Tokenizer:
    backend = Backend(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    if decoder:
        backend.decoder = decoder  # type: ignore[assignment]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(directory)
    return Tokenizer(directory)


@pytest.mark.parametrize(
    "decoder, tokens",
    [
        (decoders.ByteLevel(), {"\u0120of": b" of", "\u010a": b"\n", "\u00e2\u0124": b"\xe2\x82", "of": b"of"}),
        (decoders.ByteLevel(), {"\u4e2d": b"\xe4\xb8\xad", "  ": b"  "}),
        (decoders.Sequence([*FUSED, decoders.Strip(" ", 1, 0)]), {SPACE + "of": b" of", "<0xE2>": b"\xe2"}),
        (decoders.Sequence([*FUSED, decoders.Strip(" ", 1, 0)]), {"<0x0a>": b"\n", SPACE: b" "}),
        (decoders.Sequence(FUSED), {SPACE * 3: b"   ", "of": b"of", "<0xE2": b"<0xE2"}),
        (decoders.Metaspace(), {SPACE + "of": b" of", "of": b"of", "<0xE2>": b"<0xE2>"}),
        (decoders.WordPiece(), {"of": b" of", "##of": b"of", ".": b"."}),
        (None, {"of": b" of", "<unk>": b" <unk>"}),
        (decoders.BPEDecoder(), {"of": b"of"}),
    ],
)  # fmt: skip
def test_a_token_by_itself(decoder: object, tokens: dict[str, bytes], tmp_path: Path) -> None:
    tokenizer = make(tmp_path, ["<unk>", "x", *(token for token in tokens if token != "<unk>")], decoder)
    for token, data in tokens.items():
        token_id = tokenizer._tokenizer.convert_tokens_to_ids(token)
        assert tokenizer.piece(token_id) == TokenPiece(data, is_special=token == "<unk>")
    assert tokenizer.piece(10_000).data == b"", "a model may have more rows than there are tokens"


def test_what_is_no_text_is_named_by_its_bytes() -> None:
    assert TokenPiece(b" \xe2\x82").name == "bytes:\\x20\\xe2\\x82" and TokenPiece(b" \xe2\x82\xac").name == " \u20ac"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE + "Yes", "Yes", SPACE + "No", "No", "A"]
    decoder = decoders.Sequence([*FUSED, decoders.Strip(" ", 1, 0)])
    return make(tmp_path_factory.mktemp("names"), tokens, decoder)


SPACE_YES, YES, SPACE_NO, NO, LETTER_A = range(257, 262)
PARAMS = SamplingParams(logprobs=4)


def of(tokenizer: Tokenizer, *token_ids: int) -> dict[int, Logprob]:
    """The sampled one first; the log-probability of the n-th is -n."""
    entries = [TokenLogprob(token_id, -float(n), n + 1) for n, token_id in enumerate(token_ids)]
    return _named(entries, tokenizer, PARAMS)


def test_entries_keep_their_spaces_and_their_number(llama: Tokenizer) -> None:
    told = text_logprobs([SPACE_YES], [of(llama, SPACE_YES, SPACE_NO, NO, YES)], [0])
    assert told["tokens"] == [" Yes"] and told["token_logprobs"] == [0.0]
    assert told["top_logprobs"] == [{" Yes": 0.0, " No": -1.0, "No": -2.0, "Yes": -3.0}]


def test_entries_of_one_text_are_told_apart(llama: Tokenizer) -> None:
    """The sampled one keeps the name."""
    byte_a = 1 + ord("A")
    told = text_logprobs([byte_a], [of(llama, byte_a, LETTER_A, 1 + 0xE2, 1 + 0x82)], [0])
    assert told["tokens"] == ["A"]
    assert told["top_logprobs"] == [{"A": 0.0, "bytes:\\x41": -1.0, "bytes:\\xe2": -2.0, "bytes:\\x82": -3.0}]
    twice = {7: Logprob(-0.5, 1, "", b""), 8: Logprob(-1.0, 2, "", b""), 9: Logprob(-2.0, 3, "", b"")}
    assert list(text_logprobs([7], [twice], None)["top_logprobs"][0].values()) == [-0.5, -1.0, -2.0]


def test_bytes_of_a_characters_parts_join(llama: Tokenizer) -> None:
    emoji = [1 + byte for byte in "\U0001f600".encode()]
    content = chat_logprobs(emoji, [of(llama, token, LETTER_A) for token in emoji], 2)["content"]
    assert [token["bytes"] for token in content] == [[0xF0], [0x9F], [0x98], [0x80]]
    assert [token["token"] for token in content] == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x98", "bytes:\\x80"]
    assert content[0]["top_logprobs"][1] == {"token": "A", "logprob": -1.0, "bytes": [65]}


def test_a_special_token_adds_nothing_where_it_is_left_out(llama: Tokenizer) -> None:
    (kept,) = _named([TokenLogprob(0, -1.0, 1)], llama, SamplingParams(skip_special_tokens=False)).values()
    (left_out,) = _named([TokenLogprob(0, -1.0, 1)], llama, SamplingParams()).values()
    assert (kept.decoded_token, kept.token_bytes) == ("<unk>", b"<unk>")
    assert (left_out.decoded_token, left_out.token_bytes) == ("<unk>", b"")


def test_without_a_tokenizer_there_are_no_names() -> None:
    assert _named([TokenLogprob(5, -1.0, 1)], None, PARAMS) == {5: Logprob(-1.0, 1)}
