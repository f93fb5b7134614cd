"""R-workers that were lost and what is still to be told to those that are left.  Only notes; the engine acts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from fastdecode.errors import RWorkerError


class Losses:
    def __init__(self) -> None:
        self.unsettled: set[tuple[int, int]] = set()  # (R-worker, sequence) that may or may not know of their end
        self.is_restless = False  # a recovery was begun and has not ended
        self._noted: deque[RWorkerError] = deque()
        self._final: RWorkerError | None = None

    @property
    def is_final(self) -> bool:
        """No R-worker is left."""
        return self._final is not None

    def note(self, error: RWorkerError, unsettled: Iterable[tuple[int, int]]) -> None:
        self._noted.append(error)
        self.unsettled.update(unsettled)

    def next(self) -> RWorkerError | None:
        """The oldest one that was not dealt with.  Raises the final one, for ever."""
        if self._final:
            raise self._final
        return self._noted.popleft() if self._noted else None

    def end(self, error: RWorkerError) -> None:
        """This was the last R-worker."""
        self._final = error
