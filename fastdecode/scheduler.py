"""Which tokens go through the model next.  Pure: no torch, no sockets, no clock.

Continuous batching: every step carries one token of each running sequence, and the prompts of as many waiting
ones as fit; sequences join and leave between any two steps.  A sequence starts only when an R-worker has KV for
its prompt and all of its output, so none ever has to be thrown out again.

    add ─► waiting ──schedule──► running ──commit──► finished
                (first come, first served)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fastdecode.errors import RequestError
from fastdecode.placement import least_reserved
from fastdecode.plan import Admission, MicroBatch, Segment, Step
from fastdecode.request import Sequence


@dataclass(frozen=True)
class SchedulerConfig:
    max_num_seqs: int
    max_num_batched_tokens: int  # prompt tokens per step
    num_micro_batches: int
    block_tokens: int
    capacity_blocks: tuple[int, ...]  # [num_r_workers]


class Scheduler:
    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}  # by seq_id, in order of admission
        self._reserved_blocks = [0] * len(config.capacity_blocks)
        self._num_steps = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def running(self, seq_id: int) -> Sequence:
        return self._running[seq_id]

    def add(self, sequence: Sequence) -> None:
        """Raises RequestError if no R-worker could ever hold it."""
        needed, largest = self._blocks(sequence), max(self._config.capacity_blocks)
        if needed > largest:
            size = self._config.block_tokens
            raise RequestError(
                "kv_budget_exceeded",
                f"prompt + output is {sequence.max_kv_tokens} tokens of KV = {needed} blocks of {size}; the largest "
                f"R-worker has {largest}: raise kv_cache_memory or lower max_tokens",
            )
        self._waiting.append(sequence)

    def schedule(self) -> Step | None:
        """The next step; None if there is nothing to do."""
        decodes = [
            Segment(s.seq_id, _place(s), s.num_tokens - 1, (s.output_token_ids[-1],), is_prompt=False)
            for s in self._running.values()
        ]
        admissions, prompts = self._admit()
        if not decodes and not prompts:
            return None
        self._num_steps += 1
        return Step(self._num_steps, tuple(admissions), self._micro_batches(decodes, prompts))

    def commit(self, step: Step, token_ids: Mapping[int, int]) -> list[Sequence]:
        """Takes the token of every sequence of `step`; returns those that are finished now, still in place.

        Their places are given back by `remove`, once nothing of them is in flight.
        """
        finished = []
        for micro_batch in step.micro_batches:
            for segment in micro_batch.segments:
                sequence = self._running[segment.seq_id]
                sequence.append(token_ids[segment.seq_id])
                if sequence.finish_reason:
                    finished.append(sequence)
        return finished

    def remove(self, sequences: Iterable[Sequence]) -> dict[int, list[int]]:
        """Forgets sequences, wherever they are or are not.  R-worker -> sequences whose KV it can free."""
        released: dict[int, list[int]] = {}
        for sequence in sequences:
            if self._running.pop(sequence.seq_id, None) is None:
                if sequence in self._waiting:
                    self._waiting.remove(sequence)
                continue
            place = _place(sequence)
            self._reserved_blocks[place] -= self._blocks(sequence)
            sequence.r_worker = None
            released.setdefault(place, []).append(sequence.seq_id)
        return released

    def check_integrity(self) -> None:
        """Asserts that what is reserved is what the running sequences need, within every budget."""
        expected = [0] * len(self._reserved_blocks)
        for sequence in self._running.values():
            expected[_place(sequence)] += self._blocks(sequence)
        assert expected == self._reserved_blocks
        assert all(r <= c for r, c in zip(self._reserved_blocks, self._config.capacity_blocks, strict=True))
        assert len(self._running) <= self._config.max_num_seqs

    def _admit(self) -> tuple[list[Admission], list[Segment]]:
        """Moves waiting sequences to running, in order, as far as seats, KV and the token budget reach."""
        config, tokens_left = self._config, self._config.max_num_batched_tokens
        admissions: list[Admission] = []
        prompts: list[Segment] = []
        while self._waiting and len(self._running) < config.max_num_seqs:
            sequence = self._waiting[0]
            prompt, needed = sequence.request.prompt_token_ids, self._blocks(sequence)
            if prompts and len(prompt) > tokens_left:
                break
            place = least_reserved(self._reserved_blocks, config.capacity_blocks, needed)
            if place is None:
                break
            self._waiting.popleft()
            sequence.r_worker = place
            self._running[sequence.seq_id] = sequence
            self._reserved_blocks[place] += needed
            tokens_left -= len(prompt)
            admissions.append(Admission(sequence.seq_id, place, sequence.max_kv_tokens))
            prompts.append(Segment(sequence.seq_id, place, 0, prompt, is_prompt=True))
        return admissions, prompts

    def _micro_batches(self, decodes: list[Segment], prompts: list[Segment]) -> tuple[MicroBatch, ...]:
        """Deals segments so that every micro-batch, and every R-worker's part of it, has about equal work."""
        hands: list[list[Segment]] = [[] for _ in range(self._config.num_micro_batches)]
        for i, segment in enumerate(sorted(decodes, key=lambda s: s.r_worker)):
            hands[i % len(hands)].append(segment)
        loads = [len(hand) for hand in hands]
        for segment in sorted(prompts, key=lambda s: -s.num_tokens):
            lightest = loads.index(min(loads))
            hands[lightest].append(segment)
            loads[lightest] += segment.num_tokens
        filled = [sorted(hand, key=lambda s: (s.r_worker, s.is_prompt)) for hand in hands if hand]
        return tuple(MicroBatch(index, tuple(hand)) for index, hand in enumerate(filled))

    def _blocks(self, sequence: Sequence) -> int:
        return -(-sequence.max_kv_tokens // self._config.block_tokens)


def _place(sequence: Sequence) -> int:
    assert sequence.r_worker is not None, "a running sequence has a place"
    return sequence.r_worker
