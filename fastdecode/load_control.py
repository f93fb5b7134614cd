"""Whether one more sequence may start in this step, and on which R-worker.  Pure.

    a sequence starts if …                                                 asked of
    ────────────────────────────────────────────────────────────────────   ─────────────────────
    its KV fits on an R-worker                                             KVCredits
    the load of every step to come stays within W_lim, if there is one     Projection of all
    starts keep the pace that the load can keep up with for ever           SteadyStream

    start policy   the pace
    ────────────   ──────────────────────────────────────────────────────────────────────────────────────
    steady         of the stream, as long as more waits than fits at once (sequence-level load stabilising)
    eager          none: whoever fits starts
    at-once        a batch starts together, and the next one when all of it has ended (the paper's baseline)

A sequence that finds nothing running starts in any case: what fits nowhere was refused before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastdecode.kv_credits import KVCredits
from fastdecode.load import Demand, Projection, SteadyStream

START_POLICIES = ("steady", "eager", "at-once")


@dataclass(frozen=True)
class Prospect:
    """What a sequence will hold if it starts in the step at hand."""

    limit: Demand  # up to the end that was predicted with confidence
    mean: Demand | None  # up to the mean one; None: nothing is known but that it may take all it is allowed
    max_kv_tokens: int


@dataclass(frozen=True)
class _Started:
    demand: Demand
    spent: float | None  # of the stream; None: it was not paced


class LoadControl:
    def __init__(self, credits: KVCredits, *, start_policy: str, start_interval: int, max_kv_load: int | None) -> None:
        """max_kv_load: W_lim, KV tokens of all R-workers together; start_interval: F, in steps."""
        assert start_policy in START_POLICIES
        self._credits, self._policy, self._max_kv_load = credits, start_policy, max_kv_load
        self._total = Projection()
        capacity = credits.capacity_tokens
        self._limit = capacity if max_kv_load is None else min(max_kv_load, capacity)
        self._stream = SteadyStream(self._limit, start_interval)
        self._started: dict[int, _Started] = {}
        self._step = 0
        self._paced = False
        self._batch_open = True

    def begin_step(self, step: int, max_kv_tokens: int, first: Prospect | None) -> None:
        """max_kv_tokens: that all waiting and running sequences may come to hold; first: who would start first."""
        self._step = step
        self._paced = self._policy == "steady" and max_kv_tokens > self._limit
        self._batch_open = self._batch_open or not self._started
        if first is not None:
            self._stream.earn(step, self._cost(first) or 0.0)

    def place(self, prospect: Prospect) -> int | None:
        """The R-worker on which it starts; None: not in this step."""
        worker = self._credits.place(prospect.limit, prospect.max_kv_tokens, prospect.mean is not None)
        if not self._started:
            return worker
        if worker is None or not self._batch_open or not self._within_limit(prospect):
            self._batch_open = self._policy != "at-once"
            return None
        cost = self._cost(prospect)
        return worker if cost is None or self._stream.allows(cost) else None

    def start(self, seq_id: int, worker: int, prospect: Prospect) -> None:
        cost = self._cost(prospect)
        if cost is not None:
            self._stream.spend(cost)
        self._credits.start(seq_id, worker, prospect.limit)
        self._total.add(prospect.limit)
        self._started[seq_id] = _Started(prospect.limit, cost)

    def extend(self, seq_id: int, steps: int) -> None:
        """A sequence has outlived its prediction by so many steps."""
        started = self._started[seq_id]
        longer = replace(started.demand, end=started.demand.end + steps)
        self._total.remove(started.demand)
        self._total.add(longer)
        self._credits.extend(seq_id, longer)
        self._started[seq_id] = replace(started, demand=longer)

    def end(self, seq_id: int) -> None:
        """It has ended, by itself or not; the step at hand was its last, or the one before."""
        started = self._started.pop(seq_id)
        self._batch_open = self._policy != "at-once"
        self._total.remove(started.demand)
        self._credits.end(seq_id)
        if started.spent is not None:
            took = replace(started.demand, end=max(self._step, started.demand.start))
            self._stream.settle(started.spent, self._stream.cost(self._measured(took)))

    def check_integrity(self) -> None:
        assert len(self._total) == len(self._started)

    def _within_limit(self, prospect: Prospect) -> bool:
        return self._max_kv_load is None or self._total.peak(prospect.limit) <= self._max_kv_load

    def _cost(self, prospect: Prospect) -> float | None:
        """What the stream takes for it; None if it is not asked."""
        if not self._paced or prospect.mean is None:
            return None
        return self._stream.cost(self._measured(prospect.mean))

    def _measured(self, demand: Demand) -> Demand:
        """In the units of the limit: where memory sets it, part of that goes to blocks half full."""
        return demand if self._limit == self._max_kv_load else self._credits.with_slack(demand)
