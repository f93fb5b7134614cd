"""The queue of sequences that wait for their start, in the order they are to start.  Pure.

    arrivals ──► │ . . . . . . . . │ ──► │ . . . │ ──► first
                   as they came           the window, sorted  ▲
                                          preempted ──────────┘ before all others, the one that came first in front

Under `fcfs` the window is one sequence.  Under `sjf` and `ljf` (shortest, longest job first; TetriInfer's prefill
scheduler) the next `window` of them are sorted, and all of them start before the window is filled again: so nobody is
passed by more than the window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, islice

from fastdecode.request import Sequence

ORDERS = ("fcfs", "sjf", "ljf")


class WaitingQueue:
    def __init__(self, order: str, window: int, job_length: Callable[[Sequence], float]) -> None:
        """job_length: what sjf and ljf go by; asked for when a sequence comes into the window."""
        assert order in ORDERS and window >= 1
        self._order, self._job_length = order, job_length
        self._window = 1 if order == "fcfs" else window
        self._arrived: dict[int, Sequence] = {}  # by seq_id, in the order they came
        self._next: dict[int, Sequence] = {}  # the window, in the order they start
        self._preempted: dict[int, Sequence] = {}  # by rising seq_id, which is the order they came in
        self.max_kv_tokens = 0  # that all of them together may come to hold

    def __len__(self) -> int:
        return len(self._arrived) + len(self._next) + len(self._preempted)

    def add(self, sequence: Sequence) -> None:
        self._arrived[sequence.seq_id] = sequence
        self.max_kv_tokens += sequence.max_kv_tokens

    def put_back(self, sequence: Sequence) -> None:
        """One that ran already."""
        self._preempted[sequence.seq_id] = sequence
        self._preempted = dict(sorted(self._preempted.items()))
        self.max_kv_tokens += sequence.max_kv_tokens

    def __iter__(self) -> Iterator[Sequence]:
        """In no particular order."""
        return chain(self._arrived.values(), self._next.values(), self._preempted.values())

    def first(self) -> Sequence | None:
        if self._preempted:
            return next(iter(self._preempted.values()))
        if not self._next:
            window = list(islice(self._arrived.values(), self._window))
            if self._order != "fcfs":
                window.sort(key=self._job_length, reverse=self._order == "ljf")
            for sequence in window:
                self._next[sequence.seq_id] = self._arrived.pop(sequence.seq_id)
        return next(iter(self._next.values()), None)

    def remove(self, sequence: Sequence) -> bool:
        """Whether it was here."""
        for place in (self._arrived, self._next, self._preempted):
            if place.pop(sequence.seq_id, None):
                self.max_kv_tokens -= sequence.max_kv_tokens
                return True
        return False
