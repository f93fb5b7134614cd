"""Between text and tokens: the model directory's tokenizer, stop strings, chat templates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastdecode.api.conversation import Conversation
from fastdecode.text.chat_template import foreign_code, render
from fastdecode.text.detokenize import (
    CleanStream,
    OutputText,
    PieceStream,
    StopStrings,
    Stream,
    TokenPiece,
    WindowStream,
    read_vocabulary,
    text_in_window,
)
from fastdecode.text.loading import end_token, load_tokenizer

_CLEAN_UP = PreTrainedTokenizerBase.clean_up_tokenization


class Tokenizer:
    def __init__(self, directory: str | Path) -> None:
        """Raises ConfigError if there is none, or only one that would need its own code."""
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(directory)
        self.end = end_token(self._tokenizer)
        is_fast = isinstance(self._tokenizer, PreTrainedTokenizerFast)
        self._names = read_vocabulary(self._tokenizer.backend_tokenizer, _guarded) if is_fast else None
        self._vocabulary = self._names if _is_decoded_by_backend(self._tokenizer) else None
        self._clean_up = _read_clean_up(self._tokenizer)
        self._pieces: dict[int, TokenPiece] = {}
        self._longest_token = max(map(len, self._tokenizer.get_vocab()), default=1)  # characters

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """With the special tokens (a beginning of sequence, say) that the tokenizer adds by itself, or without.

        Raises RequestError for what is no text, like half a surrogate pair.
        """
        with foreign_code("the tokenizer does not take this prompt"):
            return list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def encode_anywhere(self, word: str) -> list[tuple[int, ...]]:
        """Its tokens as vLLM bans them, at the beginning of a text and after a space, and where no word begins.

        Those may all be different, or all the same.  Raises RequestError like `encode`.
        """
        bare = word.lstrip() or word
        line, after_line = (self.encode(text, add_special_tokens=False) for text in ("\n", "\n" + bare))
        forms = [self.encode(text, add_special_tokens=False) for text in (bare, " " + bare)]
        if after_line[: len(line)] == line:
            forms.append(after_line[len(line) :])
        return list(dict.fromkeys(tuple(ids) for ids in forms if ids))

    def places(self, text: str) -> list[int] | None:
        """Where in the text each of its tokens begins; None if the tokenizer cannot tell (it has no tokenizer.json).

        Raises RequestError like `encode`.
        """
        if not self._tokenizer.is_fast:
            return None
        begins, last_end = [], 0
        with foreign_code("the tokenizer does not take this prompt"):
            places = self._tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        for begin, end in places:
            begins.append(begin if end > begin else last_end)  # a special token stands for nothing in the text
            last_end = max(last_end, end)
        return begins

    def fewest_tokens(self, text: str) -> int:
        """That it can have, without encoding it; a tokenizer that drops parts of texts may make fewer of it."""
        return -(-len(text) // self._longest_token)

    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def render_chat(self, conversation: Conversation) -> str:
        """What the chat template makes of it, to be encoded without special tokens: it has written its own.

        Raises RequestError, by the place of what the template does not take.
        """
        return render(self._tokenizer, conversation)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return str(self._tokenizer.decode(self._known(token_ids), skip_special_tokens=skip_special_tokens))

    def output_text(
        self, prompt_token_ids: Sequence[int], stops: StopStrings | None, *, skip_special_tokens: bool
    ) -> OutputText:
        """What output tokens will add to the prompt's text."""
        return OutputText(self._stream(prompt_token_ids, skip_special_tokens), stops)

    def piece(self, token_id: int) -> TokenPiece:
        """What a token says by itself, in the middle of a text."""
        if (known := self._pieces.get(token_id)) is None:
            known = self._pieces[token_id] = self._make_piece(token_id)
        return known

    def _make_piece(self, token_id: int) -> TokenPiece:
        if self._names:
            data = self._names.pieces(skip_special_tokens=False)[token_id]
            return TokenPiece(data, self._names.is_special(token_id))
        text = text_in_window(self._decode_plain, self.encode("x", add_special_tokens=False), token_id)
        return TokenPiece(text.encode(errors="replace"), token_id in self._tokenizer.all_special_ids)

    def _stream(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> Stream:
        stream: Stream
        if self._vocabulary:
            stream = PieceStream(self._vocabulary, prompt_token_ids, skip_special_tokens=skip_special_tokens)
        else:
            decode = partial(self._decode_plain, skip_special_tokens=skip_special_tokens)
            stream = WindowStream(decode, prompt_token_ids)
        return CleanStream(stream, self._clean_up) if self._clean_up else stream

    def _decode_plain(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Before the clean-up of spaces, if that is transformers' own."""
        options = {"clean_up_tokenization_spaces": False} if self._clean_up else {}
        decode = partial(self._tokenizer.decode, skip_special_tokens=skip_special_tokens, **options)
        return str(_guarded(decode)(self._known(token_ids)))

    def _known(self, token_ids: Sequence[int]) -> list[int]:
        """Without ids beyond the last token's, which a model may have: tokenizers in Python fail at them."""
        if self._tokenizer.is_fast:
            return list(token_ids)
        size = len(self._tokenizer)
        return [token_id for token_id in token_ids if token_id < size]


def _guarded(decode: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Whatever it raises ends the request whose tokens it does not take, and nothing else."""

    def guarded(tokens: list[Any]) -> Any:
        with foreign_code("the tokenizer does not take tokens that were generated", "tokenizer_failed"):
            return decode(tokens)

    return guarded


def _read_clean_up(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str] | None:
    """What transformers does to a text that was decoded, unless a tokenizer has its own way or has none."""
    is_theirs = type(tokenizer).clean_up_tokenization is _CLEAN_UP
    if not (is_theirs and getattr(tokenizer, "clean_up_tokenization_spaces", False)):
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_for_bpe_too = getattr(
        tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False
    )
    if backend is not None and type(backend.model).__name__ == "BPE" and not is_for_bpe_too:
        return None  # transformers leaves it out there
    return tokenizer.clean_up_tokenization


def _is_decoded_by_backend(tokenizer: PreTrainedTokenizerBase) -> bool:
    """By tokenizer.json's decoder alone, and transformers' clean-up behind it."""
    kind = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind._decode is PreTrainedTokenizerFast._decode
        and kind.decode is PreTrainedTokenizerBase.decode
        and kind.clean_up_tokenization is _CLEAN_UP
    )
