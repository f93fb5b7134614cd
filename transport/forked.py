"""What a forked child inherits and must let go of: connections, pipes and locks are its parent's, and end with it.

A file descriptor that a child holds keeps a pipe from ending and a lock from becoming free, for as long as the child
lives; and what a child would say on a connection its parent would be answered.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol, runtime_checkable


class LetsGo(Protocol):
    def let_go(self) -> None:
        """In a forked child, where no other thread runs: closes file descriptors, and ends nothing of the parent's."""


@runtime_checkable
class Notes(LetsGo, Protocol):
    def note(self) -> None:
        """Just before a fork, in the parent: what can be told no more once the child looks, which may be much later."""


_held: weakref.WeakSet[LetsGo] = weakref.WeakSet()


def let_go_in_children(held: LetsGo) -> None:
    """Whatever forks: ``os.fork``, ``multiprocessing``.  `held` is not kept alive."""
    _held.add(held)


def _note() -> None:
    for held in list(_held):
        if isinstance(held, Notes):
            held.note()


def _let_go() -> None:
    for held in list(_held):
        held.let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_note, after_in_child=_let_go)
