"""A lane: sequences that stay together, with steps of their own.  Pure.

    lane A   schedule │ layers ───────────────── │ commit, schedule │ layers …
    lane B       layers ──── │ commit, schedule │ layers ────────────────── │ …

While one lane is committed and scheduled, the others are on the device and on the R-workers.  Those of its sequences
that decode lie in columns, because a step has one token of each; prompts on their way in lie beside them.  What a step
that is under way has rows of stays where it is until the step has ended.
"""

from __future__ import annotations

from collections import Counter, abc
from typing import NamedTuple

import numpy as np

from fastdecode.api.sampling_params import LIKELIEST, NUM_DRAW_FIELDS
from fastdecode.scheduling.parts import DEVICE, Part, lengths, part_of, reached
from fastdecode.scheduling.plan import Decodes, Segment, Step
from fastdecode.scheduling.request import Sequence

_SEQ_ID, _R_WORKER, _PART_START, _POSITION, _TOKEN, _LIMIT, _EXPECTED, _PROMPT, _SEED, _RULES = range(10)  # the columns


_BEHIND_ALL = 1 << 32  # R-workers
_FEW_ENDS = 8  # up to which each is looked for by itself: numpy's isin takes as long as ten comparisons
_WORTH_A_SWAP = 0.05  # of a lane's KV on an R-worker


class Held(NamedTuple):
    """KV tokens that sequences hold in their coming step, or in the one that is under way."""

    r_workers: np.ndarray  # [n] int64
    tokens: np.ndarray  # [n] int64

    def per_place(self, num_places: int) -> tuple[np.ndarray, np.ndarray]:
        """How many sequences, and tokens, on the device and on each R-worker.  # [num_places] int64 each"""
        places = self.r_workers - DEVICE
        counts = np.bincount(places, minlength=num_places)
        tokens = np.bincount(places, self.tokens, num_places)  # float64 holds such sums exactly
        return counts, tokens.astype(np.int64)


