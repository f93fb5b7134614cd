"""Which tokens go through the model next.  Pure: no torch, no sockets, no clock but the steps.

Continuous batching with SplitFuse: every step carries one token of each running sequence, and fills up with prompts,
cut where the step's budget ends.  Sequences join and leave between any two steps.

    add ─► waiting ──schedule──► running: prefilling ─► decoding ──commit──► finished ──remove─►
              ▲  who is first?         │ may it start, and where?
              │  WaitingQueue          │ LoadControl, Predictor
              └──────preempted─────────┘ a guess was wrong, and its R-worker is full
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fastdecode.errors import RequestError
from fastdecode.scheduling.compose import micro_batches
from fastdecode.scheduling.kv_credits import KVCredits
from fastdecode.scheduling.load_control import LoadControl
from fastdecode.scheduling.plan import Admission, Segment, Step
from fastdecode.scheduling.predictor import Learned, Predictor
from fastdecode.scheduling.prospects import Prospect, Prospects
from fastdecode.scheduling.request import Sequence
from fastdecode.scheduling.waiting import WaitingQueue

_MOST_FILLINGS = 4  # of all seats, that wait


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """See `fastdecode.engine.config.EngineConfig` for what users choose."""

    max_num_seqs: int
    max_num_batched_tokens: int
    num_micro_batches: int
    block_tokens: int
    capacity_blocks: tuple[int, ...]  # [num_r_workers]
    max_num_waiting: int | None = None
    kv_policy: str = "reserve-dynamic"
    start_policy: str = "steady"
    start_interval: int = 1
    max_kv_load: int | None = None
    length_quantile: float = 0.95
    order: str = "fcfs"
    order_window: int = 64
    restart_tokens: int | None = None  # a sequence that grows to so many is computed anew; see ModelFacts
    max_scored_rows: int = 1 << 30  # logits that score tokens of prompts, in a step; they are all there at a time
    split_fuse: bool = True  # False: prompts go whole, in steps of their own, before anything else (vLLM of 2023)

    @property
    def num_seats(self) -> int:
        """Sequences that run at most: an eighth of the budget stays for prompts, so that decodes cannot starve them."""
        if not self.split_fuse:
            return self.max_num_seqs
        return max(1, min(self.max_num_seqs, self.max_num_batched_tokens - -(-self.max_num_batched_tokens // 8)))


@dataclass(frozen=True)
class Loss:
    """What is to be done on the R-workers that are left, after one was lost in the middle of a step."""

    released: dict[int, list[int]]  # R-worker, the lost one too -> sequences that start anew
    kept: dict[int, dict[int, int]]  # R-worker -> sequence -> how many tokens of it stay


@dataclass
class _Left:
    """Of a step's budget, for prompts."""

    tokens: int
    scored_rows: int

    def take(self, segment: Segment) -> None:
        self.tokens -= segment.num_tokens
        self.scored_rows -= len(segment.scored)
        if self.scored_rows <= 0:
            self.tokens = 0  # the next prompt may want scores, too, and none is passed by


