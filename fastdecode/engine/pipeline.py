"""The layer loop: lanes pass the S-worker in turn, while the R-workers attend for the others.

    S-worker   … AL·A0 │ BL·B0 │ A1 │ B1 │ A2 │ …      Xl: lane X from attention l-1 to attention l
    R-workers           A0 │ B0 │ A1 │ B1 │ …           (He & Zhai 2024, section 4.1)

AL·A0: after a lane's last layer its logits are handed out, and its next step begins before any other lane goes on.  So
whatever is done between two steps of a lane lies beside the R-workers' work for the others, and the order in which
lanes use the device never depends on who happens to be ready.

A device that works by itself is given the next S-block as soon as its o is there, be it still busy with another
lane's; what it has finished is sent on meanwhile.  Where a S-block is computed in its call, on the CPU, the same loop
sends it on at once.  With one lane it is the serial definition; the tokens are the same.

These turns are for the R-workers' sake.  While no lane has rows there, a step attends inside its forward, which goes
through all layers at once; then it is the next lane's turn.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fastdecode.holders.device import DeviceHolder, HeldRows
from fastdecode.holders.rpool import RPool, Ticket
from fastdecode.observe.timeline import S_DEVICE, Timeline
from fastdecode.scheduling.plan import Step
from gpu_sworker import AttentionCall, EmulatedSWorker, FlatBatch, PromptChunk, SWorker, Transfer

_GLANCE_S = 10e-6  # between looks at two things that may come, a device's and the R-workers'

_Forward = Generator[AttentionCall, torch.Tensor, torch.Tensor]


@dataclass(eq=False)
class _Flight:
    """A lane's step on its way through the layers."""

    step: Step
    ticket: Ticket
    batch: FlatBatch
    prompts: tuple[PromptChunk, ...]  # those that attend on the S-worker to what they bring
    held: list[HeldRows]  # on the S-worker's device
    forward: _Forward | None = None  # layer by layer; None: it has not begun, or goes through all layers at once
    call: AttentionCall | None = None  # that it is at; None: before the first one
    transfer: Transfer | None = None  # of that call's q, k, v to the host
    in_use: list[np.ndarray] = field(default_factory=list)  # what was sent, until it is answered
    made_here: list[tuple[slice, torch.Tensor]] | None = None  # rows, and their o by the S-worker; None: not begun
    on_device: list[tuple[slice, torch.Tensor]] = field(default_factory=list)  # of them, those launched already

    @property
    def lane(self) -> int:
        return self.step.lane


