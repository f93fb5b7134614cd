"""An exception between any two instructions, as a signal's handler raises it, made certain."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).parents[1]


class Interrupted(KeyboardInterrupt):
    """Ours, and not that of somebody who wants the tests to end."""


class Interruption:
    """At the `number`-th instruction (``opcode``, or ``line``), from 0, of what lies under `files`."""

    def __init__(self, number: int, files: tuple[str, ...], by: str) -> None:
        self._number, self._by = number, by
        self._places = tuple(str(ROOT / file) for file in files)
        self._is_here: dict[CodeType, bool] = {}
        self.count = 0  # until now

    @property
    def came(self) -> bool:
        return self.count > self._number

    def called(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code not in self._is_here:
            self._is_here[code] = code.co_filename.startswith(self._places)
        if not self._is_here[code] or self.came:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = self._by == "opcode", self._by == "line"
        return self._inside

    def _inside(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == self._by:
            self.count += 1
            if self.count == self._number + 1:
                raise Interrupted
        return self._inside


@contextmanager
def interrupted(number: int, *files: str, by: str = "opcode") -> Iterator[Interruption]:
    """Of this thread, in what is called within."""
    interruption, before = Interruption(number, files, by), sys.gettrace()
    sys.settrace(interruption.called)
    try:
        yield interruption
    finally:
        sys.settrace(before)


def run_until(number: int, action: Callable[[], object], *files: str, by: str = "opcode") -> bool:
    """Runs `action` until it is `interrupted`; whether it was."""
    with interrupted(number, *files, by=by) as interruption:
        try:
            action()
        except Interrupted:
            pass
    return interruption.came
