"""The R-workers as one: rows are scattered to whoever holds their sequence, answers gathered in row order.

    begin(step) ─► submit(layer) ─► collect(layer) ─► submit(next layer) ─► …

Steps of several lanes may be between submit and collect; they are collected in the order they were submitted, because
an R-worker answers in the order it was asked.  Rows of prompts are written behind: nothing comes back for them but a
word at the end of the last layer.  Of a sequence that lies in parts each R-worker answers with a partial state.  Who
they are, and who is lost or comes back, is in `connections`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Self

import numpy as np

from fastdecode.holders import split_rows
from fastdecode.holders.connections import Connections
from fastdecode.holders.rejoin import RWorkerHandle
from fastdecode.observe.timeline import S_WORKER, NoTimeline, Timeline
from fastdecode.scheduling.parts import DEVICE
from fastdecode.scheduling.plan import Admission, Forking, Step
from transport import Admit, Attend, Attended, Fork, Message, Ping, Pong, Release, Rewind, Rows

_NO_TIMELINE = NoTimeline()
# Of rows that one R-worker has of a step: decodes, prompts that attend there, prompts that do not, and of both of the
# former those of sequences that lie in parts.
_DECODES, _REMOTE, _WRITTEN, _IN_PARTS = _KINDS = range(4)


@dataclass(frozen=True, eq=False)
class _Share:
    """Rows of a step that go to one R-worker: are stored there, attend there, or both."""

    worker: int
    micro_batch: int  # as the R-worker knows them
    tokens: split_rows.Rows  # of k and v, as all below counted from the first row that R-workers see
    queries: split_rows.Rows  # of q and o
    num_queries: int
    in_parts: np.ndarray | None = None  # [num_queries] which of the rows in parts these are; None: none of them

    @classmethod
    def of(cls, worker: int, micro_batch: int, rows: slice, *, is_queried: bool) -> Self:
        return cls(worker, micro_batch, rows, *((rows, rows.stop - rows.start) if is_queried else (slice(0, 0), 0)))


@dataclass(eq=False)
class Ticket:
    """A lane's step on its way through the layers."""

    step: int
    lane: int
    shares: tuple[_Share, ...]
    rows_in_parts: split_rows.Rows  # of them, those whose o is to be merged
    layer: int = -1  # the one submitted last
    submitted_ns: int = 0  # when
    due: deque[_Share] = field(default_factory=deque)  # that are to answer it, in order
    early: dict[_Share, Attended] = field(default_factory=dict)  # answers that came while something else was waited for


