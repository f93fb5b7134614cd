"""What one step does: immutable, made by the scheduler, read by everybody else.

Step ─┬─ MicroBatch 0 ── Segment, Segment, …     rows: by R-worker, then decodes before prompts
      └─ MicroBatch 1 ── Segment, …

Micro-batches pass every layer in their order, so one may go on with a prompt where the one before it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class Segment(NamedTuple):
    """Consecutive tokens of one sequence that go through the model together.

    A tuple, because a step has one for every running sequence.
    """

    seq_id: int
    r_worker: int  # which R-worker holds the sequence
    start: int  # position of the first token
    token_ids: tuple[int, ...]
    prompt_tokens: int  # of the prompt these are a chunk of; 0: one token that was sampled
    given_tokens: int = 0  # of that prompt, those whose positions go by its length; others by their own place
    score_from: int = 0  # positions of the prompt, from this one
    score_to: int = 0  # to before this one, whose logits are wanted: they score the token that follows
    is_continued: bool = True  # False: of a prompt after which nothing is to be generated

    @property
    def is_prompt(self) -> bool:
        """It attends on the S-worker; otherwise on the R-worker."""
        return self.prompt_tokens > 0

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

    @property
    def num_queries(self) -> int:
        """Tokens that attend on the R-worker."""
        return 0 if self.is_prompt else self.num_tokens


@dataclass(frozen=True)
class MicroBatch:
    index: int
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        keys = [(segment.r_worker, segment.prompt_tokens > 0) for segment in self.segments]
        assert keys and keys == sorted(keys), "rows go by R-worker, decodes before prompts"
        for segment in self.segments:
            if segment.prompt_tokens:
                assert segment.token_ids and segment.end <= segment.prompt_tokens, "a chunk is part of its prompt"
            else:
                assert len(segment.token_ids) == 1, "one token is decoded at a time"

    @property
    def num_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.segments)

    @cached_property
    def sampled(self) -> tuple[Segment, ...]:
        """Those whose next token is wanted, in the order of their rows."""
        return tuple(segment for segment in self.segments if segment.is_sampled)

    @cached_property
    def scored(self) -> tuple[Segment, ...]:
        """Those with positions whose logits score a prompt's tokens, in the order of their rows."""
        return tuple(segment for segment in self.segments if segment.score_to and segment.scored)


@dataclass(frozen=True)
class Admission:
    """A sequence that gets its place on an R-worker."""

    seq_id: int
    r_worker: int
    max_tokens: int  # the most KV it may come to hold


@dataclass(frozen=True)
class Step:
    number: int
    preempted: Mapping[int, list[int]]  # R-worker -> sequences whose KV it frees before anything else
    admissions: tuple[Admission, ...]
    micro_batches: tuple[MicroBatch, ...]
