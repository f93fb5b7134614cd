"""What of prompts is in a lane's step: which go on, which sequences start, and on which R-workers.  Pure.

budget of the step ─ decodes ─► prompts on their way ─► whoever waits, first by first, while
                                                        a seat is free │ LoadControl has a place │ tokens are left
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastdecode.scheduling.config import SchedulerConfig
from fastdecode.scheduling.kv_credits import KVCredits
from fastdecode.scheduling.lane import Lane
from fastdecode.scheduling.load import Shared
from fastdecode.scheduling.load_control import LoadControl
from fastdecode.scheduling.parts import DEVICE, Part, next_bound, part_of
from fastdecode.scheduling.plan import Admission, Segment
from fastdecode.scheduling.prefix_tree import Found
from fastdecode.scheduling.prefixes import Prefixes
from fastdecode.scheduling.prompt_room import PromptRoom
from fastdecode.scheduling.prospects import Prospect, Prospects
from fastdecode.scheduling.request import Sequence
from fastdecode.scheduling.running import Running, rank
from fastdecode.scheduling.waiting import WaitingQueue

_MOST_LOOKED_UP = 1 << 22  # blocks, for the queries of a chunk that attends on its R-worker


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


class Starts:
    def __init__(
        self,
        config: SchedulerConfig,
        waiting: WaitingQueue,
        running: Running,
        load: LoadControl,
        credits: KVCredits,
        prompt_room: PromptRoom,
        prefixes: Prefixes,
        prospects: Prospects,
    ) -> None:
        """What it takes from one of them and gives to another is the scheduler's, which takes it back."""
        self._config, self._waiting, self._running = config, waiting, running
        self._load, self._credits, self._prospects = load, credits, prospects
        self._prompt_room, self._prefixes = prompt_room, prefixes
        self.step_tokens = 1 << 40  # see `Scheduler.step_tokens`
        self.use_lanes(config.num_lanes)
        self.num_places = config.num_seats  # sequences that ran when a step with budget left let others wait; or all

    def use_lanes(self, num_lanes: int) -> None:
        """So many share what runs."""
        self._num_lanes, self._lane = num_lanes, self._config.lane_limits(num_lanes)

    @property
    def _lane_tokens(self) -> int:
        """Of a lane's step, at most."""
        return min(self._lane.tokens, self.step_tokens)

    def has_place(self, first: Sequence, number: int) -> bool:
        """Or nobody has to make one for it."""
        if first.request.priority >= self._running.lowest_priority:
            return True
        has_seat = len(self._running) < self._config.num_seats
        prospect = self._prospect(first, self._whole_step, number)
        return has_seat and self._place(first, prospect, self._prefixes.find(first), is_urgent=True) is not None

    def _place(
        self, sequence: Sequence, prospect: Prospect, found: Mapping[int, Found], *, is_urgent: bool
    ) -> tuple[Part, ...] | None:
        """Where it would start now; None: it has to wait."""
        layout = self._prefixes.layout(sequence, max((one.num_tokens for one in found.values()), default=0))
        return self._load.place(prospect, is_urgent=is_urgent, shared=_shared(found), layout=layout)

    @property
    def _whole_step(self) -> _Left:
        return _Left(self._lane_tokens, self._config.max_scored_rows)

    def prompts(self, lane: Lane, number: int) -> tuple[list[Segment], list[Admission]]:
        """Goes on with the prompt that is on its way, then lets waiting sequences start, as far as the budget goes.

        number: of the round that the step will be in.
        """
        config = self._config
        left = self._whole_step
        left.tokens -= lane.num_decoding if config.split_fuse else 0
        admissions: list[Admission] = []
        prompts: list[Segment] = []
        first, lowest = self._waiting.first(), self._running.lowest_priority
        outranked: list[Sequence] = []
        # At most one of each priority, beside those that wait for what they begin with: the next one starts when it
        # has ended.
        for sequence in sorted(lane.prefilling.values(), key=rank):
            if first and first.request.priority < sequence.request.priority:
                outranked.append(sequence)
            elif left.tokens > 0 and not self._prefixes.is_to_wait(sequence):
                prompts.append(self._chunk(sequence, left, admissions))
        self._load.begin_step(
            number,
            self._waiting.max_kv_tokens,
            self._prospect(first, left, number) if first else None,
            len(self._running) + len(self._waiting),
            config.num_seats,
        )
        is_for_others = False
        while left.tokens > 0 and len(self._running) < config.num_seats:
            first = self._waiting.first()
            if first is None or (prompts and not config.split_fuse and first.num_tokens > left.tokens):
                break
            if outranked and first.request.priority >= outranked[0].request.priority:
                break
            if is_for_others := len(lane) >= self._share:
                break
            prospect, found = self._prospect(first, left, number), self._prefixes.find(first)
            parts = self._place(first, prospect, found, is_urgent=first.request.priority < lowest)
            if parts is None:
                break
            self._start(first, parts, lane, prospect, found.get(parts[0].r_worker))
            if not self._prefixes.is_to_wait(first):
                prompts.append(self._chunk(first, left, admissions))
        for sequence in outranked:
            if left.tokens > 0 and not self._prefixes.is_to_wait(sequence):
                prompts.append(self._chunk(sequence, left, admissions))
        if not is_for_others and (left.tokens > 0 or len(self._running) >= config.num_seats):
            self._load.close_batch()
            self.num_places = len(self._running) if self._waiting else config.num_seats
        return prompts, admissions

    @property
    def _share(self) -> int:
        """Sequences that a lane has, at most, so that what waits is left for the others, too."""
        fair = -(-(len(self._running) + len(self._waiting)) // self._num_lanes)
        return min(fair, self._lane.seats)

    def _chunk(self, sequence: Sequence, left: _Left, admissions: list[Admission]) -> Segment:
        """The next tokens of its prompt, as many as there may be; takes them from what is left."""
        if not sequence.is_known:
            self._begin_prompt(sequence, admissions)
        begin, end = sequence.num_prefilled, sequence.prefill_tokens
        part, bound = part_of(sequence.parts, begin), next_bound(sequence.parts, begin)
        if self._config.split_fuse or sequence.is_in_parts:
            end = min(end, begin + left.tokens)
            score_begin = max(begin, sequence.num_scored)
            if min(end, sequence.num_to_score) - score_begin > left.scored_rows:
                end = score_begin + left.scored_rows
        end = end if bound is None else min(end, bound)  # a chunk goes to one R-worker
        if begin == 0 and part.r_worker == DEVICE and self._config.prompts_attend_there:
            sequence.is_remote = True  # nothing of it is kept twice
        if begin == 0 and end < sequence.prefill_tokens and not sequence.is_remote:
            sequence.is_remote = not self._prompt_room.take(sequence.seq_id, sequence.prefill_tokens)
        if sequence.is_remote:  # its R-worker looks up the blocks of every query
            end = min(end, begin + max(1, _MOST_LOOKED_UP // self._credits.blocks(sequence.prefill_tokens)))
        restarts = self._config.restart_tokens is not None
        segment = Segment(
            sequence.seq_id,
            part.r_worker,
            begin,
            sequence.token_ids[begin:end],
            sequence.prefill_tokens,
            sequence.prefill_tokens if restarts else len(sequence.request.prompt_token_ids),
            score_from=sequence.num_scored,
            score_to=sequence.num_to_score,
            is_continued=sequence.request.max_new_tokens > 0,
            is_remote=sequence.is_remote,
            part_start=part.first_token,
        )
        left.take(segment)
        return segment

    def _begin_prompt(self, sequence: Sequence, admissions: list[Admission]) -> None:
        begun = self._prefixes.begin(sequence, self._credits.take_spare)
        capacities = self._credits.capacities
        admissions += [
            Admission(sequence.seq_id, worker, min(sequence.max_kv_tokens, capacities[worker]))
            for worker, _ in sequence.parts
            if worker not in begun or not begun[worker][1]  # others know it from when it was there last
        ]
        sequence.begin_with({first: begun[worker][0] for worker, first in sequence.parts if worker in begun})

    def _start(
        self, sequence: Sequence, parts: tuple[Part, ...], lane: Lane, prospect: Prospect, found: Found | None
    ) -> None:
        self._waiting.remove(sequence)
        self._running.add(sequence)
        changes = self._prefixes.start(sequence, parts, found, prospect.limit.end)
        self._load.start(sequence.seq_id, parts, prospect, changes, self._prefixes.num_unpaid(sequence))
        sequence.admit(parts, lane.index)
        lane.add(sequence)
        sequence.expected_tokens = self._prospects.expected_tokens(sequence)

    def _prospect(self, sequence: Sequence, left: _Left, step: int) -> Prospect:
        """What it will hold from `step` on, a round, with what is left of a step's budget there for its prompt."""
        last_chunk = step
        if self._config.split_fuse:
            # Each later step has at least this for its prompt: nothing that starts after it goes before it.
            each = max(1, self._lane_tokens - len(self._running) // self._num_lanes)
            now = left.tokens
            if sequence.num_scored < sequence.num_to_score:
                each, now = min(each, self._config.max_scored_rows), min(now, left.scored_rows)
            last_chunk += max(0, -(-(sequence.num_tokens - now) // each))
        return self._prospects.of(sequence, step, last_chunk)


def _shared(found: Mapping[int, Found]) -> dict[int, Shared]:
    return {worker: Shared(one.num_tokens, one.num_used, one.used_until) for worker, one in found.items()}
