"""The R-workers as one: rows are scattered to whoever holds their sequence, answers gathered in row order.

    begin(step) ─► submit(layer) ─► collect(layer) ─► submit(next layer) ─► …

Steps of several lanes may be between submit and collect; they are collected in the order they were submitted, because
an R-worker answers in the order it was asked.  Rows of prompts are written behind: nothing comes back for them but a
word at the end of the last layer.  Errors name the R-worker.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import TypeVar

import numpy as np

from fastdecode.errors import RWorkerError, RWorkerFailed, RWorkerLost, RWorkerTimeout, RWorkerUnreachable
from fastdecode.holders.patience import Patience
from fastdecode.holders.rejoin import Joined, Rejoin, RWorkerHandle
from fastdecode.observe.timeline import S_WORKER, NoTimeline, Timeline
from fastdecode.observe.totals import PoolTotals, WorkerTotals
from fastdecode.scheduling.plan import Admission, Forking, Step
from transport import (
    Admit,
    Attend,
    Attended,
    ChannelClosed,
    Failure,
    Fork,
    Goodbye,
    Hello,
    Message,
    PeerLost,
    PeerTimeout,
    Ping,
    Pong,
    Release,
    Rewind,
    Rows,
    TransportError,
    Welcome,
)

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
_NO_TIMELINE = NoTimeline()
_KINDS = 3  # of rows that one R-worker has of a step: decodes, prompts that attend there, prompts that do not


@dataclass(frozen=True, eq=False)
class _Share:
    """Rows of a step that go to one R-worker, and attend there (decodes, some prompts) or do not (other prompts)."""

    worker: int
    micro_batch: int  # as the R-worker knows them
    rows: slice
    is_queried: bool

    @property
    def queries(self) -> slice:
        """Rows of q and o."""
        return self.rows if self.is_queried else slice(0, 0)


@dataclass(eq=False)
class Ticket:
    """A lane's step on its way through the layers."""

    step: int
    lane: int
    shares: tuple[_Share, ...]
    num_queries: int  # rows that attend on R-workers: the first ones
    layer: int = -1  # the one submitted last
    submitted_ns: int = 0  # when
    due: deque[_Share] = field(default_factory=deque)  # that are to answer it, in order
    early: dict[_Share, Attended] = field(default_factory=dict)  # answers that came while something else was waited for


