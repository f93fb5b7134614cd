"""The connections to the R-workers: a session with each, who is alive, who was lost, and who has come back.

    open ─► alive ─► drop ─► looked for ─► take_joined ─► alive
                                ▲
              invite, one more ─┘

What goes wrong with one becomes an error of ours, which names it.  What they are told and asked is `RPool`'s.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeVar

from fastdecode.errors import RWorkerError, RWorkerFailed, RWorkerLost, RWorkerTimeout, RWorkerUnreachable
from fastdecode.holders.patience import Patience
from fastdecode.holders.rejoin import Joined, Rejoin, RWorkerHandle
from fastdecode.observe.totals import PoolTotals, WorkerTotals
from transport import (
    ChannelClosed,
    Failure,
    Goodbye,
    Hello,
    Message,
    PeerLost,
    PeerTimeout,
    TransportError,
    Welcome,
)

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class Connections:
    def __init__(self, workers: Sequence[RWorkerHandle], timeout_s: float) -> None:
        # These two are replaced, not changed: `lost` is read in any thread.
        self._workers = dict(enumerate(workers))
        self._alive = sorted(self._workers)
        self._patience = {worker: Patience(timeout_s) for worker in self._workers}
        self.timeout_s = timeout_s  # the longest wait for an answer, and for somebody to come back when none is left
        self._numbers = itertools.count(len(self._workers))  # of those to come
        self._rejoin: Rejoin | None = None  # from `open` on
        self._awaited: set[int] = set()  # lost, or new, and looked for
        self._num_blocks: dict[int, int] = {}  # of each that has been welcome
        self._last_layer = 0
        self.is_needed = True  # False: KV has another place, too, and steps are possible without anybody
        self._held: dict[int, set[int]] = {}  # R-worker -> sequences it may know; written before it is told
        self.totals = PoolTotals({worker: WorkerTotals() for worker in self._workers})

    @property
    def names(self) -> list[str]:
        """Of all that there ever were."""
        return [worker.name for worker in self._workers.values()]

    @property
    def alive(self) -> tuple[int, ...]:
        return tuple(self._alive)

    @property
    def lost(self) -> list[str]:
        """Names of those that do not serve now.  In any thread."""
        workers, alive = self._workers, self._alive
        return [handle.name for worker, handle in workers.items() if worker not in alive]

    @property
    def num_blocks(self) -> list[int]:
        """That each has for KV, or had when it was lost.  [num_r_workers]"""
        return [self._num_blocks.get(worker, 0) for worker in range(1 + max(self._workers, default=-1))]

    @property
    def is_able(self) -> bool:
        """Steps are possible: somebody serves, or there was nobody ever, or KV has another place."""
        return bool(self._alive or not self._workers or not self.is_needed)

    @property
    def held(self) -> list[tuple[int, int]]:
        """(R-worker, sequence) of all that may be known there."""
        return [(worker, seq_id) for worker in self._alive for seq_id in self._held.get(worker, ())]

    def is_vital(self, worker: int) -> bool:
        """Whether all stands still without it, so that it has as long as can be: a rank of MPI, or the last one."""
        return self._workers[worker].is_vital or self._alive == [worker]

    def drop(self, worker: int) -> bool:
        """A lost one: nothing is sent to it any more, and nothing of it is waited for.  It may return.

        Whether something goes on without it, or somebody may come back whom to wait for.
        """
        lost = self._workers[worker]
        if worker in self._alive:
            lost.channel.close()
            if self._rejoin and lost.again and not lost.is_vital:
                self._awaited.add(worker)
                self._rejoin.seek(worker, lost.again)
            # At the end: interrupted before, all of it is done again.
            self._alive = [other for other in self._alive if other != worker]
            self.totals.num_lost += 1
        return not lost.is_vital and bool(self._alive or self._awaited or not self.is_needed)

    def invite(self, find: Callable[[int], RWorkerHandle]) -> None:
        """A new one, found under the number it will have; `take_joined` tells when it is there.  In any thread."""
        assert self._rejoin, "a pool is opened first"
        worker = next(self._numbers)
        self._awaited.add(worker)
        self._rejoin.seek(worker, partial(find, worker))

    def take_joined(self, wait_s: float = 0.0) -> list[Joined]:
        """Those that came back, or new, since the last call: alive from now on, and empty.  Waits for a first one."""
        joined = self._rejoin.look(wait_s) if self._rejoin else []
        for new in joined:
            assert self._rejoin, "somebody has come by it"
            self._held[new.worker] = set()
            self._num_blocks[new.worker] = new.welcome.num_blocks
            self._workers = self._workers | {new.worker: new.handle}
            self._patience.setdefault(new.worker, Patience(self.timeout_s))  # whoever comes back is known
            self.totals.workers.setdefault(new.worker, WorkerTotals())
            self._alive = sorted({*self._alive, new.worker})
            self._awaited.discard(new.worker)
            self._rejoin.taken(new)  # interrupted before, it comes once more
            self.totals.num_joined += 1
        return joined

    def open(self, hello: Hello, timeout_s: float) -> list[Welcome]:
        """Opens a session with every R-worker; they prepare side by side.  Raises RWorkerError."""
        self._last_layer = len(hello.layers) - 1
        for i in self._alive:
            self._guard(i, partial(self._workers[i].channel.send, hello, timeout_s=timeout_s), first_contact=True)
        welcomes = []
        for i in self._alive:
            reply = self._guard(i, partial(self._workers[i].channel.recv, timeout_s=timeout_s), first_contact=True)
            welcomes.append(self._expect(i, reply, Welcome))
            self._num_blocks[i] = welcomes[-1].num_blocks
        self._rejoin = Rejoin(hello)
        return welcomes

    def close(self) -> None:
        """Says goodbye to whoever still listens and closes all channels."""
        if self._rejoin:
            self._rejoin.close()
        for worker in (self._workers[i] for i in self._alive):
            try:
                worker.channel.send(Goodbye(), timeout_s=1.0)
            except TransportError as error:
                logger.debug("%s took no goodbye: %s", worker.name, error)
            try:
                worker.channel.close()
            except TransportError as error:
                logger.debug("%s: %s", worker.name, error)

    def _check_serving(self, workers: Iterable[int]) -> None:
        """Before anything is sent: rows that are left out would shift those of all others."""
        missing = set(workers).difference(self._alive)
        assert not missing, f"a step has rows for R-workers {sorted(missing)}, which do not serve"

    def _send(self, worker: int, message: Message) -> None:
        channel = self._workers[worker].channel
        self._guard(worker, partial(channel.send, message, timeout_s=self.timeout_s))

    def _recv(self, worker: int, timeout_s: float | None = None) -> Message:
        channel = self._workers[worker].channel
        if timeout_s is None:
            timeout_s = self.timeout_s if self.is_vital(worker) else self._patience[worker].seconds
        return self._guard(worker, partial(channel.recv, timeout_s=timeout_s))

    def _expect(self, worker: int, reply: Message, kind: type[_Result]) -> _Result:
        if isinstance(reply, Failure):
            raise self._failed(worker, f"failed: {reply.kind}: {reply.text}", reply.kind)
        if not isinstance(reply, kind):
            raise self._failed(worker, f"answered {type(reply).__name__} where {kind.__name__} was due")
        return reply

    def _failed(self, worker: int, text: str, kind: str | None = None) -> RWorkerFailed:
        error = RWorkerFailed(f"{self._workers[worker].name} {text}", kind)
        error.r_worker = worker
        return error

    def _guard(self, worker: int, action: Callable[[], _Result], *, first_contact: bool = False) -> _Result:
        """Runs one transport call; what goes wrong becomes ours, with the R-worker's name."""
        try:
            return action()
        except TransportError as error:
            told = _as_ours(error, self._workers[worker].name, first_contact)
            told.r_worker = worker
            raise told from error


def _as_ours(error: TransportError, name: str, first_contact: bool) -> RWorkerError:
    match error:
        case ChannelClosed():
            return RWorkerLost(f"{name}: {error}")
        case PeerLost():
            return RWorkerLost(f"{name} is gone, and the KV it held with it: {error}")
        case PeerTimeout():
            return (RWorkerUnreachable if first_contact else RWorkerTimeout)(f"{name}: {error}")
        case _:
            return RWorkerFailed(f"{name}: {error}")
