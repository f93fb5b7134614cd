"""The signals that end a program, and the one way in which every command ends by them.

SIGINT, SIGTERM, SIGHUP ─► KeyboardInterrupt in the main thread ─► what was begun unwinds ─► exit code 128 + number
    swallowed, by a __del__ or foreign code that catches everything ─► once more, until it is heard
    once more, meanwhile ─► again; a clean-up that this broke off is gone on with at the interpreter's end
    once all has unwound ─► ignored: what is left to do takes no time, and is to be done

One that is ignored when a program begins (SIGHUP under nohup) stays ignored.  A server, whose requests may end first,
and whatever runs in an event loop take the signals over for as long as that runs.  Imports nothing of ours: handlers
are there before a command's file is imported, which takes seconds.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

_Handler = Any  # of `signal.signal`: a function, SIG_DFL or SIG_IGN
_SOON_S = 0.05
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_num_programs = 0  # that ran in this process
_num_heard = 0  # signals that the main thread was told of


class StoppedBySignal(KeyboardInterrupt):
    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def exit_code(stop: KeyboardInterrupt) -> int:
    return 128 + (stop.number if isinstance(stop, StoppedBySignal) else signal.SIGINT)


def run_program(action: Callable[[], int], *, is_last: bool) -> int:
    """Exit code of `action`, or of the signal that has broken it off, which is told.

    is_last: the process ends after it; otherwise handlers are then what they were.
    """
    global _num_programs
    _num_programs += 1
    before, hook = _handlers(), sys.unraisablehook
    sys.unraisablehook = _all_but_swallowed_stops
    _unwind_by(before)
    try:
        try:
            return action()
        except KeyboardInterrupt as stop:
            ignore_more()
            is_told = isinstance(stop, StoppedBySignal) and stop.number != signal.SIGINT
            print("interrupted" + (f" by {stop}" if is_told else ""), file=sys.stderr)
            return exit_code(stop)
        finally:
            ignore_more()
            if not is_last:
                _set(before)
                sys.unraisablehook = hook
    except KeyboardInterrupt as stop:  # one more, just before it was to be ignored
        return exit_code(stop)


@contextmanager
def taken_over() -> Iterator[tuple[signal.Signals, ...]]:
    """In the block somebody else handles those that are given; after it handlers are what they were."""
    before = _handlers()
    try:
        yield tuple(number for number, handler in before.items() if handler is not signal.SIG_IGN)
    finally:
        _set(before)


@contextmanager
def unhandled() -> Iterator[None]:
    """In the block they end the process at once: for code that is not Python's and may wait long."""
    with taken_over():
        _set({number: signal.SIG_DFL for number, handler in _handlers().items() if handler is _unwind})
        yield


@contextmanager
def handled() -> Iterator[None]:
    """As in `run_program`: for what is Python's within `unhandled`."""
    with taken_over():
        _unwind_by(_handlers())
        yield


def ignore_more() -> None:
    """For the last words: nobody is kept from reading them by a second Ctrl-C."""
    _set(dict.fromkeys(_ENDING, signal.SIG_IGN))


def _handlers() -> dict[signal.Signals, _Handler]:
    return {number: signal.getsignal(number) for number in _ENDING}


def _unwind_by(found: Mapping[signal.Signals, _Handler]) -> None:
    """By those that nobody ignores or handles, but Python itself."""
    _set(
        {
            number: _unwind
            for number, handler in found.items()
            if handler in (signal.SIG_DFL, signal.default_int_handler)
        }
    )


def _set(handlers: Mapping[signal.Signals, _Handler]) -> None:
    """Nothing in another thread than the main one, where no signal comes."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _unwind(number: int, frame: FrameType | None) -> NoReturn:
    global _num_heard
    _num_heard += 1
    stop = StoppedBySignal(number)
    # Not by `threading`, of whose locks this thread may be holding one.
    with suppress(RuntimeError):  # the interpreter ends
        _thread.start_new_thread(_again_if_swallowed, (number, weakref.ref(stop), _num_programs))
    try:
        raise stop
    finally:
        del stop  # which this frame would hold, and the exception this frame


def _again_if_swallowed(number: int, stop: weakref.ref[StoppedBySignal], program: int) -> None:
    """Who unwinds holds the exception; once nobody does, all has unwound, or it has been caught on the way.

    program: which of this process's it was.
    """
    while stop() is not None:
        time.sleep(_SOON_S)
    before = _num_heard
    while _num_heard == before and signal.getsignal(number) is _unwind and _num_programs == program:
        os.kill(os.getpid(), number)
        time.sleep(_SOON_S)  # one that comes just before the main thread goes to sleep is noted, and wakes nobody


def _all_but_swallowed_stops(found: sys.UnraisableHookArgs) -> None:
    if not isinstance(found.exc_value, StoppedBySignal):
        sys.__unraisablehook__(found)
