"""A text that grows by tokens.

What holds for every stream, wherever the tokens are split:

    decode(prompt) + "".join(pushed) + flush()  ==  decode(prompt + output)

with the tokenizer's own `decode`, as long as that lets its text grow at the end.  Where it does not:

- the prompt ends inside a character: one that the output completes belongs to the output; of one that it does not
  complete the output has U+FFFD for its own bytes at most, never for the prompt's;
- bytes that are no UTF-8 make some decoders (ByteFallback) replace the good characters before them: what was told
  stays, and U+FFFD stands for each of the bad bytes, as with sentencepiece;
- a clean-up of spaces takes back the prompt's last one: it stays.

A character is told with its last byte, and undecodable bytes as soon as they are known to be: no run of tokens holds a
stream up, and no step looks further back than a few of them.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Protocol

from fastdecode.text.detokenize.pieces import Vocabulary

_UNDECODABLE = "\ufffd"
_EACH_BYTE = "fastdecode.each_byte"


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return _UNDECODABLE * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


class Stream(Protocol):
    num_before: int
    """Of the last push: characters, told or yet to be told, between what was told before it and its tokens' own."""

    def push(self, token_ids: Sequence[int]) -> str:
        """What they add that is certain."""

    def flush(self) -> str:
        """The rest, when no token follows."""


