"""What one step does: immutable, made by the scheduler, read by everybody else.

Step ─┬─ MicroBatch 0 ── Segment, Segment, …     rows: by R-worker, then decodes before prompts
      └─ MicroBatch 1 ── Segment, …
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of one sequence that go through the model together."""

    seq_id: int
    r_worker: int  # which R-worker holds the sequence
    start: int  # position of the first token
    token_ids: tuple[int, ...]
    is_prompt: bool  # attends on the S-worker, from its first token on; otherwise on the R-worker

    def __post_init__(self) -> None:
        assert self.token_ids and (self.start == 0 if self.is_prompt else len(self.token_ids) == 1)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_queries(self) -> int:
        """Tokens that attend on the R-worker."""
        return 0 if self.is_prompt else self.num_tokens


@dataclass(frozen=True)
class MicroBatch:
    """Every segment's last token is sampled."""

    index: int
    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        keys = [(segment.r_worker, segment.is_prompt) for segment in self.segments]
        assert self.segments and keys == sorted(keys), "rows go by R-worker, decodes before prompts"

    @property
    def num_tokens(self) -> int:
        return sum(segment.num_tokens for segment in self.segments)


@dataclass(frozen=True)
class Admission:
    """A sequence that gets its place on an R-worker, with KV for everything it may become."""

    seq_id: int
    r_worker: int
    max_tokens: int


@dataclass(frozen=True)
class Step:
    number: int
    admissions: tuple[Admission, ...]
    micro_batches: tuple[MicroBatch, ...]
