"""What a request says of single tokens, as the sampler wants it: made once for a request, used in every step.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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

    def banned(self, output_token_ids: Sequence[int]) -> list[int]:
        """What the next token must not be.  Bad words are looked for in the output alone, as with vLLM."""
        ids = self.ends.tolist() if len(output_token_ids) < self.min_tokens else []
        for *before, last in self.bad_words:
            if not before or list(output_token_ids[-len(before) :]) == before:
                ids.append(last)
        return ids

    def is_certain_to_fail(self) -> bool:
        """Nothing is left for the first token."""
        return self.allowed is not None and not set(self.allowed.tolist()) - set(self.banned([]))
