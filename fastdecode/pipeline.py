"""The layer loop: micro-batches pass the S-worker in turn, while the R-workers attend for the others.

    S-worker   A0 │ B0 │ A1 │ B1 │ A2 │ …           Xl: micro-batch X from attention l-1 to attention l
    R-workers       A0 │ B0 │ A1 │ B1 │ …           (He & Zhai 2024, section 4.1)

With one micro-batch the same loop is the serial definition; the tokens are the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastdecode.plan import MicroBatch, Step
from fastdecode.rpool import RPool, Ticket
from fastdecode.timeline import Timeline
from gpu_sworker import AttentionCall, EmulatedSWorker, FlatBatch, PromptChunk, Sampled, SWorker

_Forward = Generator[AttentionCall, torch.Tensor, torch.Tensor]
SampleFunction = Callable[[MicroBatch, torch.Tensor], Sampled]  # (micro-batch, logits [num_sampled, vocab])


@dataclass
class _InFlight:
    """A micro-batch between submit and collect."""

    micro_batch: MicroBatch
    forward: _Forward
    ticket: Ticket
    rows: _Rows
    call: AttentionCall


@dataclass(frozen=True)
class _Rows:
    """Where the rows of a micro-batch attend."""

    queries: np.ndarray | None  # [num_queries] int64, rows that attend on R-workers; None: all of them
    prompts: tuple[PromptChunk, ...]  # those that attend on the S-worker


class Pipeline:
    def __init__(self, sworker: SWorker | EmulatedSWorker, rpool: RPool, timeline: Timeline) -> None:
        self._sworker, self._rpool, self._timeline = sworker, rpool, timeline

    def run(self, step: Step, sample: SampleFunction) -> list[Sampled]:
        """A token for every segment that wants one, per micro-batch.

        Raises RWorkerError; then the step did not happen.
        """
        results: dict[int, Sampled] = {}
        self.release(step.preempted)
        self._rpool.admit(step.admissions)
        forwards = [self._sworker.forward(flatten(micro_batch)) for micro_batch in step.micro_batches]
        flying: deque[_InFlight] = deque()
        with self._sworker.inference():
            try:
                for micro_batch, forward in zip(step.micro_batches, forwards, strict=True):
                    flying.append(self._launch(step.number, micro_batch, forward))
                while flying:
                    flight = flying.popleft()
                    o = self._collect(flight)
                    try:
                        with self._timeline.span("S-block", flight.micro_batch.index, flight.call.layer + 1):
                            flight.call = flight.forward.send(o)
                    except StopIteration as end:
                        with self._timeline.span("sample", flight.micro_batch.index):
                            results[flight.micro_batch.index] = sample(flight.micro_batch, end.value)
                    else:
                        self._submit(flight)
                        flying.append(flight)
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

    def _launch(self, step: int, micro_batch: MicroBatch, forward: _Forward) -> _InFlight:
        """Begins a micro-batch and submits its first layer."""
        ticket = self._rpool.begin(step, micro_batch)
        with self._timeline.span("S-block", micro_batch.index, 0):
            call = next(forward)
        flight = _InFlight(micro_batch, forward, ticket, _rows(micro_batch), call)
        self._submit(flight)
        return flight

    def _submit(self, flight: _InFlight) -> None:
        call, queries = flight.call, flight.rows.queries
        with self._timeline.span("stage", flight.micro_batch.index, call.layer):
            q = call.q if queries is None else call.q[torch.from_numpy(queries)]
            on_host = [self._sworker.to_host(tensor) for tensor in (q, call.k, call.v)]
        with self._timeline.span("send", flight.micro_batch.index, call.layer):
            self._rpool.submit(flight.ticket, *on_host)

    def _collect(self, flight: _InFlight) -> torch.Tensor:
        """o of all rows: prompts are attended here while the R-workers are busy.  # [T, num_q_heads, head_dim]"""
        call, rows, where = flight.call, flight.rows, (flight.micro_batch.index, flight.call.layer)
        if rows.queries is None:
            on_host = self._rpool.collect(flight.ticket)
            with self._timeline.span("stage", *where):
                return self._sworker.to_device(on_host)
        with self._timeline.span("prompt attention", *where):
            prompts = [self._sworker.attend_prompt(call, chunk) for chunk in rows.prompts]
        on_host = self._rpool.collect(flight.ticket)
        with self._timeline.span("stage", *where):
            o = torch.empty_like(call.q)
            o[torch.from_numpy(rows.queries)] = self._sworker.to_device(on_host)
            for chunk, o_prompt in zip(rows.prompts, prompts, strict=True):
                o[chunk.rows] = o_prompt
        return o


def flatten(micro_batch: MicroBatch) -> FlatBatch:
    """The micro-batch's tokens behind one another."""
    segments = micro_batch.segments
    ends = np.cumsum([segment.num_tokens for segment in segments], dtype=np.int64)
    return FlatBatch(
        token_ids=np.concatenate([np.array(segment.token_ids, np.int64) for segment in segments]),
        positions=np.concatenate([np.arange(s.start, s.start + s.num_tokens, dtype=np.int64) for s in segments]),
        logits_rows=ends[[segment.is_sampled for segment in segments]] - 1,
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
