"""The R-workers' load in the steps to come, and when one more sequence may start.  Pure: steps are its only clock.

The load W of a step is the sum of the live sequences' KV tokens: what the R-workers read in it, and hold.

    W ▲            all started at once                    started in a steady stream
      │           ╱│      ╱│      ╱│
      │         ╱  │    ╱  │    ╱  │                        ╱▔▔▔▔▔▔▔▔▔▔▔▔▔▔▔   about half
      │       ╱    │  ╱    │  ╱    │                      ╱
      │     ╱      │╱      │╱      │                    ╱
      └────────────────────────────► step             └────────────────────────► step

A sequence that starts in step s with a prompt of p tokens and decodes in n steps reads p + 1, p + 2, ... p + n tokens
in the steps s ... s + n - 1.  While all that are live go on the load only grows, so it has its maxima where sequences
end: the exact check (the paper's section 4.2 mended for unequal lengths and prompts) looks at those steps alone.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import numpy as np


class Demand(NamedTuple):
    """What one sequence reads: `first` tokens in step `start`, one more in each step, the last time in step `end`."""

    start: int
    end: int
    first: int

    def at(self, step: int) -> int:
        return self.first + step - self.start if self.start <= step <= self.end else 0

    def sharing(self, num_tokens: int, until: int) -> list[Demand]:
        """What is its own if another one reads so many of its tokens for it, up to the step `until`."""
        if not num_tokens:
            return [self]
        own = self._replace(end=min(self.end, until), first=self.first - num_tokens)
        rest = self._replace(start=until + 1, first=self.first + until + 1 - self.start)
        return [part for part in (own, rest) if part.start <= part.end]

    @property
    def last(self) -> int:
        """What it reads in its last step."""
        return self.at(self.end)

    @property
    def area(self) -> int:
        """Tokens read in all its steps together."""
        steps = self.end - self.start + 1
        return steps * self.first + steps * (steps - 1) // 2


class Shared(NamedTuple):
    """Of a sequence that is to start somewhere, what is there already."""

    num_tokens: int = 0  # in all: they need not be computed
    num_blocks: int = 0  # of them those that running sequences hold,
    until: int = 0  # up to about this step


class Projection:
    """The load that live sequences will make, exactly, if each ends where its demand says.

    Where many sequences run, many end in the same step: what it costs to ask or to change something grows with the
    number of different ends, not of sequences, and is a few sums over arrays.  Who start together mostly ask the
    same, so the last answer is kept until something changes.
    """

    def __init__(self) -> None:
        self._ends: list[int] = []  # the different ones, rising
        # Of each of them [end, how many live sequences end there or later, the sum of their offsets], and zeros behind
        # the last one.  A live sequence's tokens in step t are offset + t.
        self._table = np.zeros((3, 16), np.int64)
        self._demands: dict[tuple[int, int], int] = {}  # (end, offset) -> how many there are
        self._peak: tuple[Demand, int] | None = None  # that was asked for last; None: something has changed since
        self._mean: tuple[tuple[int, int], float] | None = None  # likewise

    def __len__(self) -> int:
        return int(self._table[1, 0])

    def add(self, demand: Demand) -> None:
        index, offset = self._index(demand.end), demand.first - demand.start
        if index == len(self._ends) or self._ends[index] != demand.end:
            self._open(index, demand.end)
        self._table[1, : index + 1] += 1
        self._table[2, : index + 1] += offset
        self._demands[demand.end, offset] = self._demands.get((demand.end, offset), 0) + 1
        self._peak = self._mean = None

    def remove(self, demand: Demand) -> None:
        """One that was added: it ended, sooner than it might have, or its end is seen differently now."""
        index, offset = self._index(demand.end), demand.first - demand.start
        same = self._demands.pop((demand.end, offset), 0)
        assert same, "this demand is not in the projection"
        if same > 1:
            self._demands[demand.end, offset] = same - 1
        counts = self._table[1]
        counts[: index + 1] -= 1
        self._table[2, : index + 1] -= offset
        if counts[index] == counts[index + 1]:
            self._close(index)
        self._peak = self._mean = None

    def at(self, step: int) -> int:
        """The load of a step that is not before any live sequence's start."""
        _, count, offset = self._table[:, self._index(step)].tolist()
        return int(offset + step * count)

    def mean(self, begin: int, end: int) -> float:
        """The average load of the steps `begin` to `end`, which are not before any live sequence's start."""
        if self._mean and self._mean[0] == (begin, end):
            return self._mean[1]
        first, last = self._index(begin), self._index(end)
        # The same sequences are live from behind each end up to the next one.
        bounds = np.empty(last - first + 2, np.int64)
        bounds[0], bounds[1:-1], bounds[-1] = begin - 1, self._table[0, first:last], end
        before, ends = bounds[:-1], bounds[1:]
        _, counts, offsets = self._table[:, first : last + 1]
        # Of a stretch its steps' numbers make steps * (first + last of them) / 2.
        area = int((ends - before) @ (2 * offsets + counts * (before + 1 + ends)))
        mean = area / 2 / (end - begin + 1)
        self._mean = (begin, end), mean
        return mean

    def peak(self, new: Demand) -> int:
        """The largest load of the steps in which `new` would be live, its own included."""
        if self._peak and self._peak[0] == new:
            return self._peak[1]
        first, last = self._index(new.start), self._index(new.end + 1)
        largest = self.at(new.end) + new.end
        if first < last:
            ends, counts, offsets = self._table[:, first:last]  # where the load has its maxima
            largest = max(largest, int((ends * (counts + 1) + offsets).max()))
        peak = largest + new.first - new.start
        self._peak = new, peak
        return peak

    def _index(self, step: int) -> int:
        """The first end that is not before `step`."""
        return bisect_left(self._ends, step)

    def _open(self, index: int, end: int) -> None:
        """A column for an end where nobody ends yet."""
        self._ends.insert(index, end)
        size = len(self._ends)
        if size == self._table.shape[1]:
            self._table = np.concatenate((self._table, np.zeros_like(self._table)), axis=1)
        self._table[:, index + 1 : size] = self._table[:, index : size - 1]
        self._table[0, index] = end  # as many end there or later as at the next one

    def _close(self, index: int) -> None:
        del self._ends[index]
        size = len(self._ends)
        self._table[:, index : size + 1] = self._table[:, index + 1 : size + 2]