class RPool(Connections):
    def __init__(self, workers: Sequence[RWorkerHandle], timeout_s: float, timeline: Timeline = _NO_TIMELINE) -> None:
        super().__init__(workers, timeout_s)
        self._timeline = timeline
        self._last_ping = 0
        self._tickets: dict[int, Ticket] = {}  # of the lanes that are on their way

    def admit(self, admissions: Sequence[Admission]) -> None:
        """Those of R-workers; so does what else names places."""
        admissions = [admission for admission in admissions if admission.r_worker != DEVICE]
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
        forkings = [forking for forking in forkings if forking.r_worker != DEVICE]
        for worker, own in groupby(sorted(forkings, key=lambda f: f.r_worker), key=lambda f: f.r_worker):
            columns = np.array([(forking.seq_id, forking.parent, forking.num_tokens) for forking in own], np.int64).T
            self._send(worker, Fork(columns[0].copy(), columns[1].copy(), columns[2].astype(np.int32)))

    def release(self, released: Mapping[int, Sequence[int]]) -> None:
        """R-worker -> sequences that nothing in flight uses any more; those of a lost one are gone anyway."""
        for worker, seq_ids in released.items():
            if worker in self._alive and seq_ids:
                self._send(worker, Release(np.array(seq_ids, np.int64)))
                self._held.setdefault(worker, set()).difference_update(seq_ids)

    def cut(self, cut: Mapping[int, Mapping[int, int]]) -> None:
        """R-worker -> sequence that has ended -> how many tokens of it stay, for others to begin with."""
        self.release({worker: [i for i, stays in own.items() if not stays] for worker, own in cut.items()})
        self.rewind({worker: {i: stays for i, stays in own.items() if stays} for worker, own in cut.items()})

    def rewind(self, kept: Mapping[int, Mapping[int, int]]) -> None:
        """R-worker -> sequence -> how many tokens of it stay, after a step was broken off."""
        for worker, num_tokens in kept.items():
            if worker in self._alive and num_tokens:
                self._send(
                    worker, Rewind(np.array(list(num_tokens), np.int64), np.array(list(num_tokens.values()), np.int32))
                )

    def begin(self, step: Step) -> Ticket:
        """Tells every R-worker concerned whose rows the coming layers carry."""
        self._check_serving(step.r_workers)
        shares: list[_Share] = []
        decodes, first = step.decodes, step.stored.start
        for worker in self._alive:
            begin, end = np.searchsorted(decodes.r_workers[: decodes.num_whole], (worker, worker + 1)).tolist()
            if begin == end:
                continue
            rows, ones = slice(begin, end), np.ones(end - begin, np.int32)
            seen = slice(begin - first, end - first)
            share = _Share.of(worker, _micro_batch(step, _DECODES), seen, is_queried=True)
            self._tell_rows(step, share, decodes.seq_ids[rows], decodes.positions[rows], ones)
            shares.append(share)
        in_parts = split_rows.split_rows(step) if step.parts else []
        rows_in_parts = split_rows.rows_of(in_parts)
        shares += self._begin_parts(step, in_parts, rows_in_parts)
        row = len(decodes) - first
        for kind, prompts in ((_REMOTE, step.remote_prompts), (_WRITTEN, step.written_prompts)):
            for (worker, are_in_parts), own in groupby(prompts, key=lambda s: (s.r_worker, s.is_in_parts)):
                columns = np.array([(s.seq_id, s.start - s.part_start, s.num_tokens) for s in own], np.int64).T.copy()
                rows = slice(row, row + int(columns[2].sum()))
                row = rows.stop
                if are_in_parts:
                    continue
                share = _Share.of(worker, _micro_batch(step, kind), rows, is_queried=kind == _REMOTE)
                self._tell_rows(step, share, columns[0], columns[1], columns[2].astype(np.int32))
                shares.append(share)
        assert row == step.stored.stop - first, "every row has its R-worker"
        ticket = Ticket(step.number, step.lane, tuple(shares), rows_in_parts)
        self._tickets[step.lane] = ticket
        return ticket

    def _begin_parts(
        self, step: Step, in_parts: Sequence[split_rows.SplitRows], all_rows: split_rows.Rows
    ) -> list[_Share]:
        """Tells R-workers what they have of sequences in parts."""
        shares = []
        for worker in sorted({part.r_worker for part in in_parts}):
            own = [part for part in in_parts if part.r_worker == worker]
            tokens, queries = split_rows.rows_of([part for part in own if part.is_last]), split_rows.rows_of(own)
            places = split_rows.places_among(queries, all_rows)
            share = _Share(worker, _micro_batch(step, _IN_PARTS), tokens, queries, len(places), places)
            columns = [(p.seq_id, p.num_stored, p.num_new, len(p.rows), p.query_start) for p in own]
            seq_ids, *others = np.array(columns, np.int64).T
            starts, num_tokens, num_queries, query_starts = (column.astype(np.int32) for column in others)
            rows = Rows(
                step.number, share.micro_batch, seq_ids.copy(), starts, num_tokens, num_queries, query_starts,
                is_partial=True,
            )  # fmt: skip
            self._send(worker, rows)
            shares.append(share)
        return shares

    def _tell_rows(
        self, step: Step, share: _Share, seq_ids: np.ndarray, starts: np.ndarray, num_tokens: np.ndarray
    ) -> None:
        num_queries = num_tokens if share.num_queries else np.zeros_like(num_tokens)
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
                k=k[share.tokens],
                v=v[share.tokens],
            )
            self._send(share.worker, message)
            self.totals.workers[share.worker].bytes_sent += message.q.nbytes + 2 * message.k.nbytes
            if share.num_queries or ticket.layer == self._last_layer:
                ticket.due.append(share)

    def is_answered(self, ticket: Ticket) -> bool:
        """Whether `collect` need not wait: everybody has answered, or is known to be gone.

        ticket: of those submitted and not collected, the first.
        """
        return all(share in ticket.early or self._workers[share.worker].channel.is_readable() for share in ticket.due)

    def collect(
        self,
        ticket: Ticket,
        put: Callable[[slice, np.ndarray], None],
        put_part: Callable[[np.ndarray, np.ndarray, np.ndarray], None] | None = None,
    ) -> None:
        """Waits for the layer submitted last.

        put: is given rows and their o [rows, num_q_heads, head_dim] as they come, in order.  put_part: which of the
        rows in parts, their o over the keys that one R-worker has, without sinks, and its lse [rows, num_q_heads].
        All together are the step's queries.  o lies where it arrived, which is used again once nobody holds the array
        any more.
        """
        while ticket.due:
            share = ticket.due[0]
            waited_ns = time.monotonic_ns()
            reply = ticket.early.pop(share, None) or self._expect(share.worker, self._recv(share.worker), Attended)
            if not _answers(reply, ticket, share):
                raise self._failed(share.worker, "answered something else than it was asked")
            ticket.due.popleft()
            self._account(ticket, share, reply, waited_ns)
            if share.in_parts is not None:
                assert put_part and reply.lse is not None, "it was asked for"
                put_part(share.in_parts, reply.o, reply.lse)
            elif share.num_queries:
                assert isinstance(share.queries, slice)
                put(share.queries, reply.o)
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


def _answers(reply: Attended, ticket: Ticket, share: _Share) -> bool:
    asked = (ticket.step, share.micro_batch, ticket.layer, share.num_queries, share.in_parts is not None)
    return (reply.step, reply.micro_batch, reply.layer, len(reply.o), reply.lse is not None) == asked


def _micro_batch(step: Step, kind: int) -> int:
    """A number for one R-worker's rows of that kind."""
    return len(_KINDS) * step.lane + kind
