"""How long a step takes, told from what is in it: for the simulator.  Pure.

    cost         from                                             of
    ──────────   ──────────────────────────────────────────────   ─────────────────────────────────────────
    SplitCost    the performance model: T(B), R                    S-workers and R-workers that overlap
    WholeCost    published fits, milliseconds a token              one device that does both, KV and all

Profiles are such costs with numbers from the papers; `fastdecode calibrate` measures those of a machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fastdecode.modelling.perf_model import PerfModel
from fastdecode.modelling.simulation.devices import MEMORY
from fastdecode.scheduling.parts import DEVICE, lengths
from fastdecode.scheduling.plan import Step
from fastdecode.scheduling.times import LaneWork


@dataclass(frozen=True)
class Work:
    """What a lane's step asks of the workers."""

    num_tokens: int
    num_decodes: int
    kv_tokens: tuple[int, ...]  # [num_r_workers] read by decodes
    prompt_tokens: int
    prompt_pairs: float  # sum over chunks of end² - start²: twice the query-key pairs
    device_kv_tokens: int = 0  # read by decodes on the S-worker's device
    num_r_rows: float = 0.0  # that go to R-workers and come back; half of those whose K and V only go there

    @classmethod
    def of(cls, step: Step, num_r_workers: int) -> Work:
        decodes, whole = step.decodes, slice(step.num_device_decodes, step.decodes.num_whole)
        on_device = int((decodes.positions[: step.num_device_decodes] + 1).sum())
        kv_tokens = np.bincount(decodes.r_workers[whole], decodes.positions[whole] + 1, minlength=num_r_workers)
        for row in range(decodes.num_whole, len(decodes)):
            for worker, num_tokens in lengths(step.parts[int(decodes.seq_ids[row])], int(decodes.positions[row]) + 1):
                kv_tokens[worker] += num_tokens
        stored = sum(segment.num_tokens for segment in step.prompts if segment.r_worker != DEVICE)
        pairs = sum(segment.end**2 - segment.start**2 for segment in step.prompts)
        return cls(
            step.num_tokens, len(decodes), tuple(kv_tokens.astype(int).tolist()), step.num_prompt_tokens, float(pairs),
            on_device, len(decodes) - step.num_device_decodes + stored / 2,
        )  # fmt: skip


class Cost(Protocol):
    def round_seconds(self, steps: Sequence[Step], num_r_workers: int) -> float:
        """Of a step of each lane."""


@dataclass(frozen=True)
class SplitCost:
    """By the performance model.  The slowest R-worker sets the pace of the R-Part."""

    model: PerfModel

    def round_seconds(self, steps: Sequence[Step], num_r_workers: int) -> float:
        return self.model.step_seconds([_lane_work(Work.of(step, num_r_workers)) for step in steps], num_r_workers)


def _lane_work(work: Work) -> LaneWork:
    load = max(work.kv_tokens, default=0) * len(work.kv_tokens)
    return LaneWork(work.num_tokens, load, work.device_kv_tokens, work.num_r_rows)


@dataclass(frozen=True)
class WholeCost:
    """A GPU that keeps its KV: fits of DistServe's released simulator, milliseconds.

    prefill: a + b·(tokens) + c·(tokens²);   decode: a + b·(context tokens) + c·(sequences)
    A mixed step pays for its constant once.
    """

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]
    large_decode: tuple[float, float, float]  # from `large_batch` sequences on
    large_batch: int = 95

    def round_seconds(self, steps: Sequence[Step], num_r_workers: int) -> float:
        works = [Work.of(step, num_r_workers) for step in steps]
        num_decodes = sum(work.num_decodes for work in works)
        constants, milliseconds = [], 0.0
        if any(work.prompt_tokens for work in works):
            a, b, c = self.prefill
            constants.append(a)
            milliseconds += sum(b * work.prompt_tokens + c * work.prompt_pairs for work in works)
        if num_decodes:
            a, b, c = self.large_decode if num_decodes >= self.large_batch else self.decode
            constants.append(a)
            milliseconds += b * sum(sum(work.kv_tokens) for work in works) + c * num_decodes
        return (max(constants) + milliseconds) / 1e3


def _a10_and_epycs(
    num_layers: int, hidden: int, step_ms: Sequence[float], kv_token_seconds: float, r_fixed_seconds: float
) -> SplitCost:
    """step_ms: of the paper's figure 10, shortest steps (p1) at 64, 128, 256, 512 sequences a micro-batch of two, so
    with the copies and the network that its implementation has in series with the S-Part.  hidden: numbers of K, and
    of V, of a token in a block, in 16 bits; what the A10 reads of it, `MEMORY` tells."""
    seconds = tuple(ms / 1e3 / (2 * num_layers) for ms in step_ms)
    return SplitCost(
        PerfModel(
            (64, 128, 256, 512), seconds, kv_token_seconds, num_layers, r_fixed_seconds, overlap=3.3,
            device_kv_token_seconds=4 * hidden / MEMORY["a10"].bytes_per_s,
        )
    )  # fmt: skip


# R at eight sockets: from the last steps without load stabilising (figures 11, 12: 622 ms, 897 ms), less the network
# of figure 15 (1.85 ms a layer and micro-batch of the 13b, 4/5 of it for the 7b).  overlap: the one number that is
# fitted, on the steady steps of the same figures; with a perfect overlap they would be 10-20 % shorter.
PROFILES: dict[str, Cost] = {
    "a10-8xepyc-llama-7b": _a10_and_epycs(32, 4096, (108, 134, 205, 310), 121e-9, 1.5e-3),
    "a10-8xepyc-llama-13b": _a10_and_epycs(40, 5120, (178, 222, 347, 563), 137e-9, 1.85e-3),
    "a100-tp4-opt-66b": WholeCost((29.44, 0.1514, 8.32e-6), (30.76, 4.52e-4, 0.0633), (27.47, 4.05e-4, 0.125)),
    "a100-opt-13b": WholeCost((18.10, 0.1019, 7.12e-6), (19.93, 6.27e-4, 0.0385), (7.17, 5.80e-4, 0.158)),
}


def flat_cost(s_seconds: float, kv_token_seconds: float, num_layers: int = 1) -> SplitCost:
    """An S-Part that takes the same time for any batch, as on a GPU below its knee."""
    return SplitCost(PerfModel((1, 1 << 20), (s_seconds, s_seconds), kv_token_seconds, num_layers))
