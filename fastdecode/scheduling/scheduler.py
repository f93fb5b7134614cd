"""Which tokens go through the model next.  Pure: no torch, no sockets, no clock but the steps.

Continuous batching with SplitFuse: every step carries one token of each running sequence of its lane, and fills up with
prompts, cut where the step's budget ends.  Sequences join and leave between any two steps of their lane.

    add ─► waiting ──schedule──► running: prefilling ─► decoding ──commit──► finished ──remove─►
              ▲  who is first?         │ may it start, and where?
              │  WaitingQueue          │ LoadControl, Predictor
              └──────preempted─────────┘ a guess was wrong, and its R-worker is full

Lanes take turns: `schedule(lane)` while it has no step under way, `commit` when that has ended.  Memory, load and the
queue are common to all of them.  Load is counted in rounds, in each of which every lane has one step.  Where times are
known, one lane has all while nothing is hidden by several: the others hand over what they have, and have no steps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from fastdecode.errors import RequestError
from fastdecode.scheduling.config import SchedulerConfig
from fastdecode.scheduling.kv_credits import KVCredits
from fastdecode.scheduling.lane import Lane, hand_over
from fastdecode.scheduling.load_control import LoadControl, num_shared
from fastdecode.scheduling.parts import DEVICE, lengths, reached
from fastdecode.scheduling.placement import Moved, Placement
from fastdecode.scheduling.plan import Decodes, Step, in_row_order
from fastdecode.scheduling.predictor import Learned, Predictor
from fastdecode.scheduling.prefix_tree import Change
from fastdecode.scheduling.prefixes import PrefixCounts, Prefixes
from fastdecode.scheduling.prompt_room import PromptRoom
from fastdecode.scheduling.prospects import Prospects
from fastdecode.scheduling.request import Sequence
from fastdecode.scheduling.running import Running, rank
from fastdecode.scheduling.starts import Starts
from fastdecode.scheduling.waiting import WaitingQueue

_MOST_FILLINGS = 4  # of all seats, that wait


@dataclass(frozen=True)
class Loss:
    """What is to be done on the R-workers that are there, after steps did not happen."""

    broken: frozenset[int]  # lanes whose steps did not happen
    released: dict[int, list[int]]  # R-worker, the lost one too -> sequences that start anew
    kept: dict[int, dict[int, int]]  # R-worker -> sequence -> how many tokens of it stay


class Scheduler:
    def __init__(self, config: SchedulerConfig, predictor: Predictor | None = None) -> None:
        self._config = config
        self._prospects = Prospects(predictor or Learned(), config.length_quantile)
        self._num_steps = 0
        self._round = 1
        self._lanes_in_round: set[int] = set()  # that had their step in it
        self._step_tokens = config.lane_limits(1 if config.times else config.num_lanes).tokens
        self.prefix_counts = PrefixCounts()
        self.num_moves = 0  # of sequences from R-workers to the device
        self._begin(config.capacity_blocks)

    def _begin(self, capacity_blocks: tuple[int, ...]) -> None:
        """With no sequences at all."""
        config = self._config
        self._waiting = WaitingQueue(config.order, config.order_window, self._prospects.job_length)
        self._running = Running()
        self._lanes = [Lane(index) for index in range(config.num_lanes)]
        self._freed: dict[int, list[int]] = {}  # R-worker -> sequences that nobody was told to free yet
        self._preempted: dict[int, list[int]] = {}  # likewise, by the next step
        self._num_preempted = 0  # since the last step; some are to be found again, and not freed
        self._credits = KVCredits(config.kv_policy, capacity_blocks, config.block_tokens, config.device_blocks)
        self._placement = Placement(config.times, config.num_lanes) if config.times else None
        self._num_lanes = config.num_lanes  # in use
        self._moving: set[int] = set()  # sequences that are to go from R-workers to the device
        self._load = LoadControl(
            self._credits,
            start_policy=config.start_policy,
            start_interval=config.start_interval,
            max_kv_load=config.max_kv_load,
            min_part_tokens=config.min_part_tokens,
            placement=self._placement,
        )
        self._prompt_room = PromptRoom(config.prompt_kv_blocks, config.prompt_kv_block_tokens)
        # Where positions go by how long a prompt is, KV of one is of no use to a longer one.
        sharing = config.sharing if config.restart_tokens is None else "nothing"
        self._prefixes = Prefixes(config.block_tokens, sharing, self.prefix_counts)
        self._starts = Starts(
            config, self._waiting, self._running, self._load, self._credits, self._prompt_room, self._prefixes,
            self._prospects,
        )  # fmt: skip
        self._starts.step_tokens = self._step_tokens

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_places(self) -> int:
        """Sequences that run or can at once: all seats, or what ran when a step with budget left let others wait."""
        return max(self._starts.num_places, len(self._running)) if self._running else self._config.num_seats

    @property
    def kv_tokens(self) -> tuple[int, ...]:
        """Of what ran when a step was scheduled last, per R-worker, prompts on their way in counted whole."""
        return self._credits.tokens

    @property
    def kv_capacity_tokens(self) -> list[int]:
        """[num_r_workers]"""
        return self._credits.capacity_tokens

    @property
    def device_kv_tokens(self) -> int:
        """As `kv_tokens`, on the S-worker's device."""
        return self._credits.device_tokens

    @property
    def device_kv_capacity_tokens(self) -> int:
        return self._credits.capacities.get(DEVICE, 0)

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
        """All of them or none.  Raises RequestError if the R-workers could not hold one, or if the queue is full.

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
        """Raises RequestError if neither the R-workers together nor the device could ever hold so many."""
        needed = self._credits.blocks(max_kv_tokens)
        if needed > self._credits.most:
            size = self._config.block_tokens
            raise RequestError(
                "kv_budget_exceeded",
                f"prompt + output is {max_kv_tokens} tokens of KV = {needed} blocks of {size}; "
                f"{self._credits.describe()}: raise it or lower max_tokens",
            )

    @property
    def num_lanes(self) -> int:
        return len(self._lanes)

    @property
    def num_lanes_in_use(self) -> int:
        """Those that others have handed over to, or all."""
        return self._num_lanes

    @property
    def num_plans(self) -> int:
        """Of where KV is kept, that were made."""
        return self._placement.num_plans if self._placement else 0

    @property
    def under_way(self) -> list[int]:
        """Lanes whose step is."""
        return [lane.index for lane in self._lanes if lane.step]

    @property
    def steps_under_way(self) -> list[Step]:
        return [lane.step for lane in self._lanes if lane.step]

    @property
    def step_tokens(self) -> int:
        """Of a lane's step, at most; but all that decode are in it."""
        return self._step_tokens

    @step_tokens.setter
    def step_tokens(self, num_tokens: int) -> None:
        self._step_tokens = self._starts.step_tokens = num_tokens

    def schedule(self, index: int = 0) -> Step | None:
        """The next step of a lane that has none under way; None if there is nothing to do, or no memory for it before
        another lane has had its step.
        """
        lane = self._lanes[index]
        assert lane.step is None, "a lane has one step at a time"
        if index == 0 and self._placement:
            self._use_lanes(self._placement)
        if index >= self._num_lanes:
            return None
        self._balance(lane)
        self._count()
        if not self._preempt(self._round_of(lane)):
            return None
        decodes = lane.decodes()
        prompts, admissions = self._starts.prompts(lane, self._round_of(lane))
        forkings = self._prefixes.make_room(self._credits.num_free_blocks)
        if prompts and not self._config.split_fuse:
            decodes = Decodes.none()
        if not len(decodes) and not prompts:
            return None
        self._num_steps += 1
        if len(decodes) or self._config.split_fuse:
            has_had_one = index in self._lanes_in_round
            self._round = self._round_of(lane)
            self._lanes_in_round = {index} if has_had_one else self._lanes_in_round | {index}
        preempted, self._preempted = self._preempted, {}
        parts = lane.parts(decodes)
        parts |= {s.seq_id: reached(self._running[s.seq_id].parts, s.end) for s in prompts if s.is_in_parts}
        lane.step = Step(
            self._num_steps, index, preempted, tuple(admissions), decodes, in_row_order(prompts), tuple(forkings),
            self._prefixes.take_cuts(), self._num_preempted, parts,
        )  # fmt: skip
        self._num_preempted = 0
        return lane.step

    def commit(self, step: Step, token_ids: np.ndarray) -> list[Sequence]:
        """Takes the tokens that are due after a step, in the order of `Step.sampled`; returns sequences that are
        finished now.

        Their places are given back by `remove`, once nothing of them is in flight.
        """
        lane = self._lanes[step.lane]
        assert lane.step is step, "a step is committed once"
        lane.step = None
        finished = []
        for sequence in lane.decoded(step, token_ids[: len(step.decodes)]):
            sequence.look_for_end()
            if sequence.finish_reason:
                finished.append(sequence)
            elif len(sequence.output_token_ids) >= sequence.expected_tokens:
                self._expect_more(sequence)
                lane.expect(sequence)
        for segment in step.scored:
            self._running[segment.seq_id].num_scored = segment.scored.stop
        first_tokens = iter(token_ids[len(step.decodes) :].tolist())
        for segment in step.prompts:
            sequence = lane.prefilled(segment)
            self._prefixes.note(sequence)
            if not sequence.is_prefilling:
                self._prompt_room.give_back(segment.seq_id)
            if segment.is_sampled:
                sequence.append(next(first_tokens))
                if not sequence.finish_reason and len(sequence.output_token_ids) >= sequence.expected_tokens:
                    self._expect_more(sequence)
                lane.begin_decoding(sequence)
            elif not segment.is_continued and not sequence.is_prefilling:
                sequence.finish("length", None)
            if sequence.finish_reason:
                finished.append(sequence)
        gone, lane.leaving = lane.leaving, {}
        for sequence in gone.values():
            self._let_go(sequence, self._freed)
        self._close(lane)
        return [sequence for sequence in finished if sequence.seq_id not in gone]

    def remove(self, sequences: Iterable[Sequence]) -> dict[int, list[int]]:
        """Forgets sequences, wherever they are or are not.  R-worker -> sequences whose KV it can free.

        What a step under way has rows of is among those that a later call returns, after that step's commit.
        """
        for sequence in sequences:
            lane = self._lanes[sequence.lane]
            if sequence.seq_id not in self._running or sequence.seq_id in lane.leaving:
                self._waiting.remove(sequence)
            elif lane.is_under_way(sequence.seq_id):
                lane.leaving[sequence.seq_id] = sequence
            else:
                self._let_go(sequence, self._freed)
        freed, self._freed = self._freed, {}
        return freed

    def lose(self, worker: int, unbegun: Collection[int] = ()) -> Loss:
        """An R-worker is gone, and with it the steps under way that have rows there; those did not happen.

        What it held waits to be computed again from prompt and output, and so do prompts that those steps were
        computing.  Whoever decodes elsewhere goes on from where it was before its step.

        unbegun: lanes whose steps were scheduled, and perhaps not told to all R-workers.
        """
        lost = {lane.index for lane in self._lanes if lane.needs(worker)}
        loss = self._undo(lost.union(unbegun), unbegun, worker)
        for pending in (self._preempted, self._freed):
            pending.pop(worker, None)
        self._prefixes.lose(worker)
        self._credits.lose(worker)
        self._load.measure_memory()
        return loss

    def break_off(self, unbegun: Collection[int] = (), *, all_anew: bool = False) -> Loss:
        """All steps under way did not happen, though no R-worker is gone; the rest is as in `lose`.

        all_anew: what decodes waits to be computed again, like prompts.
        """
        return self._undo(self.under_way, unbegun, all_anew=all_anew)

    def kept(self, worker: int) -> set[int]:
        """Sequences that have ended, and whose KV the R-worker has still, for others to begin with."""
        return self._prefixes.kept(worker)

    @property
    def keeps_something(self) -> bool:
        """Of sequences that have ended, on any R-worker."""
        return self._prefixes.keeps_something

    def forget_prefixes(self) -> None:
        """KV of sequences that have ended is not begun with any more; R-workers are told by the next step."""
        self._prefixes.forget_all()

    def begin_anew(self, capacity_blocks: Iterable[int], lost: Iterable[int]) -> None:
        """All sequences are forgotten, whatever this was in the middle of.

        capacity_blocks: [num_r_workers], of the lost ones what they had.
        """
        self._begin(tuple(capacity_blocks))
        for worker in lost:
            self._credits.lose(worker)
        self._load.measure_memory()

    def homeless(self) -> list[Sequence]:
        """Those waiting for which the R-workers have no room."""
        most = self._credits.most
        return [s for s in self._waiting if self._credits.blocks(s.max_kv_tokens) > most]

    def gain(self, worker: int, capacity_blocks: int) -> None:
        """An R-worker has come back, empty, or is new; it gets sequences from the next step on."""
        self._credits.gain(worker, capacity_blocks)
        self._load.measure_memory()

    def check_integrity(self) -> None:
        """Asserts that credit is held by exactly the running sequences, and that each is in one lane."""
        assert len(self._running) <= self._config.num_seats
        self._credits.check_integrity(self._running)
        self._load.check_integrity()
        assert sorted(s.seq_id for s in self._running) == sorted(
            sequence.seq_id for lane in self._lanes for sequence in lane
        )
        self._running.check_integrity()
        self._prefixes.check_integrity(self._running)
        self._prompt_room.check_integrity({seq_id for lane in self._lanes for seq_id in lane.prefilling})
        for lane in self._lanes:
            lane.check_integrity()
            assert len(lane) <= self._config.lane_limits(1 if self._placement else len(self._lanes)).seats

    def _undo(
        self, lanes: Collection[int], unbegun: Collection[int], lost: int | None = None, *, all_anew: bool = False
    ) -> Loss:
        """Steps of these lanes, some of which may not have been told to all; see `lose`.  lost: R-worker"""
        broken = [lane for lane in self._lanes if lane.step and lane.index in lanes]
        loss = Loss(frozenset(lane.index for lane in broken), {}, {})
        for lane in broken:
            assert lane.step
            for segment in lane.step.segments:
                if segment.seq_id in lane.leaving:
                    continue
                parts = self._running[segment.seq_id].parts
                if all_anew or segment.is_prompt or any(part.r_worker == lost for part in parts):
                    for part in parts:
                        loss.released.setdefault(part.r_worker, []).append(segment.seq_id)
                else:
                    for r_worker, num_tokens in lengths(reached(parts, segment.end), segment.start):
                        loss.kept.setdefault(r_worker, {})[segment.seq_id] = num_tokens
            if lane.index in unbegun:
                for r_worker, seq_ids in lane.step.preempted.items():
                    loss.released.setdefault(r_worker, []).extend(seq_ids)
                for r_worker, cut in lane.step.cut.items():  # of those that may have been told nobody keeps any more
                    self._prefixes.forget(r_worker, cut)
                    loss.released.setdefault(r_worker, []).extend(cut)
            lane.step = None
            gone, lane.leaving = lane.leaving, {}
            for sequence in gone.values():
                self._let_go(sequence, loss.released)
        to_wait = {(r_worker, seq_id) for r_worker, seq_ids in loss.released.items() for seq_id in seq_ids}
        for sequence in list(self._running):
            places = [(part.r_worker, sequence.seq_id) for part in sequence.parts]
            if (lost is not None and sequence.is_on(lost)) or not to_wait.isdisjoint(places):
                self._put_back(sequence, may_stay=False)
                for r_worker, seq_id in places:
                    if (r_worker, seq_id) not in to_wait:
                        loss.released.setdefault(r_worker, []).append(seq_id)
        return loss

    def _round_of(self, lane: Lane) -> int:
        """Which one the lane's coming step is in: it has one in each."""
        return self._round + (lane.index in self._lanes_in_round)

    def _balance(self, giver: Lane) -> None:
        """A lane that has more than another hands some over: they are in the other's next step."""
        if self._num_lanes == 1:
            return
        taker = min((lane for lane in self._lanes if lane is not giver), key=len)
        most = self._config.lane_limits(self._num_lanes).seats - len(taker)
        hand_over(giver.surplus(taker, most), giver, taker)

    def _use_lanes(self, placement: Placement) -> None:
        """As many as are best for what runs, from the first one's coming step on."""
        load = num_r_workers = 0
        if placement.num_on_r_workers:
            num_r_workers = sum(capacity > 0 for capacity in self._credits.capacity_tokens)
            load = max(self._credits.tokens) * num_r_workers
        num_lanes = placement.num_lanes(self._credits.device_tokens, load, num_r_workers)
        if num_lanes != self._num_lanes:
            self._num_lanes = num_lanes
            self._starts.use_lanes(num_lanes)
        for lane in self._lanes[self._num_lanes :]:
            self._close(lane)

    def _close(self, lane: Lane) -> None:
        """One that is not in use has nothing, once its step has ended, but those that have ended with it."""
        if lane.index >= self._num_lanes and lane.step is None:
            hand_over([sequence for sequence in lane if not sequence.finish_reason], lane, self._lanes[0])

    def _count(self) -> None:
        """What R-workers hold, in the steps under way and in those to come."""
        held = [lane.held() for lane in self._lanes]
        self._credits.count(np.concatenate([h.r_workers for h in held]), np.concatenate([h.tokens for h in held]))

    def _preempt(self, number: int) -> bool:
        """Where an R-worker cannot hold what is to come, whoever ranks last goes back to waiting.

        Whoever ranks first stays, and fits alone: so with every step something comes nearer to its end.  (Unless it has
        outgrown its R-worker; then it starts again, in parts.)  And who outranks others takes the seat, or the KV, of
        the last of them, if there is none left.  Before all, sequences whose KV is of no more use, because the model
        takes other positions for longer ones; and those that move to the device, to be computed again there.

        Whether there is room now: one whose step is under way can go back only when that has ended.
        number: of the round that is to come.
        """

        def put_back(victim: Sequence) -> None:
            parts = victim.parts
            changes, to_free = self._put_back(victim, may_stay=True)
            self._num_preempted += 1
            self._credits.give_back(parts, victim.num_tokens, num_shared(changes))
            for worker in to_free:
                self._preempted.setdefault(worker, []).append(victim.seq_id)

        restart = self._config.restart_tokens
        if restart is not None:
            for sequence in [s for s in self._running if s.prefill_tokens < restart <= s.num_tokens]:
                if not self._is_under_way(sequence):
                    put_back(sequence)
        for sequence in self._to_move():
            put_back(sequence)
            self.num_moves += 1
        while (worker := self._credits.overdrawn()) is not None:
            last = max((s for s in self._running if s.is_on(worker)), key=rank)
            if self._is_under_way(last):
                return False
            put_back(last)
        first = self._waiting.first()
        while first and not self._starts.has_place(first, number):
            last = max(self._running, key=rank, default=first)
            if last.request.priority <= first.request.priority or self._is_under_way(last):
                break
            put_back(last)
        return True

    def _to_move(self) -> list[Sequence]:
        """From R-workers to the device: once that is worth it all that is there, each when no step under way has rows
        of it.
        """
        if self._placement and not self._waiting and not self._moving and self._placement.looks_for_moves():
            self._moving = self._worth_moving(self._placement)
        if not self._moving:
            return []
        there = [s for s in self._running if s.seq_id in self._moving and not s.is_on(DEVICE)]
        free = [sequence for sequence in there if not self._is_under_way(sequence)]
        self._moving = {s.seq_id for s in there} - {s.seq_id for s in free}
        return free

    def _worth_moving(self, placement: Placement) -> set[int]:
        """All that is on R-workers, or nothing."""
        there = [s for s in self._running if not s.is_on(DEVICE)]
        if any(s.max_kv_tokens > self.device_kv_capacity_tokens for s in there):
            return set()
        moved = [Moved(s.num_tokens, s.expected_tokens - len(s.output_token_ids)) for s in there]
        num_blocks = sum(self._credits.blocks(one.num_tokens + one.num_steps) for one in moved)
        if num_blocks > self._credits.device_room or any(s.is_prefilling for s in self._running):
            return set()
        num_r_workers = sum(capacity > 0 for capacity in self._credits.capacity_tokens)
        is_worth_it = placement.is_worth_moving(
            moved,
            self._credits.device_tokens,
            max(self._credits.tokens) * num_r_workers,
            num_r_workers,
            self._config.lane_limits(1).tokens,
        )
        return {sequence.seq_id for sequence in there} if is_worth_it else set()

    def _is_under_way(self, sequence: Sequence) -> bool:
        return self._lanes[sequence.lane].is_under_way(sequence.seq_id)

    def _let_go(self, sequence: Sequence, freed: dict[int, list[int]]) -> None:
        """One that has ended, and nothing under way has rows of."""
        _, to_free = self._take_out(sequence, may_stay=sequence.finish_reason is not None)
        for worker in to_free:
            freed.setdefault(worker, []).append(sequence.seq_id)
        sequence.parts = ()
        self._prospects.learn(sequence)

    def _put_back(self, sequence: Sequence, *, may_stay: bool) -> tuple[list[tuple[int, Change]], list[int]]:
        taken = self._take_out(sequence, may_stay=may_stay)
        sequence.preempt()
        self._waiting.put_back(sequence)
        return taken

    def _take_out(self, sequence: Sequence, *, may_stay: bool) -> tuple[list[tuple[int, Change]], list[int]]:
        """Of the running.  What that changes for others on each R-worker, and those that can free its KV."""
        self._running.remove(sequence)
        self._lanes[sequence.lane].remove(sequence)
        self._prompt_room.give_back(sequence.seq_id)
        changes, to_free = self._prefixes.leave(sequence, may_stay=may_stay)
        self._load.end(sequence.seq_id, changes)
        return changes, to_free

    def _expect_more(self, sequence: Sequence) -> None:
        """It has outlived what was predicted, and is taken to end in the next bucket."""
        expected = self._prospects.expected_tokens(sequence)
        self._load.extend(sequence.seq_id, expected - sequence.expected_tokens)
        sequence.expected_tokens = expected
