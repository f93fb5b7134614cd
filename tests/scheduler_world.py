"""Engine and R-workers as far as a scheduler can tell: they run its steps, and check every one of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np

from cpu_attention.kvstore import KVStore
from fastdecode.api.sampling_params import SamplingParams
from fastdecode.scheduling.config import SchedulerConfig
from fastdecode.scheduling.parts import DEVICE, reached
from fastdecode.scheduling.plan import Forking, Segment, Step
from fastdecode.scheduling.predictor import Predictor
from fastdecode.scheduling.request import Request, Sequence
from fastdecode.scheduling.scheduler import Scheduler

END, OTHER = 1, 7
BLOCK_TOKENS = 4


def create_scheduler(
    *,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    num_lanes: int = 1,
    capacity_blocks: tuple[int, ...] = (50, 50),
    predictor: Predictor | None = None,
    **options: Any,
) -> Scheduler:
    return Scheduler(
        SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_lanes=num_lanes,
            block_tokens=BLOCK_TOKENS,
            capacity_blocks=capacity_blocks,
            **options,
        ),
        predictor,
    )


def a_sequence(seq_id: int, **options: Any) -> Sequence:
    [sequence] = siblings(seq_id, **options)
    return sequence


def siblings(
    seq_id: int,
    prompt: int = 5,
    output: int = 4,
    true: int | None = None,
    rank: int = 0,
    scores: bool = False,
    copies: int = 1,
    salt: str | None = None,
    first: tuple[int, ...] = (),
) -> list[Sequence]:
    """The sequences of a request, numbered from seq_id on.

    true: where each ends by itself, if before `output`; None: only its length ends it.  scores: of its prompt.
    """
    request = Request(
        request_id=str(seq_id),
        prompt_token_ids=(first + tuple(range(10, 10 + prompt)))[:prompt],
        params=SamplingParams(n=copies, temperature=1.0, max_tokens=output, prompt_logprobs=0 if scores else None),
        max_new_tokens=output,
        stop_token_ids=frozenset(),
        eos_token_ids=frozenset() if true is None else frozenset({END}),
        true_output_tokens=true,
        priority=rank,
        cache_salt=salt,
    )
    return [Sequence(seq_id + index, request, index, 0) for index in range(copies)]


def pass_step(scheduler: Scheduler) -> Step | None:
    """A step of the first lane, begun and ended."""
    step = scheduler.schedule()
    if step:
        scheduler.remove(scheduler.commit(step, np.full(len(step.sampled), OTHER)))
    return step


class World:
    """Runs a scheduler's steps as the engine and the R-workers would, and checks every one of them.

    Lanes take turns: each that has no step under way begins one, then that which began first ends.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        budget: int,
        capacity: tuple[int, ...],
        split_fuse: bool = True,
        scored_rows: int = 1 << 30,
        device_blocks: int = 0,
    ) -> None:
        self.scheduler, self.budget, self.capacity, self.split_fuse = scheduler, budget, capacity, split_fuse
        self.scored_rows = scored_rows
        self.scored: defaultdict[int, list[int]] = defaultdict(list)  # seq_id -> positions, as they came
        self.sequences: dict[int, Sequence] = {}
        layout: Any = SimpleNamespace(
            block_bytes=1, block_tokens=BLOCK_TOKENS, layers=(), heads=(), num_blocks=lambda n: -(-n // BLOCK_TOKENS)
        )
        self.stores = {worker: KVStore(layout, blocks) for worker, blocks in enumerate(capacity)}
        if device_blocks:
            self.stores[DEVICE] = KVStore(layout, device_blocks)
        self.stored: dict[tuple[int, int], tuple[int, ...]] = {}  # (R-worker, seq_id) -> whose K and V are there
        self.begins: dict[tuple[int, int], int] = {}  # likewise, how many tokens come before those
        self.is_remote: dict[tuple[int, int], bool] = {}  # (sequence, how often it was preempted) -> where it attends
        self.skipped: Counter[int] = Counter()  # seq_id that decodes -> ends of steps since it had one
        self.under_way: list[Step] = []
        self.steps: list[Step] = []  # as they began
        self.loads: list[int] = []

    def add(self, sequence: Sequence) -> None:
        self.sequences[sequence.seq_id] = sequence
        self.scheduler.add(sequence)

    def remove(self, sequences: list[Sequence]) -> None:
        busy = {seq_id for step in self.under_way for seq_id in step.seq_ids}
        for worker, seq_ids in self.scheduler.remove(sequences).items():
            for seq_id in seq_ids:
                assert seq_id not in busy, "it is in a step that is under way"
                self._release(worker, seq_id)
        self.scheduler.check_integrity()

    def step(self) -> Step | None:
        """Which was begun first of those under way; it has ended then."""
        for lane in range(self.scheduler.num_lanes):
            if all(step.lane != lane for step in self.under_way) and (step := self.scheduler.schedule(lane)):
                self._begin(step)
        if not self.under_way:
            return None
        self._check_nobody_is_forgotten()
        self.loads.append(sum(map(len, self.running.values())))
        step = self.under_way.pop(0)
        for segment in step.scored:
            self.scored[segment.seq_id] += segment.scored
        tokens = [self._token(self.sequences[seq_id]) for seq_id in step.sampled]
        self.remove(self.scheduler.commit(step, np.array(tokens, np.int64)))
        return step

    def _begin(self, step: Step) -> None:
        busy = {seq_id for other in self.under_way for seq_id in other.seq_ids}
        segments = step.segments
        assert len(segments) == len(step.seq_ids) and not step.seq_ids & busy, "a sequence is in one step at a time"
        self.steps.append(step)
        self.under_way.append(step)
        for worker, seq_ids in step.preempted.items():
            for seq_id in seq_ids:
                assert seq_id not in busy
                self._release(worker, seq_id)
        for worker, cut in step.cut.items():
            for seq_id, num_tokens in cut.items():
                assert not self.sequences[seq_id].is_on(worker) or seq_id in step.seq_ids, "it runs"
                if num_tokens:
                    self.stores[worker].truncate(seq_id, num_tokens)
                    self.stored[worker, seq_id] = self.stored[worker, seq_id][:num_tokens]
                else:
                    self._release(worker, seq_id)
        for admission in step.admissions:
            self.stores[admission.r_worker].admit(admission.seq_id, admission.max_tokens)
            self.stored[admission.r_worker, admission.seq_id] = ()
            sequence = self.sequences[admission.seq_id]
            [begin] = [part.first_token for part in sequence.parts if part.r_worker == admission.r_worker]
            self.begins[admission.r_worker, admission.seq_id] = begin
        for forking in step.forkings:
            self._fork(forking)
        admitted = {seq_id: self.sequences[seq_id].num_preemptions for seq_id in step.seq_ids}
        for segment in segments:
            self._store(segment, step)
            if segment.is_prompt:
                first = self.is_remote.setdefault((segment.seq_id, admitted[segment.seq_id]), segment.is_remote)
                assert first == segment.is_remote, "a prompt attends in one place"
                is_here = segment.r_worker == DEVICE
                is_whole = segment.num_tokens == segment.prompt_tokens
                assert not (segment.is_remote and is_whole) or is_here, "a whole one needs no room"
        self._check_budget(segments)
        assert len(set(step.sampled)) == len(step.sampled)

    def _fork(self, forking: Forking) -> None:
        worker, count = forking.r_worker, forking.num_tokens
        rows = [s for step in self.under_way[:-1] for s in step.segments if s.seq_id == forking.parent]
        on_their_way = [s.start - s.part_start for s in rows if s.r_worker == worker]
        parent = self.stored[worker, forking.parent]
        assert self.stored[worker, forking.seq_id] == ()
        assert 0 < count <= min([len(parent), *on_their_way]), "what a child begins with is there"
        self.stores[worker].fork([forking.seq_id], [forking.parent], [count])
        child = self.sequences[forking.seq_id]
        [begin] = [part.first_token for part in child.parts if part.r_worker == worker]
        assert child.token_ids[begin : begin + count] == parent[:count]
        assert self.begins[worker, forking.parent] == begin
        parent_tokens = self.sequences[forking.parent].token_ids
        assert parent_tokens[:begin] == child.token_ids[:begin], "what comes before is the same"
        salts = {self.sequences[seq_id].request.cache_salt for seq_id in (forking.seq_id, forking.parent)}
        assert len(salts) == 1
        self.stored[worker, forking.seq_id] = parent[:count]

    def _check_nobody_is_forgotten(self) -> None:
        """Who decodes is in a step soon: in the next one of its lane, which it may have changed; but prompts that go
        alone come before, and so does whoever memory has to be made for."""
        busy = {seq_id for step in self.under_way for seq_id in step.seq_ids}
        waits = [i for i in self.running if not self.sequences[i].is_prefilling and i not in busy]
        self.skipped = Counter({i: self.skipped[i] + 1 for i in waits if not self.sequences[i].finish_reason})
        prompts_alone = not self.split_fuse and any(step.prompts for step in self.under_way)
        if self.scheduler.num_lanes == 1 and not prompts_alone:
            assert not self.skipped, "a running sequence is skipped"
        assert (
            prompts_alone
            or not self.split_fuse
            or max(self.skipped.values(), default=0) <= 3 * self.scheduler.num_lanes
        )

    def run(self) -> None:
        while self.step():
            assert len(self.steps) < 20_000, "it does not come to an end"
        assert not self.scheduler.has_work and not self.running

    def _store(self, segment: Segment, step: Step) -> None:
        sequence, where = self.sequences[segment.seq_id], (segment.r_worker, segment.seq_id)
        parts = step.parts.get(segment.seq_id, reached(sequence.parts, segment.end))
        assert (segment.seq_id in step.parts) == segment.is_in_parts
        assert parts[-1] == (segment.r_worker, segment.part_start)
        assert len(parts) == 1 or segment.is_in_parts or not segment.is_remote, "it attends to all parts"
        assert len(self.stored[where]) == segment.start - segment.part_start, "positions follow one another"
        assert segment.token_ids == sequence.token_ids[segment.start : segment.end]
        self.stored[where] += segment.token_ids
        there = tuple(token for part in parts for token in self.stored[part.r_worker, segment.seq_id])
        assert there == sequence.token_ids[: segment.end]
        self.stores[segment.r_worker].extend({segment.seq_id: segment.num_tokens})  # raises if there is no block

    def _release(self, worker: int, seq_id: int) -> None:
        self.stores[worker].release(seq_id)
        del self.stored[worker, seq_id]

    @property
    def running(self) -> dict[int, tuple[int, ...]]:
        """Tokens whose KV R-workers have, but for sequences that have ended."""
        found: dict[int, tuple[int, ...]] = {}
        for (worker, i), tokens in self.stored.items():
            if self.sequences[i].is_on(worker):
                found[i] = found.get(i, ()) + tokens
        return found

    @property
    def num_preempted(self) -> int:
        return sum(sequence.num_preemptions for sequence in self.sequences.values())

    def _check_budget(self, segments: list[Segment]) -> None:
        prompts = {s.seq_id for s in segments if s.is_prompt}
        if self.split_fuse or len(prompts) > 1:
            assert sum(s.num_tokens for s in segments if self.split_fuse or s.is_prompt) <= self.budget
        if self.split_fuse:
            assert sum(len(s.scored) for s in segments) <= self.scored_rows
            assert all(s.token_ids for s in segments)
        else:
            assert not prompts or all(s.is_prompt for s in segments), "prompts go alone"

    def _token(self, sequence: Sequence) -> int:
        return END if len(sequence.output_token_ids) + 1 == sequence.request.true_output_tokens else OTHER