class PieceStream:
    """Of a tokenizer whose tokens have pieces: their bytes one after the other, read as UTF-8."""

    def __init__(self, vocabulary: Vocabulary, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._vocabulary, self._skip_special_tokens = vocabulary, skip_special_tokens
        self._pieces = vocabulary.pieces(skip_special_tokens=skip_special_tokens)
        self._errors = _EACH_BYTE if vocabulary.replaces_each_byte else "replace"
        self._stripped, self._num_to_strip = vocabulary.start_strip
        self._incomplete = b""  # a character's first bytes
        self._num_foreign = 0  # how many of them are the prompt's
        self._is_at_start = True  # no token of the text yet
        self.num_before = 0
        self._follow(prompt_token_ids)

    def push(self, token_ids: Sequence[int]) -> str:
        data = b"".join([self._pieces[token_id] for token_id in token_ids])
        if self._is_at_start:
            data = self._start(token_ids)
        return self._strip(self._read(data, is_end=False))

    def flush(self) -> str:
        return self._strip(self._read(b"", is_end=True))

    def _follow(self, prompt_token_ids: Sequence[int]) -> None:
        """The state after the prompt: of its start and of its last character alone."""
        for token_id in prompt_token_ids:
            if not (self._is_at_start or self._num_to_strip):
                break
            self.push([token_id])
        tail = b""
        for token_id in reversed(prompt_token_ids):
            tail = self._pieces[token_id] + tail
            if len(tail) >= 4:  # the longest character
                break
        self._incomplete = tail[codecs.utf_8_decode(tail, self._errors, False)[1] :]
        self._num_foreign = len(self._incomplete)
        if self._incomplete:
            self._num_to_strip = 0

    def _start(self, token_ids: Sequence[int]) -> bytes:
        data = []
        for token_id in token_ids:
            is_first = self._is_at_start and self._vocabulary.is_in_text(
                token_id, skip_special_tokens=self._skip_special_tokens
            )
            data.append(self._vocabulary.first_piece(token_id) if is_first else self._pieces[token_id])
            self._is_at_start = self._is_at_start and not is_first
        return b"".join(data)

    def _read(self, data: bytes, *, is_end: bool) -> str:
        broken, self.num_before = "", 0
        if self._incomplete:
            broken, data = self._end_incomplete(self._incomplete + data, is_end=is_end)
        text, num_read = codecs.utf_8_decode(data, self._errors, is_end)
        self._incomplete = data[num_read:]
        if num_read:
            self._num_foreign = 0
        return broken + text

    def _end_incomplete(self, data: bytes, *, is_end: bool) -> tuple[str, bytes]:
        """What stands for the character at the beginning of the data if that is none; and the rest of the data."""
        num_old, num_foreign = len(self._incomplete), self._num_foreign
        try:
            codecs.utf_8_decode(data[: num_old + 3], "strict", is_end)
        except UnicodeDecodeError as error:
            if error.start == 0:
                self._num_foreign = 0
                if self._vocabulary.replaces_each_byte:
                    self.num_before = num_old - num_foreign
                    return _UNDECODABLE * (error.end - num_foreign), data[error.end :]
                self.num_before = int(error.end == num_old and not num_foreign)
                return "" if num_foreign else _UNDECODABLE, data[error.end :]
        return "", data

    def _strip(self, text: str) -> str:
        if not self._num_to_strip:
            return text
        while self._num_to_strip and text.startswith(self._stripped):
            text = text[len(self._stripped) :]
            self._num_to_strip -= 1
        if text:
            self._num_to_strip = 0
        return text


_ENOUGH_CONTEXT = 8  # tokens
_LONGEST_WINDOW = 24
_LONGEST_STUCK_WINDOW = 96  # if no shorter one says the same
_MOST_INCOMPLETE = 3  # U+FFFD at a text's end that may become a character


class WindowStream:
    """Of any tokenizer: it is asked for the text of the last few tokens, before and after each new one."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_token_ids: Sequence[int]) -> None:
        self._decode = decode
        self._window, self._text = self._context(prompt_token_ids)
        self._num_told = len(self._text)  # characters of the window's text
        self._num_foreign = 0  # U+FFFD after them, of the prompt's own bytes
        self.num_before = 0
        if not self._text.endswith(_UNDECODABLE):
            return
        for num_incomplete in range(1, _MOST_INCOMPLETE + 1):
            window, text = self._context(prompt_token_ids[:-num_incomplete])
            if text.endswith(_UNDECODABLE):
                continue
            rest = list(prompt_token_ids[-num_incomplete:])
            if not self._text.startswith(text):  # ByteFallback: the incomplete character has spoilt those before it
                window, self._text = [], decode(rest)
            self._window = window + rest
            break
        self._num_told = len(self._text.rstrip(_UNDECODABLE))
        self._num_foreign = len(self._text) - self._num_told

    def _context(self, prompt_token_ids: Sequence[int]) -> tuple[list[int], str]:
        """The last tokens, enough of them to have some text, and that."""
        num_tokens = _ENOUGH_CONTEXT
        while True:
            window = list(prompt_token_ids[-num_tokens:])
            text = self._decode(window)
            if text.strip(" " + _UNDECODABLE) or num_tokens >= len(prompt_token_ids):
                return window, text
            num_tokens *= 2

    def push(self, token_ids: Sequence[int]) -> str:
        untold = self._untold()
        text = "".join([self._push(token_id) for token_id in token_ids])
        pairs = zip(untold, text + self._untold(), strict=False)
        self.num_before = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return text

    def flush(self) -> str:
        text = self._untold()
        self._num_told, self._num_foreign = len(self._text), 0
        return text

    def _untold(self) -> str:
        return self._text[self._num_told + self._num_foreign :]

    def _push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        rest = ""
        if not text.startswith(self._text[: self._num_told]):  # what was told changed: begin anew behind it
            rest = self.flush()
            self._window, self._num_told = [token_id], 0
            text = self._decode(self._window)
        self._text = text
        fresh = self._text[self._num_told :]
        if self._num_foreign:
            if not fresh.strip(_UNDECODABLE) and len(fresh) <= self._num_foreign + _MOST_INCOMPLETE:
                return rest
            num_undecodable = len(fresh) - len(fresh.lstrip(_UNDECODABLE))
            self._num_told += min(self._num_foreign, num_undecodable)
            self._num_foreign = 0
            fresh = self._text[self._num_told :]
        whole = fresh.rstrip(_UNDECODABLE)
        fresh = fresh[: max(len(whole), len(fresh) - _MOST_INCOMPLETE)]
        self._num_told += len(fresh)
        self._shorten()
        return rest + fresh

    def _shorten(self) -> None:
        """To a few tokens that say the same about what is not told, with a told character before it."""
        if len(self._window) <= _LONGEST_WINDOW:
            return
        window = self._window[-_ENOUGH_CONTEXT:]
        text = self._decode(window)
        num_untold = len(self._text) - self._num_told
        end = self._text[-num_untold - 1 :]
        if (len(text) > num_untold and text.endswith(end)) or len(self._window) > _LONGEST_STUCK_WINDOW:
            self._window, self._text = window, text
            self._num_told = max(0, len(text) - num_untold)


# What may be the beginning of a part that the clean-up shortens, once it has shortened what is before it.
_MAY_SHORTEN = re.compile(r"(?: | n| n'| '| 'v| 'r|' v|' r)\Z")
_IN_SHORTENED = " 'nvr"


class SpaceCleaner:
    """transformers' clean_up_tokenization_spaces on a text that comes in parts: " ." becomes "." and so on."""

    def __init__(self, clean_up: Callable[[str], str]) -> None:
        self._clean_up = clean_up
        self._held = ""

    @property
    def num_held(self) -> int:
        return len(self._held)

    def push(self, text: str) -> str:
        self._held += text
        if not _MAY_SHORTEN.search(self._held[-3:]):
            return self.flush()
        if not text.rstrip(_IN_SHORTENED):
            return ""
        end = len(self._held.rstrip(_IN_SHORTENED))
        cleaned, self._held = self._clean_up(self._held[:end]), self._held[end:]
        return cleaned

    def flush(self) -> str:
        cleaned, self._held = self._clean_up(self._held), ""
        return cleaned


class CleanStream:
    """A stream through a clean-up of spaces."""

    def __init__(self, stream: Stream, clean_up: Callable[[str], str]) -> None:
        self._stream, self._cleaner = stream, SpaceCleaner(clean_up)
        self.num_before = 0

    def push(self, token_ids: Sequence[int]) -> str:
        num_held = self._cleaner.num_held
        text = self._stream.push(token_ids)
        self.num_before = num_held + self._stream.num_before
        return self._cleaner.push(text)

    def flush(self) -> str:
        return self._cleaner.push(self._stream.flush()) + self._cleaner.flush()
