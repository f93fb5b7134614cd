"""Who is kept on the S-worker's device, who on R-workers, and over how many lanes a step goes.  Pure.

By the times of a block, X tokens come per second of n_D sequences on the device and n_R on R-workers:

    X(n_D, n_R, lanes) = (n_D + n_R) / seconds of a step

    one lane     S-work │ max(attention on the device, R-work)          GPU-only where n_R = 0
    more         the busier of S-worker and R-workers sets the pace     S-work for smaller batches, which takes longer

The plan is where X is largest: looked for among all pairs that memory and those who wait allow, for what starts now is
like what started before.  From it come the device's and the R-workers' limits, in KV tokens as they are on average over
a sequence's life; the second is W_lim, which hides under the device's work.  A limit that memory sets first is none.

      n_R ▲ memory of R-workers                   CPUs have much to give: all of it, the device perhaps nothing
          │     ·X                                both full, or up to where R-work is as long as S-work
          │            ·X                         CPUs have less than their messages cost: n_R = 0
          └───────────────► n_D

Greedy choices, one sequence at a time, do not get there: the first one on R-workers pays for all messages, many
together may be worth it.  A plan is kept until another one is better by `_WORTH_A_CHANGE`, so that nothing flips.

What is kept on R-workers moves to the device once that has room for all of it, nobody waits, and the steps to come are
so much faster as to pay for computing it again.  The other way goes who is thrown out where memory is short.

Where both have room, what is longer than others goes to R-workers: a row's way there and back costs the same for all.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fastdecode.scheduling.load import Demand
from fastdecode.scheduling.parts import DEVICE
from fastdecode.scheduling.recent_starts import RECENT
from fastdecode.scheduling.times import LaneWork, Times

_WORTH_A_CHANGE = 1.03  # of tokens per second
_LANES_DWELL = 16  # rounds, at least, between two changes of the lanes, and steps between two looks at a move
_FORGOTTEN = 0.05  # of what memory held, each time it held less
_SURELY = 2.0  # times a move's cost is what it has to bring
_SAME = math.log(1.2)  # what differs by less is no reason for another plan
_SLACK = 1.03  # of a limit, for lengths that are not the same
_COARSE = (5, 9)  # pairs looked at first
_FINE = 5
_MOST_PLANS = 256  # kept, for what comes back


class Share(NamedTuple):
    """What a sequence asks for in a step, on average over its life."""

    kv_tokens: float
    num_tokens: float  # through the S-Part: its prompt's, too

    @classmethod
    def of(cls, demand: Demand) -> Share:
        steps = demand.end - demand.start + 1
        return cls(demand.area / steps, 1 + demand.first / steps)


class Room(NamedTuple):
    """KV tokens that there are, and who could run."""

    device: float
    r_workers: float
    num_r_workers: int
    num_sequences: int  # that run, or could if there were room
    num_in_all: int  # those too that there are no seats for

    @property
    def margin(self) -> float:
        """By how much R-workers have to be worth more than the device alone.  They are planned for the steady state,
        and pay less while a batch begins and ends: of a short one that is a large part.
        """
        return 1.05 + round(0.05 * self.num_sequences / max(1, self.num_in_all), 2)


class Moved(NamedTuple):
    """Of a sequence that could go elsewhere."""

    num_tokens: int  # to compute again
    num_steps: int  # that it is expected to take


class Plan(NamedTuple):
    device: float  # KV tokens, at most
    r_workers: float  # of all together: W_lim
    tokens_per_s: float


def step_seconds(
    times: Times, num_r_workers: int, num_lanes: int, num_on_device: float, num_on_r_workers: float, share: Share
) -> float:
    """Of so many sequences alike, spread evenly."""
    lane = LaneWork(
        (num_on_device + num_on_r_workers) * share.num_tokens / num_lanes,
        num_on_r_workers * share.kv_tokens / num_lanes,
        num_on_device * share.kv_tokens / num_lanes,
        num_on_r_workers * (1 + (share.num_tokens - 1) / 2) / num_lanes,
    )
    return times.step_seconds([lane] * num_lanes, num_r_workers)


def tokens_per_s(
    times: Times, num_r_workers: int, most_lanes: int, num_on_device: float, num_on_r_workers: float, share: Share
) -> float:
    """X, over as many lanes as are best."""
    if num_on_device + num_on_r_workers <= 0:
        return 0.0
    choices = {1, most_lanes} if num_on_r_workers else {1}
    seconds = min(
        step_seconds(times, num_r_workers, lanes, num_on_device, num_on_r_workers, share) for lanes in choices
    )
    return (num_on_device + num_on_r_workers) / seconds


def best_plan(times: Times, most_lanes: int, room: Room, share: Share) -> Plan:
    """Where X is largest.  A limit that is not reached by what memory holds is infinite.

    Rather all on the device than something that is hardly better; and rather all on R-workers, or both full, which
    need no limit, than a pair between them.
    """
    most_device = min(room.num_sequences, room.device / share.kv_tokens)
    most_r = min(room.num_sequences, room.r_workers / share.kv_tokens) if room.num_r_workers else 0.0
    if most_device + most_r <= 0:
        return Plan(math.inf, math.inf, 0.0)

    def look(on_device: Iterable[float], on_r_workers: Sequence[float]) -> tuple[float, float, float]:
        pairs = [(device, min(r, room.num_sequences - device)) for device in on_device for r in on_r_workers]
        return max((tokens_per_s(times, room.num_r_workers, most_lanes, *pair, share), *pair) for pair in pairs)

    x, device, r_workers = look([most_device], [0.0])
    full = look([0.0, most_device], [most_r])
    if full[0] > room.margin * x:
        x, device, r_workers = full
    steps = [most / (number - 1) for most, number in zip((most_device, most_r), _COARSE, strict=True)]
    best = look(*(_spread(0, most, number) for most, number in zip((most_device, most_r), _COARSE, strict=True)))
    for _ in range(2):
        around = [
            _spread(max(0.0, at - step), min(most, at + step), _FINE)
            for at, step, most in zip(best[1:], steps, (most_device, most_r), strict=True)
        ]
        best = max(best, look(*around))
        steps = [step / (_FINE - 1) * 2 for step in steps]
    if best[0] > (_WORTH_A_CHANGE if r_workers else room.margin) * x:
        x, device, r_workers = best
    return Plan(
        math.inf if device >= most_device - 0.5 else _SLACK * device * share.kv_tokens,
        math.inf if r_workers >= most_r - 0.5 and most_r else _SLACK * r_workers * share.kv_tokens,
        x,
    )


def _spread(low: float, high: float, number: int) -> list[float]:
    return [low + (high - low) * i / (number - 1) for i in range(number)] if high > low else [low]


class Placement:
    """Keeps the plan, and what runs by it."""

    def __init__(self, times: Times, most_lanes: int) -> None:
        self._times, self._most_lanes = times, most_lanes
        self._shares: dict[int, tuple[bool, Share]] = {}  # sequence -> whether it is on the device
        self._counts = {True: 0, False: 0}  # by that,
        self._kv = {True: 0.0, False: 0.0}  # and tokens on average
        self._num_tokens = 0.0  # through the S-Part in a step, likewise
        self._recent: deque[Share] = deque(maxlen=RECENT)
        self._sums = [0.0, 0.0]  # of the recent ones
        self._full_at: dict[bool, float] = {}  # where memory let nobody else in
        self._num_started = 0
        self._seen: tuple[Room, int] | None = None  # when a plan was thought of last
        self._made_for: tuple[float, ...] = ()
        self._plans: dict[tuple[float, ...], Plan] = {}  # lately, by what they were made for
        self._plan = Plan(math.inf, math.inf, 0.0)
        self.num_plans = 0  # made, the first one too
        self._num_lanes, self._rounds_before = 1, _LANES_DWELL
        self._steps_unmoved = 0

    @property
    def plan(self) -> Plan:
        return self._plan

    @property
    def num_on_r_workers(self) -> int:
        """Sequences."""
        return self._counts[False]

    def begin_step(self, first: Demand | None, room: Room) -> bool:
        """Makes another plan if things have changed; whether it did.  first: of who would start first.

        Mostly nobody has started since, or ended, or nobody waits and nothing could move: there is nothing to plan.
        """
        seen = room, self._num_started
        if (seen == self._seen and self._recent) or (first is None and not self._counts[False]):
            return False
        self._seen = seen
        share = self._typical(first)
        if share is None or not room.device:  # or there is nothing to choose
            return False
        room = room._replace(
            device=min(room.device, self._full_at.get(True, math.inf)),
            r_workers=min(room.r_workers, self._full_at.get(False, math.inf)),
        )
        key = (room.margin, *(round(math.log(max(x, 1)) / _SAME) for x in (*room[:-1], *share)))
        if key == self._made_for:
            return False
        self._made_for = key
        if key not in self._plans:
            if len(self._plans) == _MOST_PLANS:
                self._plans.clear()
            self._plans[key] = best_plan(self._times, self._most_lanes, room, share)
        plan = self._plans[key]
        if plan.tokens_per_s > _WORTH_A_CHANGE * self._worth(room, share):
            self._plan = plan
            self.num_plans += 1
            return True
        return False

    def allowed(self, workers: Iterable[int], share: Share, is_for_device: bool) -> list[int]:
        """Of these, R-workers or the device, those that the plan has room on.

        is_for_device: it could start there at another time.  Who could not has R-workers alone, whatever the plan is.
        """
        half = share.kv_tokens / 2
        on_device = self._kv[True] + half <= self._plan.device
        on_r_workers = self._kv[False] + half <= self._plan.r_workers or not is_for_device
        return [worker for worker in workers if (on_device if worker == DEVICE else on_r_workers)]

    def is_long(self, share: Share) -> bool:
        """Longer than most, so that R-workers come first."""
        typical = self._typical(None)
        return typical is not None and share.kv_tokens > 1.1 * typical.kv_tokens

    def full(self, is_device: bool) -> None:
        """Memory had no room for one more there.  Who needs much finds it full early: so the most counts, for long."""
        if not self._counts[is_device]:
            return
        kv, before = self._kv[is_device], self._full_at.get(is_device, 0.0)
        self._full_at[is_device] = max(kv, before - _FORGOTTEN * (before - kv))

    def forget_full(self) -> None:
        """Memory is another one."""
        self._full_at.clear()
        self._seen = None

    def grow(self, seq_id: int, num_tokens: int) -> None:
        """So many that were another's are read for it now."""
        _, share = self._shares[seq_id]
        self.change(seq_id, share._replace(kv_tokens=share.kv_tokens + num_tokens))

    def start(self, seq_id: int, is_device: bool, share: Share) -> None:
        if len(self._recent) == RECENT:
            self._count_recent(self._recent[0], -1)
        self._num_started += 1
        self._recent.append(share)
        self._count_recent(share, 1)
        self._add(seq_id, is_device, share)
        if self._kv[is_device] > self._full_at.get(is_device, math.inf):
            self._full_at[is_device] = self._kv[is_device]

    def change(self, seq_id: int, share: Share) -> None:
        """It lives longer than was thought."""
        is_device, _ = self._shares[seq_id]
        self.end(seq_id)
        self._add(seq_id, is_device, share)

    def end(self, seq_id: int) -> None:
        is_device, share = self._shares.pop(seq_id)
        self._counts[is_device] -= 1
        self._kv[is_device] -= share.kv_tokens
        self._num_tokens -= share.num_tokens
        if not self._counts[is_device]:
            self._full_at.pop(is_device, None)
        if not self._shares:
            self._kv, self._num_tokens = {True: 0.0, False: 0.0}, 0.0  # without what rounding has left

    def num_lanes(self, device_kv_tokens: int, load: int, num_r_workers: int) -> int:
        """Over how many the coming step is to go.  To be asked once in a round.

        device_kv_tokens, load: read in it, of R-workers as many times the fullest one as there are of them.
        """
        self._rounds_before += 1
        num_r_rows, seconds = self._counts[False], {}
        if self._most_lanes == 1 or not self._shares or self._rounds_before < _LANES_DWELL:
            return self._num_lanes
        if not num_r_rows and self._num_lanes == 1:
            return 1
        for lanes in (1, self._most_lanes):
            work = LaneWork(self._num_tokens / lanes, load / lanes, device_kv_tokens / lanes, num_r_rows / lanes)
            seconds[lanes] = self._times.step_seconds([work] * lanes, num_r_workers)
        other = 1 if self._num_lanes > 1 else self._most_lanes
        if _WORTH_A_CHANGE * seconds[other] < seconds[self._num_lanes]:
            self._num_lanes, self._rounds_before = other, 0
        return self._num_lanes

    def looks_for_moves(self) -> bool:
        """Whether this step is one to look for a move in: now and then, while something is on R-workers and the plan
        has nothing there.  To be asked once in a step.
        """
        self._steps_unmoved += 1
        if self._plan.r_workers or not self._counts[False] or self._steps_unmoved < _LANES_DWELL:
            return False
        self._steps_unmoved = 0
        return True

    def is_worth_moving(
        self, moved: Sequence[Moved], device_kv_tokens: int, load: int, num_r_workers: int, budget: int
    ) -> bool:
        """Whether all that runs on R-workers is better computed again on the device, nobody waiting.

        device_kv_tokens, load: as in `num_lanes`; budget: tokens of a step, by which they would come anew.

            the steps to come are faster by so much · how many there are   >   2 · the steps that compute them
        """
        num_tokens = sum(one.num_tokens for one in moved)
        lane = LaneWork(self._num_tokens, load, device_kv_tokens, len(moved))
        lanes = [LaneWork(*(value / self._num_lanes for value in lane))] * self._num_lanes
        now = self._times.step_seconds(lanes, num_r_workers)
        then = self._times.step_seconds([LaneWork(self._num_tokens, 0, device_kv_tokens + num_tokens)], num_r_workers)
        cost = self._times.step_seconds([LaneWork(budget)], num_r_workers) * num_tokens / budget
        steps = sum(one.num_steps for one in moved) / len(moved)
        return (now - then) * steps > _SURELY * cost

    def check_integrity(self, running: Iterable[int]) -> None:
        assert self._shares.keys() == set(running)
        for is_device in (True, False):
            there = [share for where, share in self._shares.values() if where == is_device]
            kv = sum(share.kv_tokens for share in there)
            assert self._counts[is_device] == len(there)
            assert math.isclose(self._kv[is_device], kv, rel_tol=1e-6, abs_tol=1e-3)
        num_tokens = sum(share.num_tokens for _, share in self._shares.values())
        assert math.isclose(self._num_tokens, num_tokens, rel_tol=1e-6, abs_tol=1e-3)

    def _worth(self, room: Room, share: Share) -> float:
        """X of the plan there is, as things are now."""
        if not self.num_plans:
            return 0.0
        device = min(room.num_sequences, min(self._plan.device, room.device) / share.kv_tokens)
        r_workers = min(room.num_sequences - device, min(self._plan.r_workers, room.r_workers) / share.kv_tokens)
        if not room.num_r_workers:
            r_workers = 0.0
        return tokens_per_s(self._times, room.num_r_workers, self._most_lanes, device, r_workers, share)

    def _typical(self, first: Demand | None) -> Share | None:
        n = len(self._recent)
        if n:
            return Share(self._sums[0] / n, self._sums[1] / n)
        return Share.of(first) if first else None

    def _count_recent(self, share: Share, sign: int) -> None:
        self._sums = [total + sign * value for total, value in zip(self._sums, share, strict=True)]

    def _add(self, seq_id: int, is_device: bool, share: Share) -> None:
        self._shares[seq_id] = is_device, share
        self._counts[is_device] += 1
        self._kv[is_device] += share.kv_tokens
        self._num_tokens += share.num_tokens