class Pipeline:
    def __init__(
        self, sworker: SWorker | EmulatedSWorker, rpool: RPool, timeline: Timeline, device: DeviceHolder | None = None
    ) -> None:
        """device: what holds K and V on the S-worker's device, if anything does."""
        self._sworker, self._rpool, self._timeline, self._device = sworker, rpool, timeline, device
        self._flights: dict[int, _Flight] = {}  # by lane, all that are begun
        self._computing: deque[_Flight] = deque()  # whose q, k, v the device works on, or has on their way to the host
        self._attending: deque[_Flight] = deque()  # whose q, k, v the R-workers have; both in the lanes' order

    @property
    def under_way(self) -> list[int]:
        """Lanes."""
        return list(self._flights)

    def begin(self, step: Step) -> None:
        """Of a lane that has none under way; its first S-block, if lanes take turns.  Raises RWorkerError."""
        assert step.lane not in self._flights, "a lane has one step at a time"
        self.release(step.preempted)
        for holder in (self._rpool, self._device) if self._device else (self._rpool,):
            holder.cut(step.cut)
            holder.admit(step.admissions)
            holder.fork(step.forkings)
        ticket = self._rpool.begin(step)
        held = self._device.begin(step) if self._device else []
        self._flights[step.lane] = _Flight(step, ticket, flatten(step), _prompts(step), held)
        if self._takes_turns():
            with self._sworker.inference():
                for flight in self._flights.values():
                    if not flight.forward:
                        self._begin_layers(flight)

    def run(self) -> tuple[Step, torch.Tensor]:
        """The layers of all lanes, until the first one is through.  Raises RWorkerError.

        Logits: [rows of `flatten`, vocab].
        """
        with self._sworker.inference():
            first = next(iter(self._flights.values()))
            if not first.forward:
                return self._ended(first, self._go_through(first))
            while True:
                computing = self._computing[0] if self._computing else None
                attending = self._attending[0] if self._attending else None
                if computing and computing.transfer and computing.transfer.is_done():
                    self._send(self._computing.popleft())
                elif attending and attending.made_here is None:
                    attending.made_here = self._attend_here(attending)
                elif attending and (not computing or self._rpool.is_answered(attending.ticket)):
                    flight = self._attending.popleft()
                    logits = self._resume(flight, self._collect(flight))
                    if logits is not None:
                        return self._ended(flight, logits)
                else:
                    assert computing, "a step was begun"
                    self._await(computing, attending)

    def break_off(self, lanes: Collection[int]) -> None:
        """Their steps did not happen; in the thread that began them.  Interrupted, it may be called again."""
        for flight in [flight for lane, flight in self._flights.items() if lane in lanes]:
            for queue in (self._computing, self._attending):
                if flight in queue:
                    queue.remove(flight)
            if flight.forward:
                flight.forward.close()
            self._rpool.void(flight.ticket)
            del self._flights[flight.lane]

    def release(self, sequences: Mapping[int, Sequence[int]]) -> None:
        """R-worker -> sequences that nothing in flight uses any more.  Raises RWorkerError."""
        for seq_ids in sequences.values():
            self._sworker.forget_prompts(seq_ids)
        if self._device:
            self._device.release(sequences)
        self._rpool.release(sequences)

    def settle(self, sequences: Iterable[tuple[int, int]]) -> None:
        """Brings all to rest after steps were broken off, wherever that was; others go on.  Raises RWorkerError.

        sequences: (R-worker, seq_id) of those that end and may or may not be known there, or be released already.
        Each is released by itself, because a release of several fails whole on account of one.
        """
        for worker, seq_id in sequences:
            self.release({worker: [seq_id]})
        self._rpool.settle()

    def rewind(self, kept: Mapping[int, Mapping[int, int]]) -> None:
        """R-worker -> sequence -> how many tokens of it stay, after its step was broken off.  Raises RWorkerError."""
        if self._device:
            self._device.rewind(kept)
        self._rpool.rewind(kept)

    def forget_all(self) -> None:
        """Sequences on the S-worker's device, when all have ended; what R-workers hold is released by `settle`."""
        self._sworker.forget_all_prompts()
        if self._device:
            self._device.forget_all()

    def _takes_turns(self) -> bool:
        """Layer by layer: R-workers would wait for all layers of other lanes."""
        return any(flight.ticket.shares for flight in self._flights.values())

    def _begin_layers(self, flight: _Flight) -> None:
        flight.forward = self._sworker.forward(flight.batch)
        with self._timeline.span(self._block_span, flight.lane, 0):
            flight.call = next(flight.forward)
        self._stage(flight)

    def _go_through(self, flight: _Flight) -> torch.Tensor:
        """All layers, of a step that has nothing on R-workers.  # [num_sampled + num_scored, vocab]"""

        def attend(call: AttentionCall) -> torch.Tensor:
            made = [(chunk.rows, self._sworker.attend_prompt(call, chunk)) for chunk in flight.prompts]
            made += self._device.attend(flight.held, call) if self._device else []
            return call.join([o for _, o in sorted(made, key=lambda part: part[0].start)])

        with self._timeline.span("forward", flight.lane):
            return self._sworker.forward_through(flight.batch, attend)

    def _ended(self, flight: _Flight, logits: torch.Tensor) -> tuple[Step, torch.Tensor]:
        self._rpool.void(flight.ticket)
        del self._flights[flight.lane]
        return flight.step, logits

    def _resume(self, flight: _Flight, o: torch.Tensor) -> torch.Tensor | None:
        """The next S-block; after the last one the logits.  # [num_sampled + num_scored, vocab]"""
        assert flight.call and flight.forward
        try:
            with self._timeline.span(self._block_span, flight.lane, flight.call.layer + 1):
                flight.call = flight.forward.send(o)
        except StopIteration as end:
            logits: torch.Tensor = end.value
            return logits
        self._stage(flight)
        return None

    def _stage(self, flight: _Flight) -> None:
        """Its rows of R-workers are on their way, if it has some."""
        assert flight.call
        if flight.ticket.shares:
            with self._timeline.span("stage", flight.lane, flight.call.layer):
                flight.transfer = self._sworker.stage(flight.call, flight.step.queries, flight.step.stored)
            self._computing.append(flight)
        else:
            flight.made_here = None
            self._attending.append(flight)
        if self._sworker.is_asynchronous:  # it is to have work while q, k, v are on their way
            flight.on_device = self._attend_on_device(flight)

    def _send(self, flight: _Flight) -> None:
        assert flight.call and flight.transfer
        where = flight.lane, flight.call.layer
        flight.in_use = flight.transfer.wait()
        if flight.transfer.block_ns:
            self._timeline.add(S_DEVICE, "S-block", *flight.transfer.block_ns, *where)
        with self._timeline.span("send", *where):
            self._rpool.submit(flight.ticket, *flight.in_use)
        flight.made_here = None if flight.prompts or flight.held else []
        self._attending.append(flight)

    def _attend_here(self, flight: _Flight) -> list[tuple[slice, torch.Tensor]]:
        """On the S-worker, while the R-workers are busy with the rest.  Rows, and their o."""
        assert flight.call
        made = []
        if flight.prompts:
            with self._timeline.span("prompt attention", flight.lane, flight.call.layer):
                made += [(chunk.rows, self._sworker.attend_prompt(flight.call, chunk)) for chunk in flight.prompts]
        return made + (flight.on_device or self._attend_on_device(flight))

    def _attend_on_device(self, flight: _Flight) -> list[tuple[slice, torch.Tensor]]:
        assert flight.call
        if not self._device or not flight.held:
            return []
        with self._timeline.span("device attention", flight.lane, flight.call.layer):
            return self._device.attend(flight.held, flight.call)

    def _collect(self, flight: _Flight) -> torch.Tensor:
        """o of all rows, each R-worker's put into its place as it comes.  # [T, num_q_heads, head_dim]"""
        assert flight.call and flight.made_here is not None
        gathering, where = self._sworker.gather(flight.call), (flight.lane, flight.call.layer)
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        first = flight.step.stored.start  # R-workers' rows are counted from there

        def put(rows: slice, o: np.ndarray) -> None:
            with self._timeline.span("stage", *where):
                gathering.put(slice(first + rows.start, first + rows.stop), o)

        self._rpool.collect(flight.ticket, put, lambda *part: parts.append(part))
        made: list[tuple[slice | np.ndarray, torch.Tensor]] = [*flight.made_here]
        if parts:
            rows = flight.ticket.rows_in_parts
            rows = slice(first + rows.start, first + rows.stop) if isinstance(rows, slice) else first + rows
            with self._timeline.span("merge", *where):
                made.append((rows, self._sworker.merge(flight.call.layer, parts)))
        with self._timeline.span("stage", *where):
            return gathering.finish(made)

    def _await(self, computing: _Flight, attending: _Flight | None) -> None:
        """Until the device is done with the one, or the R-workers are with the other."""
        assert computing.transfer
        with self._timeline.span("wait"):
            if attending is None:
                computing.transfer.wait()
            while attending and not (computing.transfer.is_done() or self._rpool.is_answered(attending.ticket)):
                time.sleep(_GLANCE_S)

    @property
    def _block_span(self) -> str:
        return "launch" if self._sworker.is_asynchronous else "S-block"


