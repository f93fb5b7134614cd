"""What each token says by itself, in bytes.

decoder of tokenizer.json                             token       piece, in the middle of a text
───────────────────────────────────────────────────   ─────────   ──────────────────────────────
ByteLevel                                             Ġof         b" of"
Replace "▁", ByteFallback, Fuse, Strip at the start   ▁of         b" of"
                                                      <0xE2>      b"\xe2"
Metaspace, also with ByteFallback                     ▁of         b" of", as the first: b"of"
WordPiece                                             ##of        b"of"
                                                      of          b" of", as the first: b"of"
none                                                  of          b" of", as the first: b"of"

In these kinds a token's piece does not depend on its neighbours, and a text is what its pieces say one after the
other.  Other decoders have no pieces (`read_vocabulary` returns None): their texts are read through a window.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

_ANCHOR = "x"  # a text that goes before, so that a token is not the first
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SEES_THE_FIRST = {"Metaspace", "WordPiece"}
_PER_TOKEN = {"Replace", "ByteFallback"} | _SEES_THE_FIRST


@dataclass(frozen=True)
class TokenPiece:
    data: bytes  # UTF-8; of a part of a character, that part
    is_special: bool = False  # skip_special_tokens leaves it out of texts

    @cached_property
    def name(self) -> str:
        """Its text, or as OpenAI names what is no text by itself: `bytes:\\xe2\\x82`."""
        try:
            return self.data.decode()
        except UnicodeDecodeError:
            return bytes_name(self.data)


def bytes_name(data: bytes) -> str:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class Vocabulary:
    """The pieces of a tokenizer whose tokens have some."""

    def __init__(
        self,
        *,
        token_of: Callable[[int], str | None],
        special_ids: frozenset[int],
        decode: Callable[[list[str]], str],
        is_byte_level: bool = False,
        has_byte_fallback: bool = False,
        start_strip: tuple[str, int] = ("", 0),
    ) -> None:
        """decode: what the decoder makes of tokens; start_strip: (character, how many) that a text's start loses."""
        self._token_of, self._special_ids, self._decode = token_of, special_ids, decode
        self._is_byte_level, self._has_byte_fallback, self.start_strip = is_byte_level, has_byte_fallback, start_strip
        # Undecodable bytes become one U+FFFD each, or one for each character that they might have begun.
        self.replaces_each_byte = has_byte_fallback
        self._texts = {True: _Cache(self._piece_without_special), False: _Cache(self._piece)}

    def pieces(self, *, skip_special_tokens: bool) -> dict[int, bytes]:
        """token id -> what it adds to a text; filled as it is asked."""
        return self._texts[skip_special_tokens]

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def is_in_text(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        """Whether it counts as a token of the text at all, even if it adds nothing."""
        return not (skip_special_tokens and token_id in self._special_ids) and self._token_of(token_id) is not None

    def first_piece(self, token_id: int) -> bytes:
        """What it adds as the first token of a text."""
        token = self._token_of(token_id)
        if token is None or self._is_byte_level or self._byte(token) or self.start_strip[1]:
            return self.pieces(skip_special_tokens=False)[token_id]  # the stream strips a start by itself
        return self._decode([token]).encode()

    def _piece_without_special(self, token_id: int) -> bytes:
        return b"" if token_id in self._special_ids else self._piece(token_id)

    def _piece(self, token_id: int) -> bytes:
        token = self._token_of(token_id)
        if token is None:
            return b""  # a model may have more rows than its tokenizer has tokens
        if self._is_byte_level:
            return _bytes_of_alphabet(token)
        if (byte := self._byte(token)) is not None:
            return byte
        before, after = self._decode([_ANCHOR]), self._decode([_ANCHOR, token])
        assert after.startswith(before), "these decoders see one token at a time"
        return after[len(before) :].encode()

    def _byte(self, token: str) -> bytes | None:
        match = _BYTE_TOKEN.fullmatch(token) if self._has_byte_fallback else None
        return bytes([int(match[1], 16)]) if match else None


Decode = Callable[[list[str]], str]


def read_vocabulary(backend: Any, guard: Callable[[Decode], Decode] = lambda decode: decode) -> Vocabulary | None:
    """Of a `tokenizers.Tokenizer`; None if its decoder is of no kind above.  guard: put around the decoder."""
    decoder = backend.decoder
    chain: list[dict[str, Any]] = [] if decoder is None else _flatten(json.loads(decoder.__getstate__()))
    kinds = [part["type"] for part in chain]
    special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
    decode = guard(" ".join if decoder is None else decoder.decode)
    if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return Vocabulary(token_of=backend.id_to_token, special_ids=special_ids, decode=decode, is_byte_level=True)
    start_strip = ("", 0)
    if kinds[-2:] == ["Fuse", "Strip"] and chain[-1]["stop"] == 0:
        start_strip = chain[-1]["content"], chain[-1]["start"]
        kinds.pop()
    if kinds[-1:] == ["Fuse"]:
        kinds.pop()
    if not set(kinds) <= _PER_TOKEN or (start_strip[1] and set(kinds) & _SEES_THE_FIRST):
        return None
    return Vocabulary(
        token_of=backend.id_to_token,
        special_ids=special_ids,
        decode=decode,
        has_byte_fallback="ByteFallback" in kinds,
        start_strip=start_strip,
    )


def _flatten(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [part for inner in decoder["decoders"] for part in _flatten(inner)]


def _byte_alphabet() -> dict[str, int]:
    """character -> byte, of byte-level BPE (GPT-2): printable bytes are themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _bytes_of_alphabet(token: str) -> bytes:
    """An added token may have characters outside of the alphabet: it is text as it stands, as the decoder takes it."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


class _Cache(dict[int, bytes]):
    def __init__(self, make: Callable[[int], bytes]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, token_id: int) -> bytes:
        made = self[token_id] = self._make(token_id)
        return made


def text_in_window(decode: Callable[[Sequence[int]], str], anchor: Sequence[int], token_id: int) -> str:
    """What a token adds to the anchor's text: of tokenizers without pieces."""
    before, after = decode(anchor), decode([*anchor, token_id])
    return after[len(before) :] if after.startswith(before) else decode([token_id])
