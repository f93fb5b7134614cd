"""An exception between any two instructions, as a signal's handler raises it, made certain."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).parents[1]


class Interrupted(KeyboardInterrupt):
    """Ours, and not that of somebody who wants the tests to end."""


def run_until(number: int, action: Callable[[], object], *files: str, by: str = "opcode") -> bool:
    """Runs `action`; the `number`-th instruction (or ``line``, from 0) of what lies under `files` raises `Interrupted`.

    Whether that came to pass.  What the action itself makes of it is its own affair.
    """
    places = tuple(str(ROOT / file) for file in files)
    count, is_here = 0, dict[CodeType, bool]()

    def inside(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if event == by:
            count += 1
            if count == number + 1:
                sys.settrace(None)
                raise Interrupted
        return inside

    def called(frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code not in is_here:
            is_here[code] = code.co_filename.startswith(places)
        if not is_here[code]:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = by == "opcode", by == "line"
        return inside

    before = sys.gettrace()
    sys.settrace(called)
    try:
        action()
    except Interrupted:
        pass
    finally:
        sys.settrace(before)
    return count > number
