"""Whether one more sequence may start in this step, and on which R-worker.  Pure.

    a sequence starts if …                                                 asked of
    ────────────────────────────────────────────────────────────────────   ─────────────────────
    its KV fits on an R-worker, or in parts on several                     KVCredits
    the load of every step to come stays within W_lim, if there is one     Projection of all
    starts keep the pace that the load can keep up with for ever           SteadyStream

    start policy   the pace
    ────────────   ──────────────────────────────────────────────────────────────────────────────────────
    steady         of the stream, while much more waits than fits at once and lengths are alike
                   (sequence-level load stabilising); otherwise none
    eager          none: whoever fits starts
    at-once        a batch starts together, and the next one when all of it has ended (the paper's baseline)

Equal lengths that start together end together, so bursts come back for ever, and with them half of the memory stands
empty on average: in simulations a stream takes 0.6 of the time.  Lengths that differ spread by themselves, and a
stream that keeps to the mean then only loses what its ramp takes: it takes 1.1 times as long.

A sequence that finds nothing running starts in any case: what fits nowhere was refused before.

The S-worker's device is taken first, as far as it goes, or by a plan (placement.py), whose limits come to those above:
what lies there is no load of R-workers.  A sequence is divided among R-workers if it fits on none of them, were that
empty, or if it is so long that whoever had it whole would have more to read than the others, with all that runs and
waits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from fastdecode.scheduling.kv_credits import KVCredits
from fastdecode.scheduling.layouts import Layout
from fastdecode.scheduling.load import Demand, Projection, Shared, SteadyStream
from fastdecode.scheduling.parts import DEVICE, Part, whole_on
from fastdecode.scheduling.placement import Placement, Room, Share
from fastdecode.scheduling.prefix_tree import Change
from fastdecode.scheduling.prospects import Prospect
from fastdecode.scheduling.recent_starts import RecentStarts

# Fillings of the limit, at the sequences' full lengths.  Of N such fillings started at once each takes S steps; in a
# stream they take half as long, and a ramp of S steps before: N/2 + 1 of them, which is less from two fillings on.
_PAYS_FROM = 2
_NOT_SHARED = Shared()
_NONE: Mapping[int, Shared] = {}
_NO_BLOCKS: Mapping[int, int] = {}
Changes = Iterable[tuple[int, Change]]  # by R-worker

START_POLICIES = ("steady", "eager", "at-once")


class _Started(NamedTuple):
    worker: int  # that has its first token
    demand: Demand
    spent: float | None  # of the worker's stream; None: it was not paced
    max_kv_tokens: int  # that it may come to hold


class LoadControl:
    def __init__(
        self,
        credits: KVCredits,
        *,
        start_policy: str,
        start_interval: int,
        max_kv_load: int | None,
        min_part_tokens: int | None = None,
        placement: Placement | None = None,
    ) -> None:
        """max_kv_load: W_lim, KV tokens of all R-workers together; start_interval: F, in steps.

        min_part_tokens: of a sequence that is divided though it fits on one R-worker; None: none is.
        placement: None: the device first, and as much on R-workers as they hold.
        """
        assert start_policy in START_POLICIES
        self._min_part_tokens, self._waiting_kv_tokens = min_part_tokens, 0
        self._credits, self._policy, self._max_kv_load = credits, start_policy, max_kv_load
        self._total = None if max_kv_load is None else Projection()  # nobody else asks for it
        self._start_interval = start_interval
        # Where memory is the limit every R-worker has its own, and keeps its own pace; and so does the device.
        self._by_memory = max_kv_load is None or max_kv_load >= sum(credits.capacity_tokens)
        self._streams: dict[int | None, SteadyStream] = {}  # by R-worker; None: of all of them together
        self._placement = placement
        self._limit = 0
        self._filling: float = 0.0
        self._memory = (0, 0, 0)  # tokens of the device, of all R-workers, and how many those are
        self.measure_memory()
        self._started: dict[int, _Started] = {}
        self._max_kv_tokens = 0  # of all that have started
        self._recent = RecentStarts()  # how long the latest to start will take
        self._step = 0
        self._much_waits = self._paced = False
        self._batch_open = True

    @property
    def limit(self) -> int:
        """W_lim, or the memory of all R-workers where that is less."""
        return self._limit

    def measure_memory(self) -> None:
        """Again, when an R-worker was lost or has come, and for another plan, whose limits are the paces'."""
        capacities, of_r_workers = self._credits.capacities, self._credits.capacity_tokens
        memory = sum(of_r_workers)
        there_is = capacities.get(DEVICE, 0), memory, sum(capacity > 0 for capacity in of_r_workers)
        if self._placement and self._memory != there_is:
            self._placement.forget_full()
        self._memory = there_is
        self._limit = memory if self._max_kv_load is None else min(self._max_kv_load, memory)
        on_device, planned = float(capacities.get(DEVICE, 0)), math.inf
        if self._placement:
            on_device, planned = min(on_device, self._placement.plan.device), self._placement.plan.r_workers
        self._filling = min(self._limit, planned) + on_device
        limits: dict[int | None, float] = {None: self._filling - on_device}
        if self._by_memory:
            share = min(1.0, planned / max(memory, 1))  # of each R-worker's memory
            limits = {worker: share * capacity for worker, capacity in capacities.items()}
            limits |= {DEVICE: on_device} if DEVICE in capacities else {}
        for key, limit in limits.items():
            pace = max(1, int(limit)) if limit else self._limit  # where nobody is to start, that is not told by a pace
            self._streams.setdefault(key, SteadyStream(pace, self._start_interval)).limit = pace

    def begin_step(
        self, step: int, waiting_kv_tokens: int, first: Prospect | None, num_in_all: int, num_seats: int
    ) -> None:
        """waiting_kv_tokens: that all that wait may come to hold; first: who would start first; num_in_all: sequences
        that run or wait; num_seats: of those that run.
        """
        self._step, self._waiting_kv_tokens = step, waiting_kv_tokens
        if self._placement:
            self._plan(self._placement, first, num_in_all, num_seats)
        self._much_waits = self._fillings_exceed(1 if self._much_waits else _PAYS_FROM, waiting_kv_tokens)
        self._paced = self._policy == "steady" and self._much_waits and self._recent.are_alike
        if not self._started:
            self._batch_open = True
            for stream in self._streams.values():
                stream.forgive()
        if first is not None:
            for stream in self._streams.values():
                stream.earn(step, stream.cost(self._measured(first.mean)) if first.mean else 0.0)

    def is_much(self, waiting_kv_tokens: int) -> bool:
        """Whether more that waits would change nothing; as in `begin_step`."""
        return self._fillings_exceed(_PAYS_FROM, waiting_kv_tokens)

    def _fillings_exceed(self, fillings: int, waiting_kv_tokens: int) -> bool:
        """Whether all that waits and runs may come to hold more than so many times what there is room for."""
        return waiting_kv_tokens + self._max_kv_tokens > fillings * self._filling

    def place(
        self,
        prospect: Prospect,
        *,
        is_urgent: bool = False,
        shared: Mapping[int, Shared] = _NONE,
        layout: Layout | None = None,
    ) -> tuple[Part, ...] | None:
        """Where it starts; None: not in this step.  What is urgent keeps no pace, but fits.

        shared: what of it R-workers have already, where that is something; layout: parts that have more of it.
        """
        workers = self._open(prospect, is_urgent, shared)
        most = max((shared[w].num_tokens for w in workers if w in shared), default=0)
        if DEVICE in workers and layout is None and shared.get(DEVICE, _NOT_SHARED).num_tokens >= most:
            is_long = bool(self._placement and self._placement.is_long(_share(prospect)))
            if most or not is_long or workers == [DEVICE]:
                return whole_on(DEVICE)
        if parts := self._as_there(prospect, layout) or self._divided(prospect, shared):
            return parts if not self._started or self._may_start(prospect, is_urgent) else None
        worker = self._credits.lightest([w for w in workers if w != DEVICE] or workers, prospect.mean, shared)
        return None if worker is None else whole_on(worker)

    def _open(self, prospect: Prospect, is_urgent: bool, shared: Mapping[int, Shared]) -> list[int]:
        """R-workers, and the device, that it could start on in this step."""
        workers = self._credits.fitting(prospect.limit, prospect.max_kv_tokens, shared)
        if self._placement:
            planned = self._planned(self._placement, prospect, workers)
            workers = planned if planned or (self._started and not is_urgent) else workers
        if self._started:
            workers = [w for w in workers if w == DEVICE or self._within_limit(prospect, shared.get(w, _NOT_SHARED))]
        if self._started and not is_urgent:
            if not self._batch_open:
                return []
            workers = [w for w in workers if self._keeps_pace(prospect, w, shared.get(w, _NOT_SHARED))]
        return workers

    def _as_there(self, prospect: Prospect, layout: Layout | None) -> tuple[Part, ...] | None:
        """The layout's parts, if there is one, and room; perhaps with one more behind them."""
        num_tokens = min(prospect.limit.last, prospect.max_kv_tokens)
        return layout and self._credits.extended(layout.parts, num_tokens, layout.num_used)

    def _divided(self, prospect: Prospect, shared: Mapping[int, Shared]) -> tuple[Part, ...] | None:
        """Its parts, if it is to be divided and there is room for them; the first one where most of it is."""
        num_tokens = min(prospect.limit.last, prospect.max_kv_tokens)
        first = max(shared, key=lambda worker: shared[worker].num_tokens, default=None)
        if not self._credits.fits_one(num_tokens):
            return self._credits.parts(num_tokens, 1, first)
        if self._min_part_tokens is None or num_tokens < 2 * self._min_part_tokens:
            return None
        tokens = self._credits.tokens
        num_others = sum(capacity > 0 for capacity in self._credits.capacity_tokens) - 1
        others = sum(tokens) + max(0, self._waiting_kv_tokens - prospect.max_kv_tokens)
        if num_others * num_tokens <= others:
            return None
        parts = self._credits.parts(num_tokens, self._min_part_tokens, first)
        if parts is None or len(parts) == 1:
            return None
        if first is not None and (parts[0].r_worker != first or parts[1].first_token < shared[first].num_tokens):
            return None  # something that is there would have to be computed again
        return parts

    def _may_start(self, prospect: Prospect, is_urgent: bool) -> bool:
        """Beside others, in parts."""
        if self._placement and not is_urgent:
            some = next(worker for worker in self._credits.capacities if worker != DEVICE)
            if not self._placement.allowed([some], _share(prospect), self._could_be_on_device(prospect)):
                return False
        return (self._batch_open or is_urgent) and self._within_limit(prospect, _NOT_SHARED)

    def _plan(self, placement: Placement, first: Prospect | None, num_in_all: int, num_seats: int) -> None:
        """Where what runs and waits is best kept, as far as it is another place than before."""
        on_device, _, num_r_workers = self._memory
        room = Room(on_device, self._limit, num_r_workers, min(num_in_all, num_seats), num_in_all)
        if placement.begin_step(first and (first.mean or first.limit), room):
            self.measure_memory()

    def _planned(self, placement: Placement, prospect: Prospect, workers: list[int]) -> list[int]:
        """Of those where it fits the ones that are to have it."""
        is_for_device, share = self._could_be_on_device(prospect), _share(prospect)
        if not placement.is_long(share):  # that one does not fit tells little of the others
            if is_for_device and DEVICE not in workers:
                placement.full(is_device=True)
            if workers in ([], [DEVICE]) and self._credits.fits_one(prospect.max_kv_tokens):
                placement.full(is_device=False)
        return placement.allowed(workers, share, is_for_device)

    def _could_be_on_device(self, prospect: Prospect) -> bool:
        return self._credits.capacities.get(DEVICE, 0) >= prospect.max_kv_tokens

    def start(
        self,
        seq_id: int,
        parts: tuple[Part, ...],
        prospect: Prospect,
        changes: Changes = (),
        unpaid: Mapping[int, int] = _NO_BLOCKS,
    ) -> None:
        """changes: R-worker, and what it changes for the others that run there; unpaid: R-worker -> of its blocks there
        those that are part of another's demand.
        """
        num_tokens, worker = prospect.limit.first, parts[0].r_worker
        prospect = prospect.less(self._credits.tokens_of(sum(unpaid.values())))
        cost = self._cost(prospect, worker) if len(parts) == 1 else None
        if cost is not None:
            self._streams[self._key(worker)].spend(cost)
        if prospect.mean is not None and self._policy == "steady":
            self._recent.add(prospect.prediction)
        self._credits.start(seq_id, parts, prospect.limit, num_tokens, num_shared(changes), unpaid)
        if self._total is not None and worker != DEVICE:
            self._total.add(prospect.limit)
        self._started[seq_id] = _Started(worker, prospect.limit, cost, prospect.max_kv_tokens)
        if self._placement:
            self._placement.start(seq_id, worker == DEVICE, _share(prospect))
        self._max_kv_tokens += prospect.max_kv_tokens
        self._pay(changes)

    def close_batch(self) -> None:
        """Nobody else could start though there was budget left: a batch that starts at once is complete."""
        self._batch_open = self._policy != "at-once"

    def extend(self, seq_id: int, steps: int) -> None:
        """A sequence has outlived its prediction by so many steps."""
        demand = self._started[seq_id].demand
        self._change(seq_id, demand._replace(end=demand.end + steps))
        if self._placement:
            self._placement.change(seq_id, Share.of(self._started[seq_id].demand))

    def end(self, seq_id: int, changes: Changes = ()) -> None:
        """It has ended, by itself or not; the step at hand was its last, or the one before.

        changes: R-worker, and what that changes for the others that run there.
        """
        started = self._started.pop(seq_id)
        self._max_kv_tokens -= started.max_kv_tokens
        if self._total is not None and started.worker != DEVICE:
            self._total.remove(started.demand)
        self._credits.end(seq_id, num_shared(changes))
        if self._placement:
            self._placement.end(seq_id)
        self._pay(changes)
        if started.spent is not None:
            took = self._measured(started.demand._replace(end=max(self._step, started.demand.start)))
            stream = self._streams[self._key(started.worker)]
            stream.settle(started.spent, stream.cost(took))

    def _pay(self, changes: Changes) -> None:
        """Whose demand the blocks are part of that others have, too: one of theirs."""
        for worker, change in changes:
            for seq_id, blocks in change.paid.items():
                demand = self._started[seq_id].demand
                num_tokens = self._credits.tokens_of(blocks)
                self._change(seq_id, demand._replace(first=demand.first + num_tokens), {worker: blocks})
                if self._placement:
                    self._placement.grow(seq_id, num_tokens)

    def _change(self, seq_id: int, demand: Demand, paid: Mapping[int, int] = _NO_BLOCKS) -> None:
        started = self._started[seq_id]
        if self._total is not None and started.worker != DEVICE:
            self._total.remove(started.demand)
            self._total.add(demand)
        self._credits.change(seq_id, demand, paid)
        self._started[seq_id] = started._replace(demand=demand)

    def check_integrity(self) -> None:
        read = [started for started in self._started.values() if started.worker != DEVICE]
        assert self._total is None or len(self._total) == len(read)
        if self._placement:
            self._placement.check_integrity(self._started)
        assert self._max_kv_tokens == sum(started.max_kv_tokens for started in self._started.values())

    def _within_limit(self, prospect: Prospect, shared: Shared) -> bool:
        if not self._total or self._max_kv_load is None:
            return True  # or nothing is read
        own = prospect.limit.sharing(self._credits.tokens_of(shared.num_blocks), shared.until)
        return max(map(self._total.peak, own)) <= self._max_kv_load

    def _keeps_pace(self, prospect: Prospect, worker: int, shared: Shared) -> bool:
        cost = self._cost(prospect.less(self._credits.tokens_of(shared.num_blocks)), worker)
        return cost is None or self._streams[self._key(worker)].allows(cost)

    def _cost(self, prospect: Prospect, worker: int) -> float | None:
        """What the R-worker's stream takes for it; None if it is not asked."""
        stream = self._streams.get(self._key(worker))
        if not self._paced or prospect.mean is None or stream is None:
            return None
        return stream.cost(self._measured(prospect.mean))

    def _key(self, worker: int) -> int | None:
        """Of its stream.  Where R-workers have one together, the device has none."""
        return worker if self._by_memory or worker == DEVICE else None

    def _measured(self, demand: Demand) -> Demand:
        """In the units of the limit: where memory sets it, part of that goes to blocks half full."""
        return demand if self._limit == self._max_kv_load else self._credits.with_slack(demand)


def _share(prospect: Prospect) -> Share:
    return Share.of(prospect.mean or prospect.limit)


def num_shared(changes: Changes) -> dict[int, int]:
    """R-worker -> blocks of a sequence that others have, too."""
    return {worker: change.num_shared for worker, change in changes}