class RPool:
    def __init__(self, workers: Sequence[RWorkerHandle], timeout_s: float, timeline: Timeline = _NO_TIMELINE) -> None:
        # These two are replaced, not changed: `lost` is read in any thread.
        self._workers = dict(enumerate(workers))
        self._alive = sorted(self._workers)
        self._patience = {worker: Patience(timeout_s) for worker in self._workers}
        self._timeline = timeline
        self.timeout_s = timeout_s  # the longest wait for an answer, and for somebody to come back when none is left
        self._last_ping = 0
        self._numbers = itertools.count(len(self._workers))  # of those to come
        self._rejoin: Rejoin | None = None  # from `open` on
        self._awaited: set[int] = set()  # lost, or new, and looked for
        self._num_blocks: dict[int, int] = {}  # of each that has been welcome
        self._last_layer = 0
        self._tickets: dict[int, Ticket] = {}  # of the lanes that are on their way
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
        return [self._num_blocks.get(worker, 0) for worker in range(1 + max(self._workers))]

    @property
    def held(self) -> list[tuple[int, int]]:
        """(R-worker, sequence) of all that may be known there."""
        return [(worker, seq_id) for worker in self._alive for seq_id in self._held.get(worker, ())]

    def is_vital(self, worker: int) -> bool:
        """Whether all stands still without it, so that it has as long as can be: a rank of MPI, or the last one."""
        return self._workers[worker].is_vital or self._alive == [worker]

    def drop(self, worker: int) -> bool:
        """A lost one: nothing is sent to it any more, and nothing of it is waited for.  It may return.

        Whether the others go on without it, or somebody may come back whom to wait for.
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
        return not lost.is_vital and bool(self._alive or self._awaited)

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

    def admit(self, admissions: Sequence[Admission]) -> None:
        self._check_serving(admission.r_worker for admission in admissions)
        for worker in self._alive:
            own = [admission for admission in admissions if admission.r_worker == worker]
            if own:
                self._held.setdefault(worker, set()).update(admission.seq_id for admission in own)
                self._send(
                    worker,
                    Admit(
                        seq_ids=np.array([admission.seq_id for admission in own], np.int64),
                        max_tokens=np.array([admission.max_tokens for admission in own], np.int32),
                    ),
                )

    def fork(self, forkings: Sequence[Forking]) -> None:
        """Sequences that were admitted begin with tokens of others."""
        for worker, own in groupby(sorted(forkings, key=lambda f: f.r_worker), key=lambda f: f.r_worker):
            columns = np.array([(forking.seq_id, forking.parent, forking.num_tokens) for forking in own], np.int64).T
            self._send(worker, Fork(columns[0].copy(), columns[1].copy(), columns[2].astype(np.int32)))

    def release(self, released: Mapping[int, Sequence[int]]) -> None:
        """R-worker -> sequences that nothing in flight uses any more; those of a lost one are gone anyway."""
        for worker, seq_ids in released.items():
            if worker in self._alive:
                self._send(worker, Release(np.array(seq_ids, np.int64)))
                self._held.setdefault(worker, set()).difference_update(seq_ids)

    def rewind(self, kept: Mapping[int, Mapping[int, int]]) -> None:
        """R-worker -> sequence -> how many tokens of it stay, after a step was broken off."""
        for worker, num_tokens in kept.items():
            if worker in self._alive:
                self._send(
                    worker, Rewind(np.array(list(num_tokens), np.int64), np.array(list(num_tokens.values()), np.int32))
                )

    def begin(self, step: Step) -> Ticket:
        """Tells every R-worker concerned whose rows the coming layers carry."""
        self._check_serving(step.r_workers)
        shares: list[_Share] = []
        decodes = step.decodes
        for worker in self._alive:
            begin, end = np.searchsorted(decodes.r_workers, (worker, worker + 1)).tolist()
            if begin == end:
                continue
            rows, ones = slice(begin, end), np.ones(end - begin, np.int32)
            share = _Share(worker, _KINDS * step.lane, rows, is_queried=True)
            self._tell_rows(step, share, decodes.seq_ids[rows], decodes.positions[rows], ones)
            shares.append(share)
        row = len(decodes)
        for kind, prompts in enumerate((step.remote_prompts, step.local_prompts), 1):
            for worker, own in groupby(prompts, key=lambda segment: segment.r_worker):
                columns = np.array([(s.seq_id, s.start, s.num_tokens) for s in own], np.int64).T.copy()
                rows = slice(row, row + int(columns[2].sum()))
                share = _Share(worker, _KINDS * step.lane + kind, rows, is_queried=kind == 1)
                self._tell_rows(step, share, columns[0], columns[1], columns[2].astype(np.int32))
                shares.append(share)
                row = rows.stop
        assert row == step.num_tokens, "every row has its R-worker"
        ticket = self._tickets[step.lane] = Ticket(step.number, step.lane, tuple(shares), step.num_queries)
        return ticket

    def _tell_rows(
        self, step: Step, share: _Share, seq_ids: np.ndarray, starts: np.ndarray, num_tokens: np.ndarray
    ) -> None:
        num_queries = num_tokens if share.is_queried else np.zeros_like(num_tokens)
        rows = Rows(step.number, share.micro_batch, seq_ids, starts.astype(np.int32), num_tokens, num_queries)
        self._send(share.worker, rows)

    def submit(
        self,
        ticket: Ticket,
        q: np.ndarray,  # [num_queries, num_q_heads, head_dim] of the rows that attend on R-workers
        k: np.ndarray,  # [num_tokens, num_kv_heads, head_dim]
        v: np.ndarray,  # like k
    ) -> None:
        """Sends the next layer.  The arrays are not copied: leave them alone from now on."""
        ticket.layer += 1
        ticket.submitted_ns = time.monotonic_ns()
        for share in ticket.shares:
            message = Attend(
                step=ticket.step,
                micro_batch=share.micro_batch,
                layer=ticket.layer,
                q=q[share.queries],
                k=k[share.rows],
                v=v[share.rows],
            )
            self._send(share.worker, message)
            self.totals.workers[share.worker].bytes_sent += message.q.nbytes + 2 * message.k.nbytes
            if share.is_queried or ticket.layer == self._last_layer:
                ticket.due.append(share)

    def is_answered(self, ticket: Ticket) -> bool:
        """Whether `collect` need not wait: everybody has answered, or is known to be gone.

        ticket: of those submitted and not collected, the first.
        """
        return all(share in ticket.early or self._workers[share.worker].channel.is_readable() for share in ticket.due)

    def collect(self, ticket: Ticket, put: Callable[[slice, np.ndarray], None]) -> None:
        """Waits for the layer submitted last.

        put: is given rows and their o [rows, num_q_heads, head_dim] as they come, in order; together they are
        `num_queries`.  o lies where it arrived, which is used again once nobody holds the array any more.
        """
        while ticket.due:
            share = ticket.due[0]
            waited_ns = time.monotonic_ns()
            reply = ticket.early.pop(share, None) or self._expect(share.worker, self._recv(share.worker), Attended)
            if not _answers(reply, ticket, share):
                raise self._failed(share.worker, "answered something else than it was asked")
            ticket.due.popleft()
            self._account(ticket, share, reply, waited_ns)
            if share.is_queried:
                put(share.rows, reply.o)
        if ticket.layer == self._last_layer:
            self.void(ticket)

    def void(self, ticket: Ticket) -> None:
        """It is at its end, or was broken off: whoever answers it later is not heard."""
        if self._tickets.get(ticket.lane) is ticket:
            del self._tickets[ticket.lane]

    def settle(self, timeout_s: float | None = None) -> None:
        """Brings every R-worker to rest after a step was broken off, wherever that was.  Raises RWorkerError.

        timeout_s: of all of them together, instead of what each has shown to need; but one that is vital has as long as
        in a step, for nothing goes on without it, and a machine may be busy.

        A barrier instead of a count of what is owed, which an interrupt may have left wrong: whatever comes before
        the Pong belongs to the past, unless a step that goes on waits for it.
        """
        self._last_ping += 1
        for worker in self._alive:
            self._send(worker, Ping(self._last_ping))
        asked_s = time.monotonic()
        for worker in self._alive:
            limit_s = self.timeout_s if timeout_s is None or self.is_vital(worker) else timeout_s
            deadline = asked_s + limit_s
            left_s = None if timeout_s is None else max(0.0, deadline - time.monotonic())
            while (reply := self._recv(worker, left_s)) != Pong(self._last_ping):
                if time.monotonic() > deadline:
                    raise self._failed(worker, "answers, but not what it was asked")
                self._keep(worker, reply)
            if any(share.worker == worker and share not in ticket.early for ticket, share in self._all_due()):
                raise self._failed(worker, "did not answer what a step that goes on has asked")

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

    def _all_due(self) -> Iterator[tuple[Ticket, _Share]]:
        """What steps under way wait for."""
        return ((ticket, share) for ticket in self._tickets.values() for share in ticket.due)

    def _keep(self, worker: int, reply: Message) -> None:
        """An answer that a step which goes on will collect; others are of steps that were broken off."""
        for ticket, share in self._all_due():
            if share.worker == worker and isinstance(reply, Attended) and _answers(reply, ticket, share):
                ticket.early[share] = reply

    def _account(self, ticket: Ticket, share: _Share, reply: Attended, waited_ns: int) -> None:
        waited_for_ns, attention_ns = time.monotonic_ns() - waited_ns, reply.ended_ns - reply.began_ns
        self._patience[share.worker].took(max(waited_for_ns, attention_ns) / 1e9)
        self.totals.wait_ns += waited_for_ns
        totals = self.totals.workers[share.worker]
        totals.attention_ns += attention_ns
        totals.bytes_received += reply.o.nbytes
        self._draw(ticket, share, reply, waited_ns)

    def _draw(self, ticket: Ticket, share: _Share, reply: Attended, waited_ns: int) -> None:
        """What the R-worker did, and what waiting for it was."""
        now_ns, where = time.monotonic_ns(), (ticket.lane, ticket.layer)
        began_ns, ended_ns = reply.began_ns, reply.ended_ns
        if not ticket.submitted_ns <= began_ns <= ended_ns <= now_ns:  # another machine's clock
            began_ns, ended_ns = now_ns - (ended_ns - began_ns), now_ns
        ready_ns = max(waited_ns, ended_ns)
        self._timeline.add(f"R-worker {share.worker}", "attention", began_ns, ended_ns, *where)
        self._timeline.add(S_WORKER, "wait", waited_ns, ready_ns, *where)
        self._timeline.add(S_WORKER, "receive", ready_ns, now_ns, *where)

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


def _answers(reply: Attended, ticket: Ticket, share: _Share) -> bool:
    asked = (ticket.step, share.micro_batch, ticket.layer, share.queries.stop - share.queries.start)
    return (reply.step, reply.micro_batch, reply.layer, len(reply.o)) == asked


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
