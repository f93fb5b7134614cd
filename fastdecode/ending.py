"""The one end of what was begun here, whoever asks for it: ``close``, garbage collection, or the interpreter's end.

close() ──────────────────────┐
the owner is garbage ─────────┼─► once, in the process that began it ─► closed
the interpreter ends ─────────┘
fork ─► in the child: closed, and nothing was ended
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from transport import let_go_in_children

_open: weakref.WeakSet[Ending] = weakref.WeakSet()


class Ending:
    def __init__(self, owner: object, action: Callable[[], object]) -> None:
        """action: must not hold the owner, which would never be garbage."""
        self._finalizer = weakref.finalize(owner, _end, action)
        self._is_begun = False
        _open.add(self)
        let_go_in_children(self)

    @property
    def is_closed(self) -> bool:
        """Or is about to be."""
        return self._is_begun or not self._finalizer.alive

    def close(self) -> None:
        """Can be called twice; interrupted, the next call goes on, or the interpreter's end."""
        closing = self._finalizer.peek()
        if closing:
            self._is_begun = True
            _, _, (action,), _ = closing
            action()
            self._finalizer.detach()

    def let_go(self) -> None:
        self._finalizer.detach()


def open_endings() -> set[Ending]:
    """Of this process."""
    return {ending for ending in list(_open) if not ending.is_closed}


def _end(action: Callable[[], object]) -> None:
    """For a garbage owner, or at the interpreter's end.

    Garbage is found in any thread, in the middle of whatever it does: in another than the main one, which may be one
    that the action waits for, the action gets its own.
    """
    if threading.current_thread() is threading.main_thread():
        action()
        return
    try:
        threading.Thread(target=action, name="ending").start()
    except RuntimeError:  # the interpreter ends, and so do R-workers that follow it
        pass