class Scheduler:
    def __init__(self, config: SchedulerConfig, predictor: Predictor | None = None) -> None:
        self._config = config
        self._prospects = Prospects(predictor or Learned(), config.length_quantile)
        self._num_steps = 0
        self._load_step = 0  # the steps in which what runs grows
        self._begin(config.capacity_blocks)

    def _begin(self, capacity_blocks: tuple[int, ...]) -> None:
        """With no sequences at all."""
        config = self._config
        self._waiting = WaitingQueue(config.order, config.order_window, self._prospects.job_length)
        self._running: dict[int, Sequence] = {}  # by seq_id, in order of admission
        self._credits = KVCredits(config.kv_policy, capacity_blocks, config.block_tokens)
        self._load = LoadControl(
            self._credits,
            start_policy=config.start_policy,
            start_interval=config.start_interval,
            max_kv_load=config.max_kv_load,
        )
        self._num_places = config.num_seats

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_places(self) -> int:
        """Sequences that run or can at once: all seats, or what ran when a step with budget left let others wait."""
        return max(self._num_places, len(self._running)) if self._running else self._config.num_seats

    @property
    def kv_tokens(self) -> tuple[int, ...]:
        """Of what runs in the step scheduled last, per R-worker, prompts on their way in counted whole."""
        return self._credits.tokens

    @property
    def kv_capacity_tokens(self) -> list[int]:
        """[num_r_workers]"""
        return self._credits.capacity_tokens

    @property
    def kv_load_limit(self) -> int:
        """KV tokens of all R-workers that a step may read: what was set, or what they hold."""
        return self._load.limit

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def has_room(self, count: int) -> bool:
        """So many sequences can be added now."""
        limit, waiting = self._config.max_num_waiting, len(self._waiting)
        return limit is None or not waiting or waiting + count <= limit

    @property
    def wants_more(self) -> bool:
        """False: so much waits that what comes later changes nothing about who starts in the next step, and when.

        For a caller with any number of prompts, so that the first of them need not wait for the last to be read.
        """
        config, waiting = self._config, len(self._waiting)
        window = 0 if config.order == "fcfs" else config.order_window  # begun anew within a step, it is to be full
        if waiting < config.num_seats + window:
            return True
        # With seats for a part of the memory alone, no pace that memory asks for is felt.
        return waiting < _MOST_FILLINGS * config.num_seats and not self._load.is_much(self._waiting.max_kv_tokens)

    def running(self, seq_id: int) -> Sequence:
        return self._running[seq_id]

    def add(self, *sequences: Sequence) -> None:
        """All of them or none.  Raises RequestError if no R-worker could ever hold one, or if the queue is full.

        An empty queue takes any number, so that a request for more samples than the queue holds is served, too.
        """
        for sequence in sequences:
            self.check_fits(sequence.max_kv_tokens)
        if not self.has_room(len(sequences)):
            raise RequestError(
                "queue_full",
                f"{len(self._waiting)} sequences wait already, and {self._config.max_num_waiting} may; try again later",
            )
        for sequence in sequences:
            self._waiting.add(sequence)

    def check_fits(self, max_kv_tokens: int) -> None:
        """Raises RequestError if no R-worker could ever hold so many."""
        needed = self._credits.blocks(max_kv_tokens)
        if needed > self._credits.largest:
            size = self._config.block_tokens
            raise RequestError(
                "kv_budget_exceeded",
                f"prompt + output is {max_kv_tokens} tokens of KV = {needed} blocks of {size}; the "
                f"largest R-worker has {self._credits.largest}: raise kv_cache_memory or lower max_tokens",
            )

    def schedule(self) -> Step | None:
        """The next step; None if there is nothing to do."""
        self._credits.count(self._running.values())
        preempted = self._preempt()
        decodes = [
            Segment(s.seq_id, _place(s), s.num_computed, (s.output_token_ids[-1],), prompt_tokens=0)
            for s in self._running.values()
            if not s.is_prefilling
        ]
        admissions, prompts = self._prompts(len(decodes))
        if prompts and not self._config.split_fuse:
            decodes = []
        if not decodes and not prompts:
            return None
        self._num_steps += 1
        if decodes or self._config.split_fuse:
            self._load_step += 1
        batches = micro_batches(decodes, prompts, self._config.num_micro_batches)
        return Step(self._num_steps, preempted, tuple(admissions), batches)

    def commit(self, step: Step, token_ids: Mapping[int, int]) -> list[Sequence]:
        """Takes the token of every sequence of `step` that is due one; returns those that are finished now.

        Their places are given back by `remove`, once nothing of them is in flight.
        """
        finished = []
        for micro_batch in step.micro_batches:
            for segment in micro_batch.segments:
                sequence = self._running[segment.seq_id]
                sequence.num_computed = segment.end
                if not segment.is_continued and not sequence.is_prefilling:
                    sequence.finish("length", None)
                    finished.append(sequence)
            for segment in micro_batch.scored:
                self._running[segment.seq_id].num_scored = segment.scored.stop
            for segment in micro_batch.sampled:
                sequence = self._running[segment.seq_id]
                sequence.append(token_ids[segment.seq_id])
                if sequence.finish_reason:
                    finished.append(sequence)
                elif len(sequence.output_token_ids) >= sequence.expected_tokens:
                    self._expect_more(sequence)
        return finished

    def remove(self, sequences: Iterable[Sequence]) -> dict[int, list[int]]:
        """Forgets sequences, wherever they are or are not.  R-worker -> sequences whose KV it can free."""
        released: dict[int, list[int]] = {}
        for sequence in sequences:
            if self._running.pop(sequence.seq_id, None) is None:
                self._waiting.remove(sequence)
                continue
            self._load.end(sequence.seq_id)
            released.setdefault(_place(sequence), []).append(sequence.seq_id)
            sequence.r_worker = None
            self._prospects.learn(sequence)
        return released

    def lose(self, worker: int, step: Step | None) -> Loss:
        """An R-worker is gone, in the middle of `step` or between two of them; the step did not happen.

        What it held waits to be computed again from prompt and output, and so do prompts that the step was computing.
        Whoever decodes elsewhere goes on from where it was before the step.
        """
        segments = [segment for batch in step.micro_batches for segment in batch.segments] if step else []
        starts = {segment.seq_id: segment.start for segment in segments}
        loss = Loss({}, {})
        for sequence in list(self._running.values()):
            place, is_broken_off = _place(sequence), sequence.seq_id in starts
            if place == worker or (is_broken_off and sequence.is_prefilling):
                self._put_back(sequence)
                loss.released.setdefault(place, []).append(sequence.seq_id)
            elif is_broken_off:
                loss.kept.setdefault(place, {})[sequence.seq_id] = starts[sequence.seq_id]
        self._credits.lose(worker)
        self._load.measure_memory()
        return loss

    def begin_anew(self, capacity_blocks: Iterable[int], lost: Iterable[int]) -> None:
        """All sequences are forgotten, whatever this was in the middle of.

        capacity_blocks: [num_r_workers], of the lost ones what they had.
        """
        self._begin(tuple(capacity_blocks))
        for worker in lost:
            self._credits.lose(worker)
        self._load.measure_memory()

    def homeless(self) -> list[Sequence]:
        """Those waiting that fit on no R-worker."""
        largest = self._credits.largest
        return [s for s in self._waiting if self._credits.blocks(s.max_kv_tokens) > largest]

    def gain(self, worker: int, capacity_blocks: int) -> None:
        """An R-worker has come back, empty, or is new; it gets sequences from the next step on."""
        self._credits.gain(worker, capacity_blocks)
        self._load.measure_memory()

    def check_integrity(self) -> None:
        """Asserts that credit is held by exactly the running sequences."""
        assert len(self._running) <= self._config.num_seats
        self._credits.check_integrity(self._running.values())
        self._load.check_integrity()

    def _preempt(self) -> dict[int, list[int]]:
        """Where an R-worker cannot hold the coming step, whoever ranks last goes back to waiting.

        Whoever ranks first stays, and fits alone: so with every step something comes nearer to its end.  And who
        outranks others takes the seat, or the KV, of the last of them, if there is none left.  Before all, sequences
        whose KV is of no more use, because the model takes other positions for longer ones.
        """
        preempted: dict[int, list[int]] = {}

        def put_back(victim: Sequence) -> None:
            worker = _place(victim)
            self._credits.give_back(worker, victim.num_tokens)
            self._put_back(victim)
            preempted.setdefault(worker, []).append(victim.seq_id)

        restart = self._config.restart_tokens or math.inf
        for sequence in [s for s in self._running.values() if s.prefill_tokens < restart <= s.num_tokens]:
            put_back(sequence)
        while (worker := self._credits.overdrawn()) is not None:
            put_back(max((s for s in self._running.values() if s.r_worker == worker), key=_rank))
        first = self._waiting.first()
        while first and not self._has_place(first):
            last = max(self._running.values(), key=_rank, default=first)
            if last.request.priority <= first.request.priority:
                break
            put_back(last)
        return preempted

    def _has_place(self, first: Sequence) -> bool:
        """Or nobody has to make one for it."""
        if first.request.priority >= self._lowest_priority:
            return True
        has_seat = len(self._running) < self._config.num_seats
        prospect = self._prospect(first, _Left(self._config.max_num_batched_tokens, self._config.max_scored_rows))
        return has_seat and self._load.place(prospect, is_urgent=True) is not None

    @property
    def _lowest_priority(self) -> float:
        """Of what runs; a waiting sequence with a lower number than that is urgent."""
        return max((s.request.priority for s in self._running.values()), default=-math.inf)

    def _put_back(self, sequence: Sequence) -> None:
        del self._running[sequence.seq_id]
        self._load.end(sequence.seq_id)
        sequence.preempt()
        self._waiting.put_back(sequence)

    def _prompts(self, num_decodes: int) -> tuple[list[Admission], list[Segment]]:
        """Goes on with the prompt that is on its way, then lets waiting sequences start, as far as the budget goes."""
        config = self._config
        left = _Left(config.max_num_batched_tokens - (num_decodes if config.split_fuse else 0), config.max_scored_rows)
        admissions: list[Admission] = []
        prompts: list[Segment] = []
        first, lowest = self._waiting.first(), self._lowest_priority
        outranked: list[Sequence] = []
        # At most one of each priority: the next one starts when it has ended.
        for sequence in sorted((s for s in self._running.values() if s.is_prefilling), key=_rank):
            if first and first.request.priority < sequence.request.priority:
                outranked.append(sequence)
            elif left.tokens > 0:
                prompts.append(self._chunk(sequence, left))
        self._load.begin_step(
            self._load_step + 1,
            self._waiting.max_kv_tokens,
            self._prospect(first, left) if first else None,
        )
        while left.tokens > 0 and len(self._running) < config.num_seats:
            first = self._waiting.first()
            if first is None or (prompts and not config.split_fuse and first.num_tokens > left.tokens):
                break
            if outranked and first.request.priority >= outranked[0].request.priority:
                break
            prospect = self._prospect(first, left)
            worker = self._load.place(prospect, is_urgent=first.request.priority < lowest)
            if worker is None:
                break
            self._start(first, worker, prospect)
            admissions.append(Admission(first.seq_id, worker, first.max_kv_tokens))
            prompts.append(self._chunk(first, left))
        for sequence in outranked:
            if left.tokens > 0:
                prompts.append(self._chunk(sequence, left))
        if left.tokens > 0 or len(self._running) >= config.num_seats:
            self._load.close_batch()
            self._num_places = len(self._running) if self._waiting else config.num_seats
        return admissions, prompts

    def _chunk(self, sequence: Sequence, left: _Left) -> Segment:
        """The next tokens of its prompt, as many as there may be; takes them from what is left."""
        begin, end = sequence.num_computed, sequence.prefill_tokens
        if self._config.split_fuse:
            end = min(end, begin + left.tokens)
            score_begin = max(begin, sequence.num_scored)
            if min(end, sequence.num_to_score) - score_begin > left.scored_rows:
                end = score_begin + left.scored_rows
        restarts = self._config.restart_tokens is not None
        segment = Segment(
            sequence.seq_id,
            _place(sequence),
            begin,
            sequence.token_ids[begin:end],
            sequence.prefill_tokens,
            sequence.prefill_tokens if restarts else len(sequence.request.prompt_token_ids),
            score_from=sequence.num_scored,
            score_to=sequence.num_to_score,
            is_continued=sequence.request.max_new_tokens > 0,
        )
        left.take(segment)
        return segment

    def _start(self, sequence: Sequence, worker: int, prospect: Prospect) -> None:
        self._waiting.remove(sequence)
        self._running[sequence.seq_id] = sequence
        self._load.start(sequence.seq_id, worker, prospect)
        sequence.admit(worker)
        sequence.expected_tokens = self._prospects.expected_tokens(sequence)

    def _prospect(self, sequence: Sequence, left: _Left) -> Prospect:
        """What it will hold from the coming step on, with what is left of the step's budget for its prompt."""
        step = last_chunk = self._load_step + 1
        if self._config.split_fuse:
            # Each later step has at least this for its prompt: nothing that starts after it goes before it.
            each = max(1, self._config.max_num_batched_tokens - len(self._running))
            now = left.tokens
            if sequence.num_scored < sequence.num_to_score:
                each, now = min(each, self._config.max_scored_rows), min(now, left.scored_rows)
            last_chunk += max(0, -(-(sequence.num_tokens - now) // each))
        return self._prospects.of(sequence, step, last_chunk)

    def _expect_more(self, sequence: Sequence) -> None:
        """It has outlived what was predicted, and is taken to end in the next bucket."""
        expected = self._prospects.expected_tokens(sequence)
        self._load.extend(sequence.seq_id, expected - sequence.expected_tokens)
        sequence.expected_tokens = expected


def _rank(sequence: Sequence) -> tuple[int, int]:
    """Who goes first: by priority, then as they came."""
    return sequence.request.priority, sequence.seq_id


def _place(sequence: Sequence) -> int:
    assert sequence.r_worker is not None, "a running sequence has a place"
    return sequence.r_worker
