"""Tokenizers that are harder than byte-level BPE: a space marker that vanishes, bytes that are no UTF-8."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastdecode.errors import ConfigError
from fastdecode.text.detokenize import StopStrings
from fastdecode.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Llama 2's kind: a space is "\u2581", the first one of a text is dropped, unknown characters are bytes."""
    words = ["\u2581Once", "\u2581upon", "\u2581a", "\u2581time", "A", "END"]
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    ids = {word: i for i, word in enumerate(vocabulary)}
    backend = Backend(models.BPE(ids, [], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    spaces, strip = decoders.Replace("\u2581", " "), decoders.Strip(content=" ", left=1, right=0)
    backend.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), strip])
    directory = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(directory)
    return Tokenizer(directory)


ONCE, UPON, A, TIME, LETTER, END = range(257, 263)


def byte(value: int) -> int:
    return 1 + value


def test_stops_see_the_same_text(llama_like: Tokenizer) -> None:
    text = llama_like.output_text([ONCE, UPON], StopStrings([" time"]), skip_special_tokens=True)
    assert text.push(A) is None
    match = text.push(TIME)
    assert match and text.whole(match.position) == " a" and text.whole(match.end) == " a time"


@pytest.mark.parametrize("rubbish", [[0xFF], [0xE2, 0x82], [0xC3, 0x28], [0x80] * 5])
def test_bytes_that_are_no_text(rubbish: list[int], llama_like: Tokenizer) -> None:
    """Whatever comes between, nothing is raised and a stop after it is found."""
    finder = llama_like.output_text([], StopStrings(["END"]), skip_special_tokens=True)
    for token in [byte(0x41), *map(byte, rubbish), LETTER, byte(0x42), *map(byte, rubbish), LETTER]:
        assert finder.push(token) is None
    matches = [finder.push(token) for token in (END, LETTER)]
    assert any(match and match.stop == "END" for match in matches)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer could be loaded"):
        Tokenizer(tmp_path)
