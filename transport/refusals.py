"""Who was refused and why, in the log: once for each peer and cause, so that no peer can fill a disk with it."""

from __future__ import annotations

import logging

MAX_REFUSALS = 200  # that are told apart
_MAX_TEXT = 300


class Refusals:
    """One for each room that refuses, and one thread at a time."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._told: set[tuple[str, str]] = set()

    def tell(self, text: str, origin: str = "") -> None:
        """text: may hold what a peer wrote.  origin: its network address, where it has one."""
        text = text[:_MAX_TEXT].encode("unicode_escape").decode()  # on one line, whatever came
        if (origin, text) in self._told or len(self._told) > MAX_REFUSALS:
            return
        self._told.add((origin, text))
        if len(self._told) > MAX_REFUSALS:
            self._logger.warning("%d different refusals were told; further ones are not", MAX_REFUSALS)
        else:
            self._logger.warning("%s%s (told once)", f"{origin}: " if origin else "", text)
