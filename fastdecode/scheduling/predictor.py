"""How long a sequence's output will be: what is known, what is guessed, and what is done when the guess was short.

Pure: no model, no clock.  A prediction is a distribution over buckets of output tokens (TetriInfer, section 5.5 of its
paper: ranges of 200 tokens).  A limit wants a high quantile of it, a balance its mean; and a sequence that outlives its
bucket is taken to end in the next one, never at once.

    known by            predictor        from
    ────────────────    ─────────────    ────────────────────────────────────────────
    nobody              MaxTokens        the request's own limit
    the trace           Oracle           the true length (simulations, replays)
    a trained model     NoisyOracle      the true bucket with a given probability, otherwise a neighbour
    what has ended      Learned          lengths of finished requests, by prompt length
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections import deque
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

BUCKET_TOKENS = 200
_PARTS = 4  # of a bucket, within which lengths are taken to be spread evenly
_GRAIN_BITS = 5  # of what has ended, lengths are told apart by about a sixteenth
PUBLISHED_ACCURACY = 0.749  # of a fine-tuned OPT-125M at buckets of 200 tokens


@dataclass(frozen=True)
class Prediction:
    """Output tokens as a discrete distribution: lengths[i] with weights[i], in rising order; weights sum to 1."""

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    is_informed: bool = True  # False: no more than a bound

    def quantile(self, share: float, more_than: int = 0) -> int:
        """The least length that at least this share of outputs does not exceed, of those beyond `more_than`.

        `more_than`: tokens there are already.  If none of the lengths is beyond, one bucket more.
        """
        first = bisect.bisect_right(self.lengths, more_than)
        sums = self._sums
        before = sums[first - 1] if first else 0.0
        left = sums[-1] - before
        if left <= 0:
            return more_than + BUCKET_TOKENS
        goal = bisect.bisect_left(sums, before + share * left - 1e-9, first)
        return self.lengths[min(goal, len(self.lengths) - 1)]

    def mean(self, more_than: int = 0) -> float:
        return self._mean_beyond(more_than) if more_than >= self.lengths[0] else self._mean

    @cached_property
    def _sums(self) -> list[float]:
        """Of the weights, up to each length."""
        return list(itertools.accumulate(self.weights))

    @cached_property
    def _mean(self) -> float:
        """Of all."""
        return self._mean_beyond(0)

    def _mean_beyond(self, more_than: int) -> float:
        first = bisect.bisect_right(self.lengths, more_than)
        left = sum(self.weights[first:])
        if left <= 0:
            return more_than + BUCKET_TOKENS / 2
        return sum(n * w for n, w in zip(self.lengths[first:], self.weights[first:], strict=True)) / left


class Predictor(Protocol):
    def predict(self, prompt_tokens: int, max_tokens: int, true_tokens: int | None) -> Prediction:
        """`true_tokens`: known in simulations only.  No length is above `max_tokens`."""

    def observe(self, prompt_tokens: int, output_tokens: int, *, was_cut: bool = False) -> None:
        """A sequence ended after so many tokens: by itself, or because its request allowed no more."""


class MaxTokens:
    """Every sequence takes all it may."""

    def predict(self, prompt_tokens: int, max_tokens: int, true_tokens: int | None) -> Prediction:
        return Prediction((max_tokens,), (1.0,), is_informed=False)

    def observe(self, prompt_tokens: int, output_tokens: int, *, was_cut: bool = False) -> None:
        pass


class Oracle:
    def predict(self, prompt_tokens: int, max_tokens: int, true_tokens: int | None) -> Prediction:
        """Raises ValueError where nobody knows the truth."""
        if true_tokens is None:
            raise ValueError("an oracle needs the true length, which only a simulation has")
        return Prediction((min(true_tokens, max_tokens),), (1.0,))

    def observe(self, prompt_tokens: int, output_tokens: int, *, was_cut: bool = False) -> None:
        pass


class NoisyOracle:
    """The true bucket with probability `accuracy`, otherwise the one below or above, evenly: what a trained classifier
    of that accuracy says.  Its prediction is the bucket it names, spread as its own errors are, and evenly within."""

    def __init__(self, accuracy: float = PUBLISHED_ACCURACY, seed: int = 0) -> None:
        self._accuracy, self._random = accuracy, random.Random(seed)

    def predict(self, prompt_tokens: int, max_tokens: int, true_tokens: int | None) -> Prediction:
        """Raises ValueError where nobody knows the truth."""
        if true_tokens is None:
            raise ValueError("an oracle needs the true length, which only a simulation has")
        bucket = (max(true_tokens, 1) - 1) // BUCKET_TOKENS
        if self._random.random() >= self._accuracy:
            bucket += 1 if bucket == 0 or self._random.random() < 0.5 else -1
        wrong = (1 - self._accuracy) / 2
        weights: dict[int, float] = {}
        for named, weight in ((bucket - 1, wrong), (bucket, self._accuracy), (bucket + 1, wrong)):
            for part in range(1, _PARTS + 1):
                length = min(max(named, 0) * BUCKET_TOKENS + part * BUCKET_TOKENS // _PARTS, max_tokens)
                weights[length] = weights.get(length, 0.0) + weight / _PARTS
        lengths = tuple(sorted(weights))
        return Prediction(lengths, tuple(weights[length] for length in lengths))

    def observe(self, prompt_tokens: int, output_tokens: int, *, was_cut: bool = False) -> None:
        pass


class Learned:
    """Lengths of the last requests that finished, in classes of prompt length that double.

    Until a class has seen `least` of them it says what all of them together say, and before that `max_tokens`.  One
    that was cut would have gone on, nobody knows how far: it counts as all that a request allows.
    """

    def __init__(self, window: int = 512, least: int = 32) -> None:
        self._window, self._least = window, least
        self._all = _Ended(window)
        self._by_class: dict[int, _Ended] = {}

    def predict(self, prompt_tokens: int, max_tokens: int, true_tokens: int | None) -> Prediction:
        seen = self._by_class.get(prompt_tokens.bit_length(), self._all)
        if len(seen) < self._least:
            seen = self._all
        if len(seen) < self._least:
            return Prediction((max_tokens,), (1.0,), is_informed=False)
        return seen.prediction(max_tokens)

    def observe(self, prompt_tokens: int, output_tokens: int, *, was_cut: bool = False) -> None:
        own = self._by_class.setdefault(prompt_tokens.bit_length(), _Ended(self._window))
        for lengths in (own, self._all):
            lengths.add(output_tokens, was_cut)


class _Ended:
    """Output lengths of the last so many, counted as they come: many ask between two that end."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._last: deque[tuple[int, bool]] = deque()  # length, whether it was cut
        self._counts: dict[int, int] = {}  # by length, of those that were not cut
        self._told: dict[int, Prediction] = {}  # by max_tokens, since the last one ended

    def __len__(self) -> int:
        return len(self._last)

    def add(self, output_tokens: int, was_cut: bool) -> None:
        grain = 1 << max(0, output_tokens.bit_length() - _GRAIN_BITS)
        self._last.append((-(-output_tokens // grain) * grain, was_cut))
        self._count(*self._last[-1], 1)
        if len(self._last) > self._window:
            self._count(*self._last.popleft(), -1)
        self._told.clear()

    def _count(self, length: int, was_cut: bool, number: int) -> None:
        if was_cut:
            return  # they are what the others leave
        self._counts[length] = self._counts.get(length, 0) + number
        if not self._counts[length]:
            del self._counts[length]

    def prediction(self, max_tokens: int) -> Prediction:
        if max_tokens not in self._told:
            counts = {length: count for length, count in sorted(self._counts.items()) if length < max_tokens}
            if num_longest := len(self) - sum(counts.values()):
                counts[max_tokens] = num_longest
            weights = tuple(count / len(self) for count in counts.values())
            self._told[max_tokens] = Prediction(tuple(counts), weights)
        return self._told[max_tokens]