def flatten(step: Step) -> FlatBatch:
    """The step's tokens behind one another.  Logits: of what is sampled first, then of what scores prompts."""
    decodes, prompts = step.decodes, step.prompts
    if not prompts:
        return FlatBatch(decodes.token_ids, decodes.positions, np.arange(len(decodes)))
    positions = np.concatenate([decodes.positions, *(np.arange(s.start, s.end) for s in prompts)])
    given = np.repeat([s.given_tokens for s in prompts], [s.num_tokens for s in prompts])
    ends = len(decodes) + np.cumsum([segment.num_tokens for segment in prompts], dtype=np.int64)
    scored = [
        np.arange(segment.scored.start, segment.scored.stop) + end - segment.end
        for segment, end in zip(prompts, ends.tolist(), strict=True)
        if segment.score_to
    ]
    sampled = ends[[segment.is_sampled for segment in prompts]] - 1
    lengths = positions + 1
    lengths[len(decodes) :] = np.maximum(lengths[len(decodes) :], given)
    return FlatBatch(
        token_ids=np.concatenate([decodes.token_ids, *(np.array(s.token_ids, np.int64) for s in prompts)]),
        positions=positions,
        logits_rows=np.concatenate([np.arange(len(decodes)), sampled, *scored]),
        lengths=lengths,
    )


def _prompts(step: Step) -> tuple[PromptChunk, ...]:
    row, chunks = step.queries.stop, []
    for s in step.local_prompts:
        chunks.append(PromptChunk(s.seq_id, row, s.num_tokens, s.start, s.prompt_tokens))
        row += s.num_tokens
    return tuple(chunks)
