"""What a scheduler goes by, as it was asked for or found out at the start."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fastdecode.scheduling.times import Times


class LaneLimits(NamedTuple):
    """Of a lane's step, at most."""

    tokens: int
    seats: int  # sequences


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """See `fastdecode.engine.config.EngineConfig` for what users choose."""

    max_num_seqs: int
    max_num_batched_tokens: int  # of a round
    num_lanes: int
    block_tokens: int
    capacity_blocks: tuple[int, ...]  # [num_r_workers]
    device_blocks: int = 0  # on the S-worker's device
    prompts_attend_there: bool = True  # to KV on the device, which is as exact as what the model computes
    max_num_waiting: int | None = None
    kv_policy: str = "reserve-dynamic"
    start_policy: str = "steady"
    start_interval: int = 1
    max_kv_load: int | None = None
    length_quantile: float = 0.95
    order: str = "fcfs"
    order_window: int = 64
    min_part_tokens: int | None = 8192  # of a sequence that is divided though it fits on one R-worker; None: none is
    restart_tokens: int | None = None  # a sequence that grows to so many is computed anew; see ModelFacts
    max_scored_rows: int = 1 << 30  # logits that score tokens of prompts, in a step; they are all there at a time
    prompt_kv_blocks: int = 1 << 40  # on the S-worker, for prompts that come in chunks
    prompt_kv_block_tokens: int = 16
    sharing: str = "samples"  # of KV, see `prefixes`
    times: Times | None = None  # of blocks; None: nobody knows, the device is taken first, and all lanes always
    split_fuse: bool = True  # False: prompts go whole, in steps of their own, before anything else (vLLM of 2023)

    def lane_limits(self, num_lanes: int) -> LaneLimits:
        """Of each of so many that are in use: an eighth of its tokens is kept for prompts, which decodes cannot starve
        so.
        """
        tokens, seats = -(-self.max_num_batched_tokens // num_lanes), -(-self.max_num_seqs // num_lanes)
        if self.split_fuse:
            seats = max(1, min(seats, tokens - -(-tokens // 8)))
        return LaneLimits(tokens, seats)

    @cached_property
    def num_seats(self) -> int:
        """Sequences that run at most, over however many lanes."""
        lanes_used = {1, self.num_lanes} if self.times else {self.num_lanes}
        return min(self.max_num_seqs, *(n * self.lane_limits(n).seats for n in lanes_used))
