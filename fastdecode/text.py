"""Between text and tokens: the model directory's tokenizer, stop strings, chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastdecode.chat_template import foreign_code, render
from fastdecode.conversation import Conversation
from fastdecode.errors import ConfigError, RequestError

_CONTEXT_TOKENS = 6  # of the prompt, enough for a tokenizer to see that a text goes on
_HALF_A_CHARACTER = "\ufffd"


class Tokenizer:
    def __init__(self, directory: str | Path) -> None:
        """Raises ConfigError if there is none, or only one that would need its own code."""
        try:
            self._tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # transformers raises a dozen kinds here, depending on what is missing
            raise ConfigError(
                f"no tokenizer could be loaded from {directory} ({type(error).__name__}: {str(error)[:200]}); give one "
                "with tokenizer=DIR, or pass token ids and skip_tokenizer_init=True"
            ) from error
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
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def decode_continuation(
        self, prompt_token_ids: Sequence[int], token_ids: Sequence[int], *, skip_special_tokens: bool
    ) -> str:
        """The text that `token_ids` add to the prompt: some tokenizers drop a space at the beginning of a text."""
        tail = list(prompt_token_ids[-_CONTEXT_TOKENS:])
        before = self.decode(tail, skip_special_tokens=skip_special_tokens)
        whole = self.decode([*tail, *token_ids], skip_special_tokens=skip_special_tokens)
        if whole.startswith(before) and not before.endswith(_HALF_A_CHARACTER):
            return whole[len(before) :]
        return self.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)

    def stop_finder(
        self, prompt_token_ids: Sequence[int], stops: Sequence[str], *, skip_special_tokens: bool
    ) -> StopFinder:
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise RequestError("invalid_request", "stop strings and streams need a fast tokenizer (tokenizer.json)")
        return StopFinder(backend, prompt_token_ids[-_CONTEXT_TOKENS:], stops, skip_special_tokens)


class StopFinder:
    """Looks for stop strings in a text that grows by a token at a time, also across their borders."""

    def __init__(self, backend: Any, context: Sequence[int], stops: Sequence[str], skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(ids=list(context), skip_special_tokens=skip_special_tokens)
        self._stops = tuple(stops)
        self.text = ""

    def push(self, token_id: int) -> StopMatch | None:
        """The first stop string that this token completes, if any."""
        fresh = self._step(token_id)
        if not fresh:
            return None  # half a character, or a special token
        before = len(self.text)
        self.text += fresh
        found = [(self.text.find(stop, max(0, before - len(stop) + 1)), stop) for stop in self._stops]
        position, stop = min(((p, s) for p, s in found if p >= 0), default=(-1, ""))
        return StopMatch(self.text, position, stop) if position >= 0 else None

    def _step(self, token_id: int) -> str | None:
        try:
            return self._stream.step(self._backend, token_id)
        except Exception as error:  # tokenizers raises nothing more exact
            if "Invalid prefix" not in str(error):
                raise
            # Bytes that are no UTF-8 after all changed the text already given out (byte-fallback tokenizers; vLLM
            # issue 17448): go on with a fresh stream.
            self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
            return self._stream.step(self._backend, token_id)


@dataclass(frozen=True)
class StopMatch:
    text: str  # up to and with the token that completed the stop string
    position: int  # where in it the stop string begins
    stop: str

    def cut(self, *, include_stop: bool) -> str:
        return self.text[: self.position + (len(self.stop) if include_stop else 0)]
