"""The layer loop: micro-batches pass the S-worker in turn, while the R-workers attend for the others.

    S-worker   A0 │ B0 │ A1 │ B1 │ A2 │ …           Xl: micro-batch X from attention l-1 to attention l
    R-workers       A0 │ B0 │ A1 │ B1 │ …           (He & Zhai 2024, section 4.1)

A device that works by itself is given the next S-block as soon as its o is there, be it still busy with another
micro-batch's; what it has finished is sent on meanwhile.  Where a S-block is computed in its call, on the CPU, the same
loop sends it on at once.  With one micro-batch it is the serial definition; the tokens are the same.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from fastdecode.holders.rpool import RPool, Ticket
from fastdecode.observe.timeline import S_DEVICE, Timeline
from fastdecode.scheduling.plan import MicroBatch, Step
from gpu_sworker import AttentionCall, EmulatedSWorker, FlatBatch, PromptChunk, SWorker, Transfer

_GLANCE_S = 10e-6  # between looks at two things that may come, a device's and the R-workers'

_Forward = Generator[AttentionCall, torch.Tensor, torch.Tensor]
_Result = TypeVar("_Result")


@dataclass
class _Computing:
    """A micro-batch whose q, k, v the device works on, or has on their way to the host."""

    forward: _Forward
    ticket: Ticket
    rows: _Rows
    call: AttentionCall
    transfer: Transfer


@dataclass
class _Attending:
    """A micro-batch whose q, k, v the R-workers have."""

    forward: _Forward
    ticket: Ticket
    rows: _Rows
    call: AttentionCall
    in_use: list[np.ndarray]  # what was sent, until it is answered
    prompts: list[torch.Tensor] | None  # o of its prompts; None: not begun


@dataclass(frozen=True)
class _Rows:
    """Where the rows of a micro-batch attend."""

    queries: np.ndarray | None  # [num_queries] int64, rows that attend on R-workers; None: all of them
    prompts: tuple[PromptChunk, ...]  # those that attend on the S-worker


class Pipeline:
    def __init__(self, sworker: SWorker | EmulatedSWorker, rpool: RPool, timeline: Timeline) -> None:
        self._sworker, self._rpool, self._timeline = sworker, rpool, timeline

    def run(self, step: Step, sample: Callable[[MicroBatch, torch.Tensor], _Result]) -> list[_Result]:
        """What `sample` makes of each micro-batch and its logits, [rows of `flatten`, vocab].

        Raises RWorkerError; then the step did not happen.
        """
        self.release(step.preempted)
        self._rpool.admit(step.admissions)
        results: dict[int, _Result] = {}
        micro_batches = {micro_batch.index: micro_batch for micro_batch in step.micro_batches}
        forwards = [self._sworker.forward(flatten(micro_batch)) for micro_batch in step.micro_batches]
        fresh = deque(zip(step.micro_batches, forwards, strict=True))
        computing: deque[_Computing] = deque()  # both in the order in which they will be done
        attending: deque[_Attending] = deque()
        with self._sworker.inference():
            try:
                while fresh or computing or attending:
                    if computing and computing[0].transfer.is_done():
                        attending.append(self._send(computing.popleft()))
                    elif fresh:
                        computing.append(self._begin(step.number, *fresh.popleft()))
                    elif attending and attending[0].prompts is None:
                        attending[0].prompts = self._attend_prompts(attending[0])
                    elif attending and (not computing or self._rpool.is_answered(attending[0].ticket)):
                        flight = attending.popleft()
                        after = self._resume(flight, self._collect(flight))
                        if isinstance(after, _Computing):
                            computing.append(after)
                        else:
                            index = flight.ticket.micro_batch
                            with self._timeline.span("sample", index):
                                results[index] = sample(micro_batches[index], after)
                    else:
                        self._await(computing[0], attending[0] if attending else None)
            finally:
                for forward in forwards:  # a step broken off: those that are suspended end here, in this thread
                    forward.close()
        return [results[micro_batch.index] for micro_batch in step.micro_batches]

    def release(self, sequences: Mapping[int, Sequence[int]]) -> None:
        """R-worker -> sequences that nothing in flight uses any more.  Raises RWorkerError."""
        for seq_ids in sequences.values():
            self._sworker.forget_prompts(seq_ids)
        self._rpool.release(sequences)

    def settle(self, sequences: Iterable[tuple[int, int]]) -> None:
        """Brings all to rest after something was broken off, wherever that was.  Raises RWorkerError.

        sequences: (R-worker, seq_id) of those that end and may or may not be known there, or be released already.
        Each is released by itself, because a release of several fails whole on account of one.
        """
        for worker, seq_id in sequences:
            self.release({worker: [seq_id]})
        self._rpool.settle()

    def rewind(self, kept: Mapping[int, Mapping[int, int]]) -> None:
        """R-worker -> sequence -> how many tokens of it stay, after a step was broken off.  Raises RWorkerError."""
        self._rpool.rewind(kept)

    def _begin(self, step: int, micro_batch: MicroBatch, forward: _Forward) -> _Computing:
        """The first S-block."""
        ticket = self._rpool.begin(step, micro_batch)
        rows = _rows(micro_batch)
        with self._timeline.span(self._block_span, micro_batch.index, 0):
            call = next(forward)
        return _Computing(forward, ticket, rows, call, self._stage(call, ticket, rows))

    def _resume(self, flight: _Attending, o: torch.Tensor) -> _Computing | torch.Tensor:
        """The next S-block; after the last one the logits.  # [num_sampled + num_scored, vocab]"""
        try:
            with self._timeline.span(self._block_span, flight.ticket.micro_batch, flight.call.layer + 1):
                call = flight.forward.send(o)
        except StopIteration as end:
            logits: torch.Tensor = end.value
            return logits
        transfer = self._stage(call, flight.ticket, flight.rows)
        return _Computing(flight.forward, flight.ticket, flight.rows, call, transfer)

    def _stage(self, call: AttentionCall, ticket: Ticket, rows: _Rows) -> Transfer:
        with self._timeline.span("stage", ticket.micro_batch, call.layer):
            return self._sworker.stage(call, rows.queries)

    def _send(self, flight: _Computing) -> _Attending:
        where = flight.ticket.micro_batch, flight.call.layer
        arrays = flight.transfer.wait()
        if flight.transfer.block_ns:
            self._timeline.add(S_DEVICE, "S-block", *flight.transfer.block_ns, *where)
        with self._timeline.span("send", *where):
            self._rpool.submit(flight.ticket, *arrays)
        none_due = None if flight.rows.prompts else list[torch.Tensor]()
        return _Attending(flight.forward, flight.ticket, flight.rows, flight.call, arrays, none_due)

    def _attend_prompts(self, flight: _Attending) -> list[torch.Tensor]:
        """On the S-worker, while the R-workers are busy with the rest."""
        with self._timeline.span("prompt attention", flight.ticket.micro_batch, flight.call.layer):
            return [self._sworker.attend_prompt(flight.call, chunk) for chunk in flight.rows.prompts]

    def _collect(self, flight: _Attending) -> torch.Tensor:
        """o of all rows.  # [T, num_q_heads, head_dim]"""
        on_host = self._rpool.collect(flight.ticket)
        with self._timeline.span("stage", flight.ticket.micro_batch, flight.call.layer):
            queried = self._sworker.to_device(on_host)
            if flight.rows.queries is None:
                return queried
            o = torch.empty_like(flight.call.q)
            o[torch.from_numpy(flight.rows.queries)] = queried
            for chunk, of_prompt in zip(flight.rows.prompts, flight.prompts or [], strict=True):
                o[chunk.rows] = of_prompt
        return o

    def _await(self, computing: _Computing, attending: _Attending | None) -> None:
        """Until the device is done with the one, or the R-workers are with the other."""
        with self._timeline.span("wait"):
            if attending is None:
                computing.transfer.wait()
            while attending and not (computing.transfer.is_done() or self._rpool.is_answered(attending.ticket)):
                time.sleep(_GLANCE_S)

    @property
    def _block_span(self) -> str:
        return "launch" if self._sworker.is_asynchronous else "S-block"


