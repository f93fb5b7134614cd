"""A limit on what one line of the program can write to a log, whoever makes it run in a loop.

For handlers, so that it holds for libraries' lines, too: a full table of file descriptors makes asyncio write a hundred
thousand lines in five seconds.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

BURST = 50  # lines of one place in the code that are written at once
PER_SECOND = 1.0  # and afterwards
_MAX_PLACES = 10_000  # names of files and numbers of lines: the program's own, but an eval may make some


class LogLimit(logging.Filter):
    """Lets through `BURST` records of each place in the code, then one a second, with the number of those left out."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._lock = threading.Lock()
        self._places: dict[tuple[str, int], _Place] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = self._clock()
        with self._lock:
            if len(self._places) > _MAX_PLACES:
                self._places.clear()
            place = self._places.setdefault((record.pathname, record.lineno), _Place(now))
            place.tokens = min(float(BURST), place.tokens + (now - place.last_s) * PER_SECOND)
            place.last_s = now
            if place.tokens < 1:
                place.num_left_out += 1
                return False
            place.tokens -= 1
            num_left_out, place.num_left_out = place.num_left_out, 0
        if num_left_out:
            record.msg = f"{record.getMessage()} (and {num_left_out} like this that were left out)"
            record.args = ()
        return True


class _Place:
    def __init__(self, now: float) -> None:
        self.tokens, self.last_s, self.num_left_out = float(BURST), now, 0


def limited_handler() -> logging.Handler:
    """To standard error, for a program's `logging.basicConfig`; a library leaves handlers to its user."""
    handler = logging.StreamHandler()
    handler.addFilter(LogLimit())
    return handler