class SteadyStream:
    """Starts sequences no faster than a load of `limit` can keep up with for ever.

    In the steady state the tokens read per step equal those that starting sequences will read: every step earns
    `limit` tokens, and a start costs its demand's area.  Where sequences start every F steps only, the load of F - 1
    of them is below the peak by what the live ones have yet to grow, (F - 1) / 2 tokens each on average, so a start
    costs that much more for each of its steps.  For n steps each and no prompts this is the paper's schedule exactly:

        earned in F steps / cost = F · B(S + F)/2 / (S(S + F)/2) = B·F/S = M        (equations 5 and 6)

    The first S steps are its ramp.  Without it the check alone lets everything that fits start at once, and the load
    saw-tooths for ever, unless lengths differ.
    """

    def __init__(self, limit: int, interval: int = 1) -> None:
        """limit: in tokens, may change on the way; interval: F, the steps from one start to the next."""
        self.limit, self._interval = limit, interval
        self._credit = 0.0
        self._earned = -1  # the step in which it earned last

    def cost(self, demand: Demand) -> float:
        """In tokens times steps.  Where one costs more than an interval earns, starts are further apart than that."""
        steps = demand.end - demand.start + 1
        cost = demand.area + steps * (self._interval - 1) / 2
        if cost > self.limit * self._interval and steps <= self.limit:
            cost = (demand.area - steps / 2) / (1 - steps / (2 * self.limit))  # cost = area + steps (cost/limit - 1)/2
        return cost

    def earn(self, step: int, next_cost: float) -> None:
        """To be called once in every step, before anything starts, with the cost of whoever waits in front.

        What is not spent is kept for one start only: starts that make up for others would make a burst, and another
        when they end.
        """
        if step % self._interval == 0 and step != self._earned:
            self._earned = step
            earned = float(self.limit * self._interval)
            self._credit = min(self._credit + earned, earned + next_cost)

    def allows(self, cost: float) -> bool:
        return self._credit >= cost

    def spend(self, cost: float) -> None:
        self._credit -= cost

    def forgive(self) -> None:
        """Nothing runs: what a sequence that started in any case has cost too much is not owed by the next."""
        self._credit = max(self._credit, 0.0)

    def settle(self, spent: float, cost: float) -> None:
        """One that was started for `spent` turned out to cost `cost`: it ended early, or outlived its prediction."""
        self._credit += spent - cost
