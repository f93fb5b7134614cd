"""Sequences that have a place on an R-worker, of all lanes.  Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from fastdecode.scheduling.request import Sequence


class Running:
    """In order of admission."""

    def __init__(self) -> None:
        self._sequences: dict[int, Sequence] = {}  # by seq_id
        self._priorities: Counter[int] = Counter()  # of them all; none is 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._sequences

    def __getitem__(self, seq_id: int) -> Sequence:
        return self._sequences[seq_id]

    @property
    def lowest_priority(self) -> float:
        """A waiting sequence with a lower number than that is urgent."""
        return max(self._priorities, default=-math.inf)

    def add(self, sequence: Sequence) -> None:
        self._sequences[sequence.seq_id] = sequence
        self._priorities[sequence.request.priority] += 1

    def remove(self, sequence: Sequence) -> None:
        del self._sequences[sequence.seq_id]
        priority = sequence.request.priority
        self._priorities[priority] -= 1
        if not self._priorities[priority]:
            del self._priorities[priority]

    def check_integrity(self) -> None:
        assert self._priorities == Counter(s.request.priority for s in self)


def rank(sequence: Sequence) -> tuple[int, int]:
    """Who goes first: by priority, then as they came."""
    return sequence.request.priority, sequence.seq_id
