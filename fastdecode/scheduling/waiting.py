"""The queue of sequences that wait for their start, in the order they are to start.  Pure.

    arrivals ──► │ . . . . . . . . │ ──► │ . . . │ ──► first          one such queue for each priority;
                   as they came           the window, sorted  ▲       the lowest number goes before all others
                                          preempted ──────────┘ before all others, the one that came first in front

Under `fcfs` the window is one sequence.  Under `sjf` and `ljf` (shortest, longest job first; TetriInfer's prefill
scheduler) the next `window` of them are sorted, and all of them start before the window is filled again: so nobody is
passed by more than the window.  Under `prefix` those of a window whose prompts begin alike come behind the first of
them, so that they meet while what they share is there; where none do, it is `fcfs`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from itertools import chain, islice

from fastdecode.scheduling.request import Sequence

ORDERS = ("fcfs", "sjf", "ljf", "prefix")
_PIECE = 16  # tokens by which prompts are compared


class WaitingQueue:
    def __init__(self, order: str, window: int, job_length: Callable[[Sequence], float]) -> None:
        """job_length: what sjf and ljf go by; asked for when a sequence comes into the window."""
        assert order in ORDERS and window >= 1
        self._make_class = partial(_Class, order, window, job_length)
        self._classes: dict[int, _Class] = {}  # by priority, rising; none is empty
        self.max_kv_tokens = 0  # that all of them together may come to hold

    def __len__(self) -> int:
        return sum(map(len, self._classes.values()))

    def __iter__(self) -> Iterator[Sequence]:
        """In no particular order."""
        return chain.from_iterable(self._classes.values())

    def add(self, sequence: Sequence) -> None:
        self._class(sequence).add(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """One that ran already."""
        self._class(sequence).put_back(sequence)

    def first(self) -> Sequence | None:
        return next((of_one.first() for of_one in self._classes.values()), None)

    def remove(self, sequence: Sequence) -> bool:
        """Whether it was here."""
        priority = sequence.request.priority
        own = self._classes.get(priority)
        if own is None or not own.remove(sequence):
            return False
        if not len(own):
            del self._classes[priority]
        self.max_kv_tokens -= sequence.max_kv_tokens
        return True

    def _class(self, sequence: Sequence) -> _Class:
        """Where it is to go."""
        self.max_kv_tokens += sequence.max_kv_tokens
        priority = sequence.request.priority
        if priority not in self._classes:
            self._classes[priority] = self._make_class()
            self._classes = dict(sorted(self._classes.items()))
        return self._classes[priority]


class _Class:
    """Those of one priority."""

    def __init__(self, order: str, window: int, job_length: Callable[[Sequence], float]) -> None:
        self._order, self._job_length = order, job_length
        self._window = 1 if order == "fcfs" else window
        # Ordered ones, because they give their first in the same time however many were taken from before it.
        self._arrived: OrderedDict[int, Sequence] = OrderedDict()  # by seq_id, in the order they came
        self._next: OrderedDict[int, Sequence] = OrderedDict()  # the window, in the order they start
        self._preempted: OrderedDict[int, Sequence] = OrderedDict()  # by seq_id, which rises in the order they came
        self._is_sorted = True  # what was preempted: a lost R-worker puts back thousands at a time

    def __len__(self) -> int:
        return len(self._arrived) + len(self._next) + len(self._preempted)

    def add(self, sequence: Sequence) -> None:
        self._arrived[sequence.seq_id] = sequence

    def put_back(self, sequence: Sequence) -> None:
        self._is_sorted = self._is_sorted and not self._preempted
        self._preempted[sequence.seq_id] = sequence

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self._arrived.values(), self._next.values(), self._preempted.values())

    def first(self) -> Sequence | None:
        if self._preempted:
            if not self._is_sorted:
                self._preempted = OrderedDict(sorted(self._preempted.items()))
                self._is_sorted = True
            return next(iter(self._preempted.values()))
        if not self._next:
            window = list(islice(self._arrived.values(), self._window))
            if self._order == "prefix":
                window = _together(window)
            elif self._order != "fcfs":
                window.sort(key=self._job_length, reverse=self._order == "ljf")
            for sequence in window:
                self._next[sequence.seq_id] = self._arrived.pop(sequence.seq_id)
        return next(iter(self._next.values()), None)

    def remove(self, sequence: Sequence) -> bool:
        return any(place.pop(sequence.seq_id, None) for place in (self._arrived, self._next, self._preempted))


def _together(sequences: list[Sequence]) -> list[Sequence]:
    """Those that begin alike behind the first of them, the longer alike the nearer; else as they came."""
    ranks: dict[Hashable, int] = {}  # of each beginning, when it came first

    def key(sequence: Sequence) -> list[int]:
        beginning: Hashable = sequence.request.cache_salt
        tokens, chain = sequence.request.prompt_token_ids, []
        for at in range(0, len(tokens), _PIECE):
            beginning = ranks.setdefault((beginning, tokens[at : at + _PIECE]), len(ranks))
            chain.append(beginning)
        return chain

    return sorted(sequences, key=key)
