"""What a scheduler goes by, as it was asked for or found out at the start."""

from __future__ import annotations

from dataclasses import dataclass


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
    split_fuse: bool = True  # False: prompts go whole, in steps of their own, before anything else (vLLM of 2023)

    @property
    def lane_tokens(self) -> int:
        """Of a lane's step, at most."""
        return -(-self.max_num_batched_tokens // self.num_lanes)

    @property
    def lane_seats(self) -> int:
        """Sequences of a lane, at most: an eighth of its tokens is kept for prompts, which decodes cannot starve so."""
        seats = -(-self.max_num_seqs // self.num_lanes)
        return max(1, min(seats, self.lane_tokens - -(-self.lane_tokens // 8))) if self.split_fuse else seats

    @property
    def num_seats(self) -> int:
        """Sequences that run at most."""
        return min(self.max_num_seqs, self.num_lanes * self.lane_seats)