def flatten(micro_batch: MicroBatch) -> FlatBatch:
    """The micro-batch's tokens behind one another.  Logits: of what is sampled first, then of what scores prompts."""
    segments = micro_batch.segments
    positions = np.concatenate([np.arange(s.start, s.start + s.num_tokens, dtype=np.int64) for s in segments])
    given = np.repeat([s.given_tokens for s in segments], [s.num_tokens for s in segments])
    ends = np.cumsum([segment.num_tokens for segment in segments], dtype=np.int64)
    sampled = ends[[segment.is_sampled for segment in segments]] - 1
    scored = [
        np.arange(segment.scored.start, segment.scored.stop) + end - segment.end
        for segment, end in zip(segments, ends.tolist(), strict=True)
        if segment.score_to
    ]
    return FlatBatch(
        token_ids=np.concatenate([np.array(segment.token_ids, np.int64) for segment in segments]),
        positions=positions,
        logits_rows=np.concatenate([sampled, *scored]) if scored else sampled,
        lengths=np.maximum(positions + 1, given),
    )


def _rows(micro_batch: MicroBatch) -> _Rows:
    queries: list[int] = []
    prompts: list[PromptChunk] = []
    row = 0
    for segment in micro_batch.segments:
        if segment.is_prompt:
            prompts.append(PromptChunk(segment.seq_id, row, segment.num_tokens, segment.start, segment.prompt_tokens))
        else:
            queries.extend(range(row, row + segment.num_tokens))
        row += segment.num_tokens
    return _Rows(np.array(queries, np.int64) if prompts else None, tuple(prompts))
