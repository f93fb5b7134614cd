"""What a forked child inherits and must let go of: connections, pipes and locks are its parent's, and end with it.

A file descriptor that a child holds keeps a pipe from ending and a lock from becoming free, for as long as the child
lives; and what a child would say on a connection its parent would be answered.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class LetsGo(Protocol):
    def let_go(self) -> None:
        """In a forked child, where no other thread runs: closes file descriptors, and ends nothing of the parent's."""


_held: weakref.WeakSet[LetsGo] = weakref.WeakSet()


def let_go_in_children(held: LetsGo) -> None:
    """Whatever forks: ``os.fork``, ``multiprocessing``.  `held` is not kept alive."""
    _held.add(held)


def _let_go() -> None:
    for held in list(_held):
        held.let_go()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)
