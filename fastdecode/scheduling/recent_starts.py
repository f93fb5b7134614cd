"""Whether what starts lasts about as long as what started before.  Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection

import numpy as np

from fastdecode.scheduling.predictor import Prediction

RECENT, _LEAST_RECENT = 128, 8  # starts that tell whether lengths are alike
# They are if so many of them lie within a tenth of each other.  Three different lengths gain by the stream, four lose a
# little; normally distributed ones gain up to a relative spread of 0.15, where this share is 0.26.
_ALIKE_WITHIN, _ALIKE_SHARE = 1.1, 0.32
_SHARE, _ROUNDING = 1 << 40, 1e-6  # what a whole prediction weighs; of sums of them


class RecentStarts:
    """The last predictions to start, and whether they are alike: asked for once in a step, if at all.

    A start changes the largest share that lies together by one at most, so an answer that was far from the limit holds
    for as many of them.  Those that start in one step mostly share one prediction, so what has changed since is counted
    for each of them once; in whole shares, so that nothing is left of what has been taken away again.
    """

    def __init__(self) -> None:
        self._predictions: deque[Prediction] = deque(maxlen=RECENT)
        self._changed: dict[int, tuple[Prediction, int]] = {}  # by identity, how many more than the shares have
        self._shares: dict[int, int] = {}  # length -> its weights together
        self._are_alike = True
        self._num_sure = 0  # more starts for which that holds; negative: to be seen again

    def add(self, prediction: Prediction) -> None:
        if len(self._predictions) == RECENT:
            self._change(self._predictions[0], -1)
        self._predictions.append(prediction)
        self._change(prediction, 1)
        self._num_sure -= 1

    @property
    def are_alike(self) -> bool:
        if self._num_sure < 0:
            self._count()
            lengths = np.fromiter(self._shares, np.int64, len(self._shares))
            weights = np.fromiter(self._shares.values(), np.float64, len(self._shares))
            excess = _excess(lengths, weights / _SHARE, len(self._predictions))
            self._are_alike = excess >= 0
            self._num_sure = max(0, math.floor(abs(excess) - _ROUNDING))
        return self._are_alike

    def _change(self, prediction: Prediction, more: int) -> None:
        _, before = self._changed.get(id(prediction), (prediction, 0))
        self._changed[id(prediction)] = prediction, before + more

    def _count(self) -> None:
        for prediction, more in self._changed.values():
            for length, weight in zip(prediction.lengths, prediction.weights, strict=True) if more else ():
                self._shares[length] = self._shares.get(length, 0) + more * round(weight * _SHARE)
                if not self._shares[length]:
                    del self._shares[length]
        self._changed.clear()


def are_alike(predictions: Collection[Prediction]) -> bool:
    """Whether lengths that are drawn from these would lie close together.  Too few to tell count as alike."""
    if not predictions:
        return True
    lengths = np.concatenate([prediction.lengths for prediction in predictions])
    weights = np.concatenate([prediction.weights for prediction in predictions])
    return _excess(lengths, weights, len(predictions)) >= 0


def _excess(lengths: np.ndarray, weights: np.ndarray, num_predictions: int) -> float:
    """By how many of so many predictions more lie together than are needed; negative: fewer.

    lengths, weights: [n], in any order
    """
    if num_predictions < _LEAST_RECENT:
        return 0.0  # too few to tell
    order = np.argsort(lengths)
    lengths, mass = lengths[order], np.append(0, np.cumsum(weights[order]))
    within = mass[np.searchsorted(lengths, _ALIKE_WITHIN * lengths, side="right")] - mass[:-1]
    return float(within.max()) - _ALIKE_SHARE * num_predictions + _ROUNDING
