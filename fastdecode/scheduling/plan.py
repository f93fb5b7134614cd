"""What one step of a lane does: immutable, made by the scheduler, read by everybody else.

Step ─┬─ decodes   a token of each sequence that decodes, as columns    rows 0 … n - 1, by R-worker
      └─ prompts   Segment, Segment, …                                  rows n …: those that attend on R-workers, by
                                                                        R-worker, then those that attend on the S-worker

So what an R-worker stores and what it attends to are slices of k, v, q and o.  Rows of sequences that lie in parts on
several R-workers come behind the others of their kind.  What lies on the S-worker's device, which goes as R-worker -1,
is the first of the decodes and the last of the prompts, so what R-workers see of a step is a slice of it, too:

    [decodes there][decodes][prompts that attend on R-workers][others][others there][prompts that attend there]
                   └──────────── queries ────────────────────┘
                   └──────────────── K and V ────────────────────────┘
                                                              └ attend to what they ┘
                                                                bring themselves
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, Self

import numpy as np

from fastdecode.scheduling.parts import DEVICE, Part


class Segment(NamedTuple):
    """Consecutive tokens of one sequence that go through the model together."""

    seq_id: int
    r_worker: int  # which R-worker gets their K and V
    start: int  # position of the first token
    token_ids: tuple[int, ...]
    prompt_tokens: int  # of the prompt these are a chunk of; 0: one token that was sampled
    given_tokens: int = 0  # of that prompt, those whose positions go by its length; others by their own place
    score_from: int = 0  # positions of the prompt, from this one
    score_to: int = 0  # to before this one, whose logits are wanted: they score the token that follows
    is_continued: bool = True  # False: of a prompt after which nothing is to be generated
    is_remote: bool = False  # of a prompt that attends on its R-worker: no room on the S-worker, or begun by a fork
    part_start: int = 0  # position of the first token that lies there; 0: all of the sequence's do

    @property
    def is_prompt(self) -> bool:
        """It attends on the S-worker, unless it is remote; a token that was sampled on the R-worker."""
        return self.prompt_tokens > 0

    @property
    def is_in_parts(self) -> bool:
        """It attends on several R-workers."""
        return self.part_start > 0 and (self.is_remote or not self.is_prompt)

    @property
    def is_sampled(self) -> bool:
        """The token after its last one is wanted."""
        return not self.is_prompt or (self.is_continued and self.end == self.prompt_tokens)

    @property
    def scored(self) -> range:
        """Positions among these whose logits score the next token of the prompt, be it one of these or not."""
        return range(max(self.start, self.score_from), min(self.end, self.score_to))

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, eq=False)
class Decodes:
    """A token of each of n sequences, which was sampled last and goes through the model now."""

    seq_ids: np.ndarray  # [n] int64
    r_workers: np.ndarray  # [n] int64, that get their K and V; rising, but for those of sequences in parts
    positions: np.ndarray  # [n] int64
    token_ids: np.ndarray  # [n] int64
    draws: np.ndarray | None = None  # [n, 5] float64, a `Draw` each of the next token; None: all are `LIKELIEST`
    # None where nobody samples.
    seeds: np.ndarray | None = None  # [n] int64, the bits of the seeds
    num_output_tokens: np.ndarray | None = None  # [n] int64, the number of the coming draw
    has_rules: np.ndarray | None = None  # [n] bool, of single tokens
    num_in_parts: int = 0  # the last ones, whose sequences lie on several R-workers

    @classmethod
    def none(cls) -> Self:
        nothing = np.empty(0, np.int64)
        return cls(nothing, nothing, nothing, nothing, None, nothing, nothing, np.empty(0, np.bool_))

    def __len__(self) -> int:
        return len(self.seq_ids)

    @property
    def num_whole(self) -> int:
        """Those before."""
        return len(self.seq_ids) - self.num_in_parts


@dataclass(frozen=True)
class Admission:
    """A sequence that gets its place on an R-worker, or a part of it does."""

    seq_id: int
    r_worker: int
    max_tokens: int  # the most KV it may come to hold there


@dataclass(frozen=True)
class Forking:
    """A sequence that begins with tokens of another, which lie where its own will."""

    seq_id: int  # admitted by the same step
    parent: int
    r_worker: int
    num_tokens: int


@dataclass(frozen=True, eq=False)
class Step:
    number: int  # of all lanes' steps
    lane: int
    preempted: Mapping[int, list[int]]  # R-worker -> sequences whose KV it frees before anything else
    admissions: tuple[Admission, ...]
    decodes: Decodes
    prompts: tuple[Segment, ...]
    forkings: tuple[Forking, ...] = ()  # after the admissions
    # R-worker -> sequence that has ended -> how many tokens of it stay, which may be none; before the admissions.
    cut: Mapping[int, Mapping[int, int]] = field(default_factory=dict)
    num_preempted: int = 0  # sequences that went back to waiting before it, also those whose KV stays
    # Sequence -> the parts that its rows see, the last of which gets their K and V, where those are several; of rows
    # that attend on R-workers.
    parts: Mapping[int, tuple[Part, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys, whole = (
            [_row_order(segment) for segment in self.prompts],
            self.decodes.r_workers[: self.decodes.num_whole],
        )
        assert keys == sorted(keys) and (np.diff(whole) >= 0).all(), "rows go by R-worker"
        in_parts = [*self.decodes.seq_ids[self.decodes.num_whole :].tolist()]
        in_parts += [segment.seq_id for segment in self.prompts if segment.is_in_parts]
        assert sorted(in_parts) == sorted(self.parts), "it is known where they lie"
        assert len(self.decodes) or self.prompts, "a step has work"
        for segment in self.prompts:
            assert segment.token_ids and segment.end <= segment.prompt_tokens, "a chunk is part of its prompt"

    @classmethod
    def of(
        cls,
        segments: Iterable[Segment],
        number: int = 0,
        lane: int = 0,
        parts: Mapping[int, tuple[Part, ...]] | None = None,
    ) -> Self:
        """From the plain form, in any order."""
        rows = sorted(segments, key=lambda segment: (segment.part_start > 0, segment.r_worker))
        decodes = [(s.seq_id, s.r_worker, s.start, *s.token_ids) for s in rows if not s.is_prompt]
        columns = np.array(decodes, np.int64).reshape(-1, 4).T.copy()
        num_in_parts = sum(s.part_start > 0 for s in rows if not s.is_prompt)
        return cls(
            number, lane, {}, (), replace(Decodes(*columns), num_in_parts=num_in_parts),
            in_row_order(s for s in rows if s.is_prompt), parts=parts or {},
        )  # fmt: skip

    @cached_property
    def seq_ids(self) -> frozenset[int]:
        """Of all whose tokens it has."""
        return frozenset(self.decodes.seq_ids.tolist()) | {segment.seq_id for segment in self.prompts}

    @cached_property
    def r_workers(self) -> frozenset[int]:
        """That have rows of it."""
        in_parts = (part.r_worker for parts in self.parts.values() for part in parts)
        places = {*np.unique(self.decodes.r_workers).tolist(), *(s.r_worker for s in self.prompts), *in_parts}
        return frozenset(places - {DEVICE})

    @property
    def num_prompt_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.prompts)

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + self.num_prompt_tokens

    @cached_property
    def remote_prompts(self) -> tuple[Segment, ...]:
        """Those that attend on R-workers."""
        return tuple(segment for segment in self.prompts if segment.is_remote and segment.r_worker != DEVICE)

    @cached_property
    def local_prompts(self) -> tuple[Segment, ...]:
        """Those that attend on the S-worker to what they bring themselves."""
        return tuple(segment for segment in self.prompts if not segment.is_remote)

    @cached_property
    def written_prompts(self) -> tuple[Segment, ...]:
        """Of them those whose KV goes to R-workers."""
        return tuple(segment for segment in self.local_prompts if segment.r_worker != DEVICE)

    @cached_property
    def device_prompts(self) -> tuple[Segment, ...]:
        """Those whose KV stays on the S-worker's device; their rows are the last ones."""
        return tuple(segment for segment in self.prompts if segment.r_worker == DEVICE)

    @cached_property
    def num_device_decodes(self) -> int:
        """The first ones."""
        return int(np.count_nonzero(self.decodes.r_workers == DEVICE))

    @property
    def queries(self) -> slice:
        """Rows that attend on R-workers."""
        end = len(self.decodes) + sum(segment.num_tokens for segment in self.remote_prompts)
        return slice(self.num_device_decodes, end)

    @property
    def stored(self) -> slice:
        """Rows whose K and V go to R-workers."""
        of_device = sum(segment.num_tokens for segment in self.device_prompts)
        return slice(self.num_device_decodes, self.num_tokens - of_device)

    @cached_property
    def sampled_prompts(self) -> tuple[Segment, ...]:
        """Those whose next token is wanted.  It is, of all decodes, whose rows come before theirs."""
        return tuple(segment for segment in self.prompts if segment.is_sampled)

    @property
    def num_sampled(self) -> int:
        return len(self.decodes) + len(self.sampled_prompts)

    @cached_property
    def sampled(self) -> list[int]:
        """Sequences whose next token is wanted, in the order of their rows."""
        return self.decodes.seq_ids.tolist() + [segment.seq_id for segment in self.sampled_prompts]

    @cached_property
    def scored(self) -> tuple[Segment, ...]:
        """Those with positions whose logits score a prompt's tokens, in the order of their rows."""
        return tuple(segment for segment in self.prompts if segment.score_to and segment.scored)

    @property
    def segments(self) -> list[Segment]:
        """The plain form of all rows, for whoever reads a step: what runs it goes by columns."""
        d = self.decodes
        columns = (column.tolist() for column in (d.seq_ids, d.r_workers, d.positions, d.token_ids))
        decodes = [Segment(i, worker, at, (token,), 0) for i, worker, at, token in zip(*columns, strict=True)]
        for row in range(d.num_whole, len(d)):
            decodes[row] = decodes[row]._replace(part_start=self.parts[decodes[row].seq_id][-1].first_token)
        return [*decodes, *self.prompts]


def in_row_order(prompts: Iterable[Segment]) -> tuple[Segment, ...]:
    return tuple(sorted(prompts, key=_row_order))


def _row_order(prompt: Segment) -> tuple[bool, bool, bool, int]:
    is_here = prompt.r_worker == DEVICE
    return is_here, prompt.is_remote == is_here, prompt.is_in_parts, prompt.r_worker
