"""Things that have to agree with one another change together, or what they are about is forgotten.

An exception can come between any two lines (Ctrl-C), also between those that mend what an earlier one tore.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fastdecode.errors import RequestError, RWorkerError


class Guard:
    """Who has one hands `begin_anew` in, by which all agree again: the guard keeps nothing of its owner, so that they
    are no cycle, and a model's memory is free with the last reference to its engine.
    """

    def __init__(self) -> None:
        self.is_torn = False  # something was begun, and not ended

    @contextmanager
    def whole(self, begin_anew: Callable[[], None]) -> Iterator[None]:
        """Around whatever changes several things that have to agree with one another.

        That something was begun is written first, and unless it is ended all begins anew.  Interrupted in that, too,
        whoever calls next does it before anything else.
        """
        self.mend(begin_anew)
        self.is_torn = True
        try:
            yield
        except (RequestError, RWorkerError):  # which leave nothing half done
            self.is_torn = False
            raise
        except GeneratorExit:  # interrupted in the `with` itself: nobody is in it, and whoever calls next mends
            raise
        except BaseException:
            self.mend(begin_anew)
            raise
        self.is_torn = False

    def mend(self, begin_anew: Callable[[], None]) -> None:
        if not self.is_torn:
            return
        begin_anew()
        self.is_torn = False