class Lane:
    def __init__(self, index: int) -> None:
        self.index = index
        self.step: Step | None = None  # that is under way
        self.prefilling: dict[int, Sequence] = {}
        self.leaving: dict[int, Sequence] = {}  # that ended while the step under way has rows of them
        self._sequences: list[Sequence] = []
        self._outputs: list[list[int]] = []  # of each its tokens
        self._slots: dict[int, int] = {}  # seq_id -> its place in the list, and in the columns
        self._columns = np.empty((10, 16), np.int64)
        self._draws = np.empty((16, NUM_DRAW_FIELDS))
        self._num_drawn = 0  # of those that decode, whose `Draw` is another than the likeliest token
        self._order = np.empty(0, np.int64)  # slots of the step's decodes
        self._in_parts: dict[int, Sequence] = {}  # of those that decode
        self._ends: Counter[frozenset[int]] = Counter()  # of those that decode
        self._any_end: np.ndarray | None = None  # all of these tokens; None: to be made anew

    def __len__(self) -> int:
        """Sequences, those that are leaving included."""
        return len(self._sequences) + len(self.prefilling)

    def __iter__(self) -> abc.Iterator[Sequence]:
        yield from self._sequences
        yield from self.prefilling.values()

    @property
    def num_decoding(self) -> int:
        return len(self._sequences)

    def is_under_way(self, seq_id: int) -> bool:
        return self.step is not None and seq_id in self.step.seq_ids

    def needs(self, r_worker: int) -> bool:
        """Whether its step under way, or what it has rows of, cannot go on without that one."""
        if self.step is None:
            return False
        others = [*self._in_parts.values(), *self.prefilling.values()]  # that may go there later
        return r_worker in self.step.r_workers or any(s.is_on(r_worker) and self.is_under_way(s.seq_id) for s in others)

    def add(self, sequence: Sequence) -> None:
        """One whose prompt is still to come, or that decodes."""
        sequence.lane = self.index
        if sequence.is_prefilling:
            self.prefilling[sequence.seq_id] = sequence
        else:
            self._append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """One that no step under way has rows of."""
        assert not self.is_under_way(sequence.seq_id)
        if self.prefilling.pop(sequence.seq_id, None):
            return
        self._in_parts.pop(sequence.seq_id, None)
        slot, last = self._slots.pop(sequence.seq_id), len(self._sequences) - 1
        moved, output = self._sequences.pop(), self._outputs.pop()
        if slot != last:
            self._sequences[slot], self._outputs[slot] = moved, output
            self._slots[moved.seq_id] = slot
            self._columns[:, slot] = self._columns[:, last]
            self._draws[slot] = self._draws[last]
        self._num_drawn -= sequence.request.params.draw != LIKELIEST
        ends = sequence.request.ends
        self._ends[ends] -= 1
        if not self._ends[ends]:
            del self._ends[ends]
            self._any_end = None

    def held(self) -> Held:
        own = self._decoding()
        more = [part for s in self.prefilling.values() for part in lengths(s.parts, s.num_tokens)]
        for sequence in self._in_parts.values():  # the columns have the part that grows
            position = self._position(sequence.seq_id)
            more += lengths(reached(sequence.parts, position + 1), position + 1)[:-1]
        more_workers, more_tokens = np.array(more, np.int64).reshape(-1, 2).T
        return Held(np.concatenate([own.r_workers, more_workers]), np.concatenate([own.tokens, more_tokens]))

    def decodes(self) -> Decodes:
        """Of all that decode."""
        assert self.step is None, "a lane has one step at a time"
        n = len(self._sequences)
        keys = self._columns[_R_WORKER, :n]
        num_in_parts = int(np.count_nonzero(self._columns[_PART_START, :n])) if self._in_parts else 0
        if num_in_parts:
            keys = keys + np.where(self._columns[_PART_START, :n], _BEHIND_ALL, 0)
        self._order = np.argsort(keys, kind="stable")
        columns = self._columns.take(self._order, axis=1)
        return Decodes(
            seq_ids=columns[_SEQ_ID],
            r_workers=columns[_R_WORKER],
            positions=columns[_POSITION],
            token_ids=columns[_TOKEN],
            draws=self._draws.take(self._order, axis=0) if self._num_drawn else None,
            seeds=columns[_SEED],
            num_output_tokens=columns[_POSITION] + 1 - columns[_PROMPT],
            has_rules=columns[_RULES] > 0,
            num_in_parts=num_in_parts,
        )

    def parts(self, decodes: Decodes) -> dict[int, tuple[Part, ...]]:
        """Of those in parts what there is to read, see `Step.parts`."""
        last = decodes.seq_ids[decodes.num_whole :].tolist()
        return {i: reached(self._in_parts[i].parts, self._position(i) + 1) for i in last}

    def decoded(self, step: Step, token_ids: np.ndarray) -> list[Sequence]:
        """The tokens after its step's decodes are there.  Returns sequences that may have ended, or outlived what was
        expected of them: they are to be looked at one by one.  token_ids: [n] int64, in the order of the rows
        """
        if not len(step.decodes):
            return []
        # By slot: those of a step under way are the first ones, and stay where they are.
        columns = self._columns[:, : len(self._order)]
        new, positions = columns[_TOKEN], columns[_POSITION]
        new[self._order] = token_ids
        positions += 1
        for output, token_id in zip(self._outputs, new.tolist(), strict=False):
            output.append(token_id)
        is_due = (positions >= columns[_LIMIT]) | (positions >= columns[_EXPECTED])
        if self._any_end is None:
            self._any_end = np.array(sorted(frozenset().union(*self._ends)), np.int64)
        if len(self._any_end) > _FEW_ENDS:
            is_due |= np.isin(new, self._any_end)
        else:
            for end in self._any_end.tolist():
                is_due |= new == end
        for sequence in self._in_parts.values():
            self._find_part(sequence)
        return [self._sequences[slot] for slot in np.flatnonzero(is_due).tolist()]

    def prefilled(self, segment: Segment) -> Sequence:
        """A chunk's KV is there."""
        sequence = self.prefilling[segment.seq_id]
        sequence.prefilled(segment.end)
        return sequence

    def begin_decoding(self, sequence: Sequence) -> None:
        """Its prompt is there, and its next token."""
        del self.prefilling[sequence.seq_id]
        self._append(sequence)

    def expect(self, sequence: Sequence) -> None:
        """What is expected of it has changed."""
        self._columns[_EXPECTED, self._slots[sequence.seq_id]] = _position_of(sequence, sequence.expected_tokens)

    def surplus(self, other: Lane, most: int) -> list[Sequence]:
        """What this lane is to hand to the other, so that both have as many sequences on each R-worker, and as much
        KV: for S-work is the number of tokens, and R-work the KV they read where the slowest R-worker sets the pace.

        most: that the other can take.
        """
        own, others = self._decoding(), other._decoding()
        num_places = 1 - DEVICE + int(max(own.r_workers.max(initial=0), others.r_workers.max(initial=0)))
        counts, tokens = own.per_place(num_places)
        other_counts, other_tokens = others.per_place(num_places)
        differences = counts - other_counts
        quotas = np.maximum(differences // 2, 0)
        missing = min((len(self) - len(other)) // 2, len(own.r_workers)) - int(quotas.sum())
        for place in np.argsort(quotas * 2 - differences, kind="stable").tolist() if missing > 0 else ():
            if missing > 0 and counts[place] > quotas[place]:  # first who has one more than the other
                quotas[place] += 1
                missing -= 1
        is_swap = (quotas == 0) & (differences == 0) & (tokens - other_tokens > 2 * _WORTH_A_SWAP * tokens)
        chosen: list[Sequence] = []
        for place in np.flatnonzero((quotas > 0) | is_swap).tolist():
            slots = np.flatnonzero(own.r_workers == place + DEVICE)
            of_own, of_others = own.tokens[slots], others.tokens[others.r_workers == place + DEVICE]
            if is_swap[place]:
                picked = _swap(of_own, of_others)
            else:
                picked = _neighbours(of_own, of_others, min(int(quotas[place]), most - len(chosen)))
            chosen += [self._sequences[slot] for slot in slots[picked].tolist()][: most - len(chosen)]
        return chosen

    def check_integrity(self) -> None:
        n = len(self._sequences)
        assert self._slots == {s.seq_id: slot for slot, s in enumerate(self._sequences)}
        assert sum(self._ends.values()) == n
        assert self._in_parts.keys() <= self._slots.keys()
        assert self._num_drawn == sum(s.request.params.draw != LIKELIEST for s in self._sequences)
        for slot, sequence in enumerate(self._sequences):
            assert sequence.lane == self.index and not sequence.is_prefilling
            row = self._columns[:, slot].tolist()
            assert row == _row(sequence), f"the columns of sequence {sequence.seq_id} say {row}"
            assert sequence.is_in_parts == (sequence.seq_id in self._in_parts)
            assert self._outputs[slot] is sequence.output_token_ids
            assert tuple(self._draws[slot]) == sequence.request.params.draw
        assert all(s.lane == self.index and s.is_prefilling for s in self.prefilling.values())
        assert self.leaving.keys() <= {s.seq_id for s in self}

    def _decoding(self) -> Held:
        """Of those in parts the one that grows."""
        n = len(self._sequences)
        tokens = self._columns[_POSITION, :n] + 1
        return Held(self._columns[_R_WORKER, :n], tokens - self._columns[_PART_START, :n] if self._in_parts else tokens)

    def _position(self, seq_id: int) -> int:
        """Of the token that goes through the model next, or does now."""
        return int(self._columns[_POSITION, self._slots[seq_id]])

    def _find_part(self, sequence: Sequence) -> None:
        """Where its next token goes."""
        slot = self._slots[sequence.seq_id]
        self._columns[[_R_WORKER, _PART_START], slot] = part_of(sequence.parts, int(self._columns[_POSITION, slot]))

    def _append(self, sequence: Sequence) -> None:
        slot = len(self._sequences)
        if slot == self._columns.shape[1]:
            self._columns = np.concatenate([self._columns, np.empty_like(self._columns)], axis=1)
            self._draws = np.concatenate([self._draws, np.empty_like(self._draws)])
        self._sequences.append(sequence)
        self._outputs.append(sequence.output_token_ids)
        self._slots[sequence.seq_id] = slot
        self._columns[:, slot] = _row(sequence)
        self._draws[slot] = sequence.request.params.draw
        if sequence.is_in_parts:
            self._in_parts[sequence.seq_id] = sequence
        self._num_drawn += sequence.request.params.draw != LIKELIEST
        ends = sequence.request.ends
        self._ends[ends] += 1
        if self._ends[ends] == 1:
            self._any_end = None


def hand_over(sequences: abc.Iterable[Sequence], giver: Lane, taker: Lane) -> None:
    for sequence in sequences:
        giver.remove(sequence)
        taker.add(sequence)


def _row(sequence: Sequence) -> list[int]:
    position = sequence.num_tokens - 1
    return [
        sequence.seq_id,
        *part_of(sequence.parts, position),
        position,
        sequence.output_token_ids[-1],
        _position_of(sequence, sequence.request.max_new_tokens),
        _position_of(sequence, sequence.expected_tokens),
        len(sequence.request.prompt_token_ids),
        sequence.seed - (sequence.seed >> 63 << 64),  # the same bits
        sequence.request.rules is not None,
    ]


def _position_of(sequence: Sequence, num_output_tokens: int) -> int:
    """Where the last of so many lies."""
    return len(sequence.request.prompt_token_ids) + num_output_tokens - 1


def _neighbours(own: np.ndarray, others: np.ndarray, quota: int) -> np.ndarray:
    """Which of these to hand over, so that the KV of both comes out alike.  # [quota]

    own, others: [n], [m] lengths on one R-worker.  Neighbours by length, whose sum is nearest to half the difference.
    """
    excess = (int(own.sum()) - int(others.sum())) / 2
    order = np.argsort(own, kind="stable")
    sums = np.concatenate([[0], np.cumsum(own[order])])
    first = int(np.argmin(np.abs(sums[quota:] - sums[: len(sums) - quota] - excess)))
    return order[first : first + quota]


def _swap(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """One to hand over though both have as many, if the other can give a shorter one back and they differ far less
    then; otherwise none.  own, others: [n] lengths on one R-worker.
    """
    excess = (int(own.sum()) - int(others.sum())) / 2
    theirs = np.sort(others)
    best = np.clip(np.searchsorted(theirs, own - excess), 0, len(theirs) - 1)  # of theirs, for each of ours
    left = np.abs(excess - (own - theirs[best]))
    longest = int(np.argmin(left))
    return np.array([longest] if left[longest] < excess / 2 else [], np.int64)
