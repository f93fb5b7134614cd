"""One attention call on several cores: rows are dealt to threads by the KV tokens they read."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from cpu_attention.layout import AttentionRule

AttendFunction = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, AttentionRule, np.ndarray], None]


class ThreadedAttend:
    """An `attend` with the signature of `reference.attend` that cuts its rows into one share per thread.

    Rows are independent, so the result does not depend on the number of threads.  The wrapped function has to
    release the GIL for this to be faster.
    """

    def __init__(self, attend: AttendFunction, num_threads: int) -> None:
        self._attend = attend
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads - 1, "attend") if num_threads > 1 else None

    def __call__(
        self,
        q: np.ndarray,
        k_blocks: np.ndarray,
        v_blocks: np.ndarray,
        block_tables: np.ndarray,
        positions: np.ndarray,
        rule: AttentionRule,
        out: np.ndarray,
    ) -> None:
        lengths = positions + 1 if rule.window is None else np.minimum(positions + 1, rule.window)
        cuts = share_rows(lengths, self._num_threads)
        shares = [slice(begin, end) for begin, end in itertools.pairwise(cuts) if begin < end]

        def attend_share(s: slice) -> None:
            self._attend(q[s], k_blocks, v_blocks, block_tables[s], positions[s], rule, out[s])

        others = [self._pool.submit(attend_share, s) for s in shares[1:]] if self._pool else []
        for share in shares[:1]:
            attend_share(share)
        for other in others:
            other.result()

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown()


def share_rows(lengths: np.ndarray, num_shares: int) -> list[int]:
    """Row numbers that cut rows of the given lengths into contiguous shares of about equal sums.

    # [num_shares + 1], from 0 to the number of rows
    """
    if not len(lengths):
        return [0] * (num_shares + 1)
    ends = np.cumsum(lengths, dtype=np.int64)
    goals = ends[-1] * np.arange(1, num_shares) / num_shares
    return [0, *np.searchsorted(ends, goals, side="left").tolist(), len(lengths)]
