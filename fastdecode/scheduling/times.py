"""What a policy asks a performance model.  Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol


class LaneWork(NamedTuple):
    """What a lane's step asks for in each block."""

    num_tokens: float  # through the S-Part
    load: float = 0.0  # KV tokens that the R-workers read together; what counts is that they wait for the slowest
    device_kv_tokens: float = 0.0  # that the S-worker's device reads
    num_r_rows: float = 0.0  # of its tokens those that R-workers attend for; one they only store goes half the way


class Times(Protocol):
    def step_seconds(self, lanes: Sequence[LaneWork], num_r_workers: int) -> float:
        """Of a step of these lanes, in all blocks."""
