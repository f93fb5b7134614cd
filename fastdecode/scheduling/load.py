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

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Demand:
    """What one sequence reads: `first` tokens in step `start`, one more in each step, the last time in step `end`."""

    start: int
    end: int
    first: int

    def at(self, step: int) -> int:
        return self.first + step - self.start if self.start <= step <= self.end else 0

    @property
    def last(self) -> int:
        """What it reads in its last step."""
        return self.at(self.end)

    @property
    def area(self) -> int:
        """Tokens read in all its steps together."""
        steps = self.end - self.start + 1
        return steps * self.first + steps * (steps - 1) // 2


class Projection:
    """The load that live sequences will make, exactly, if each ends where its demand says."""

    def __init__(self) -> None:
        # Sorted by end; a live sequence's tokens in step t are offset + t.
        self._ends = np.empty(0, np.int64)
        self._offsets = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, demand: Demand) -> None:
        index = int(np.searchsorted(self._ends, demand.end, side="right"))
        self._ends = np.insert(self._ends, index, demand.end)
        self._offsets = np.insert(self._offsets, index, demand.first - demand.start)

    def remove(self, demand: Demand) -> None:
        """One that was added: it ended, sooner than it might have, or its end is seen differently now."""
        first, last = np.searchsorted(self._ends, [demand.end, demand.end + 1])
        [same] = np.nonzero(self._offsets[first:last] == demand.first - demand.start)
        assert len(same), "this demand is not in the projection"
        self._ends, self._offsets = (np.delete(array, first + same[0]) for array in (self._ends, self._offsets))

    def at(self, step: int) -> int:
        """The load of a step that is not before any live sequence's start."""
        live = slice(int(np.searchsorted(self._ends, step)), None)
        return int(self._offsets[live].sum()) + step * len(self._ends[live])

    def mean(self, begin: int, end: int) -> float:
        """The average load of the steps `begin` to `end`, which are not before any live sequence's start."""
        first = int(np.searchsorted(self._ends, begin))
        steps = np.minimum(self._ends[first:], end) - begin + 1
        return float((steps * (self._offsets[first:] + begin) + steps * (steps - 1) / 2).sum()) / (end - begin + 1)

    def peak(self, new: Demand) -> int:
        """The largest load of the steps in which `new` would be live, its own included."""
        ends, offsets = self._ends, self._offsets
        first, last = np.searchsorted(ends, [new.start, new.end + 1])
        steps = np.append(ends[first:last], new.end)  # where the load has its maxima
        alive = np.searchsorted(ends, steps)  # the first that is still live then
        later = np.append(np.cumsum(offsets[::-1])[::-1], 0)  # sums of the offsets from each on
        loads = later[alive] + steps * (len(ends) - alive)
        return int((loads + new.first - new.start + steps).max())


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
