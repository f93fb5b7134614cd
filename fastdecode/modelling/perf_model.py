"""How many R-workers a GPU needs, how large a batch may be, and how long a step will take (the paper's section 4.3).

Pure arithmetic over two measurements of one transformer block: T(B), the S-Part's seconds for B tokens, and R, one
R-worker's seconds per KV token.  B is always the batch that goes through a stage at once: one micro-batch.

    equation  here                  says
    ────────  ────────────────────  ──────────────────────────────────────────────────────────
    (7)       largest_batch         2·N·S·T(B) <= L: the batch that a latency bound leaves
    (8)       saturating_batch      E(B) = B / T(B): the batch beyond which it hardly grows
    (11)      r_workers             P = S·R·E(B) / 2: what keeps up with it
    (5, 6)    sls_peak              B·(S + F) / 2: the load where starts are staggered

The paper's S-worker keeps no KV.  One that keeps some reads it, which comes to T(B); and what goes to R-workers and
back takes the link so long for each row.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from fastdecode.scheduling.times import LaneWork


@dataclass(frozen=True)
class PerfModel:
    batches: tuple[int, ...]  # tokens, rising
    seconds: tuple[float, ...]  # T at each of them, of one block
    kv_token_seconds: float  # R, of one R-worker and one block
    num_layers: int  # N
    r_fixed_seconds: float = 0.0  # of the R-Part of one block, whatever the load: the wire, the calls
    overlap: float | None = None  # how well S and R overlap where both are busy, see step_seconds; None: perfectly
    r_row_seconds: float = 0.0  # of the S-worker's link, for q, k, v and o of a row in one block
    device_kv_token_seconds: float | None = None  # of the device, for a token of KV it keeps; None: it keeps none
    device_fixed_seconds: float = 0.0  # of its attention in one block, if it has any

    def __post_init__(self) -> None:
        if not self.batches or len(self.batches) != len(self.seconds) or self.batches[0] < 1:
            raise ValueError("T(B) needs at least one batch of one token or more, and a time for each")
        if any(b <= a for a, b in zip(self.batches, self.batches[1:], strict=False)):
            raise ValueError(f"the batches of T(B) must rise: {self.batches}")
        if any(b < a for a, b in zip(self.seconds, self.seconds[1:], strict=False)):
            raise ValueError(f"a larger batch cannot take less time: {self.seconds}; see PerfModel.measured")
        if min(self.seconds) <= 0 or self.kv_token_seconds <= 0 or self.num_layers < 1:
            raise ValueError("times and the number of layers must be above 0")
        of_device = self.device_kv_token_seconds or 0.0, self.device_fixed_seconds
        if min(self.r_fixed_seconds, self.r_row_seconds, *of_device) < 0:
            raise ValueError("no time may be below 0")

    @classmethod
    def measured(
        cls,
        batches: Sequence[int],
        seconds: Sequence[float],
        kv_token_seconds: float,
        num_layers: int,
        r_fixed_seconds: float = 0.0,
    ) -> PerfModel:
        """From times that noise may have put out of order: each is taken as at least those before it."""
        rising = tuple(itertools.accumulate(seconds, max))
        return cls(tuple(batches), rising, kv_token_seconds, num_layers, r_fixed_seconds)

    def s_seconds(self, batch: float) -> float:
        """T(B) of one block: straight lines between what was measured; below it the first time, for weights have to be
        read however few tokens there are; above it the last rate."""
        batches, seconds = self.batches, self.seconds
        if batch <= batches[0]:
            return seconds[0]
        if batch >= batches[-1]:
            return seconds[-1] * batch / batches[-1]
        i = bisect.bisect_right(batches, batch)
        share = (batch - batches[i - 1]) / (batches[i] - batches[i - 1])
        return seconds[i - 1] + share * (seconds[i] - seconds[i - 1])

    def r_seconds(self, load: float, num_r_workers: int, num_rows: float = 0.0) -> float:
        """Of one block, for `load` KV tokens spread evenly, and so many rows on their way there and back."""
        return self.r_fixed_seconds + self.r_row_seconds * num_rows + self.kv_token_seconds * load / num_r_workers

    def device_seconds(self, kv_tokens: float) -> float:
        """Of one block's attention to KV on the device; none is no work."""
        if not kv_tokens:
            return 0.0
        assert self.device_kv_token_seconds is not None, "this device keeps no KV"
        return self.device_fixed_seconds + self.device_kv_token_seconds * kv_tokens

    def efficiency(self, batch: float) -> float:
        """E(B), tokens per second through one block of the S-Part."""
        return batch / self.s_seconds(batch)

    def step_seconds(self, lanes: Sequence[LaneWork], num_r_workers: int) -> float:
        """A step of lanes that pass the layers in turn.

        One alone alternates between S and R; with more the busier of the two sets the pace, unless one lane's own way
        through both is longer:   S: A B A B      R: _ A B A B.    The device attends to its own KV while R-workers do.

        Where both take about as long, whatever varies makes each wait for the other: the pace is then the p-norm of
        the two with p = `overlap`, 2^(1/p) times the busier one at most.
        """
        s_sum = r_sum = way = 0.0
        for lane in lanes:
            s, device = self.s_seconds(lane.num_tokens), self.device_seconds(lane.device_kv_tokens)
            r = 0.0
            if num_r_workers and (lane.load or lane.num_r_rows):
                r = self.r_seconds(lane.load, num_r_workers, lane.num_r_rows)
            s_sum, r_sum = s_sum + s + device, r_sum + r
            way = max(way, s + max(device, r))
        pace = max(s_sum, r_sum)
        if pace > 0 and self.overlap is not None:
            pace *= ((s_sum / pace) ** self.overlap + (r_sum / pace) ** self.overlap) ** (1 / self.overlap)
        return self.num_layers * max(pace, way)

    def largest_batch(self, length: int, latency_s: float) -> int:
        """(7): the largest B whose sequences of `length` tokens take at most `latency_s`; 0 if none does."""

        def fits(batch: int) -> bool:
            return 2 * self.num_layers * length * self.s_seconds(batch) <= latency_s

        low, high = 0, 1
        while fits(high) and high < 1 << 40:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def saturating_batch(self, share: float = 0.9) -> int:
        """(8): the least measured B that reaches this share of the best E(B)."""
        best = max(map(self.efficiency, self.batches))
        return next(batch for batch in self.batches if self.efficiency(batch) >= share * best)

    def r_workers(self, batch: int, length: int) -> float:
        """(11): how many R-workers take as long for their part as the S-worker for a batch of such sequences."""
        return length * self.kv_token_seconds * self.efficiency(batch) / 2

    def largest_load(self, step_seconds: float, num_r_workers: int) -> int:
        """W_lim: the KV tokens that the R-workers read in a step of at most so many seconds."""
        left = step_seconds / self.num_layers - self.r_fixed_seconds
        return max(0, int(left * num_r_workers / self.kv_token_seconds))


def sls_peak(batch: int, length: int, interval: int) -> float:
    """(6): the largest load of `batch` live sequences of `length` tokens when M = B·F/S start every F steps."""
    return batch * (length + interval) / 2
