"""What a request says of single tokens, as the sampler wants it: made once for a request, used in every step.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np


def _no_ids() -> np.ndarray:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class TokenRules:
    """Ids are of the vocabulary, each once."""

    allowed: np.ndarray | None = None  # [n] int64, the only ones it may take; None: all
    bad_words: tuple[tuple[int, ...], ...] = ()  # the last token of each is banned where the others came before it
    bias_ids: np.ndarray = field(default_factory=_no_ids)  # [n] int64
    bias_values: np.ndarray = field(default_factory=_no_ids)  # [n] float32, added to their logits
    ends: np.ndarray = field(default_factory=_no_ids)  # [n] int64, that end it; banned before `min_tokens`
    min_tokens: int = 0
    prompt_ids: np.ndarray = field(default_factory=_no_ids)  # [n] int64; of a request with a repetition penalty

    def banned(self, output_token_ids: Sequence[int]) -> Sequence[int]:
        """What the next token must not be.  Bad words are looked for in the output alone, as with vLLM."""
        ids = self._always if len(output_token_ids) >= self.min_tokens else self._early
        if not self._words_after or not output_token_ids:
            return ids
        completed = [
            last
            for before, last in self._words_after.get(output_token_ids[-1], ())
            if tuple(output_token_ids[-len(before) :]) == before
        ]
        return [*completed, *ids] if completed else ids

    @cached_property
    def _always(self) -> list[int]:
        """Words of one token."""
        return [word[0] for word in self.bad_words if len(word) == 1]

    @cached_property
    def _early(self) -> list[int]:
        """The same before `min_tokens`."""
        return [*self.ends.tolist(), *self._always]

    @cached_property
    def _words_after(self) -> dict[int, list[tuple[tuple[int, ...], int]]]:
        """Of longer words what comes before the last token, and that: by the last but one."""
        words: dict[int, list[tuple[tuple[int, ...], int]]] = {}
        for *before, last in self.bad_words:
            if before:
                words.setdefault(before[-1], []).append((tuple(before), last))
        return words

    def is_certain_to_fail(self) -> bool:
        """Nothing is left for the first token."""
        return self.allowed is not None and not set(self.allowed.tolist()) - set(self.banned([]))


class TokenCounts:
    """Of a sequence: the tokens that penalties look at, and how often each was generated.  Grows with the output."""

    def __init__(self, prompt_ids: np.ndarray) -> None:
        """prompt_ids: [n] int64, each once; those that count though they were not generated."""
        self._size = len(prompt_ids)
        self._table = np.zeros((2, self._size + 16), np.int64)  # ids, counts
        self._table[0, : self._size] = prompt_ids
        self._places = {token_id: place for place, token_id in enumerate(prompt_ids.tolist())}
        self._num_taken = 0

    def update(self, output_token_ids: Sequence[int]) -> None:
        """All of the output, which begins with what there was the last time."""
        for token_id in output_token_ids[self._num_taken :]:
            place = self._places.setdefault(token_id, self._size)
            if place == self._size:
                if self._size == self._table.shape[1]:
                    self._table = np.concatenate((self._table, np.zeros_like(self._table)), axis=1)
                self._table[0, place] = token_id
                self._size += 1
            self._table[1, place] += 1
        self._num_taken = len(output_token_ids)

    @property
    def token_ids(self) -> np.ndarray:
        """[n] int64, each once, in no particular order"""
        return self._table[0, : self._size]

    @property
    def counts(self) -> np.ndarray:
        """[n] int64; 0: in the prompt alone"""
        return self._table[1, : self._size]
