"""How long an R-worker may take for an answer before it counts as lost: many times what it has taken so far.

A process that is gone, stopped or cut off is seen by the transport.  This is for one that lives and does not answer:
a kernel that hangs, a message that was swallowed on the way.  A false alarm costs what a loss does, and loses nothing.
"""

from __future__ import annotations

_LEAST_S = 1.5  # an answer takes milliseconds; a machine that swaps or is shared with others takes longer now and then
_TIMES = 10.0  # contexts grow by a token a step, so no answer takes much longer than the one before
_ENOUGH = 16  # answers that tell; the first ones are slow for reasons of their own
_FADES = 0.999  # what a slow answer counts for after the next


class Patience:
    def __init__(self, most_s: float) -> None:
        """most_s: what is waited for the first answers, and never exceeded."""
        self._most_s = most_s
        self._num_answers = 0
        self._slowest_s = 0.0

    @property
    def seconds(self) -> float:
        if self._num_answers < _ENOUGH:
            return self._most_s
        return min(self._most_s, max(_LEAST_S, _TIMES * self._slowest_s))

    def took(self, seconds: float) -> None:
        """An answer came after that long."""
        self._num_answers += 1
        self._slowest_s = max(seconds, _FADES * self._slowest_s)
