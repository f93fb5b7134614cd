"""Storing and attending on several cores: a kernel, its threads, and the parts put together.

    cut_work      begins, ends -> shares of pieces          (once per micro-batch, not per layer)
       │
    attend        shares ──► thread 0, thread 1, ...        each takes the next share when it is done with one
       │
    merge         rows that were cut, then sinks

Threads are Python's own, pinned one to a core; the kernels release the GIL.  numba's parallel loops are not used:
their thread pool does not survive a fork, and one pool per process would be shared by all callers.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from cpu_attention import kernel as compiled
from cpu_attention.layout import AttentionRule, HeadFormat
from cpu_attention.machine import pin_next
from cpu_attention.state import Pieces, State, merge, with_sinks
from cpu_attention.work import Work, cut_tokens, cut_work

_SHARES_PER_THREAD = 2  # a core that is slowed down by others then leaves work to the rest
_LEAST_TOKENS = 32  # to append in one share: fewer are done before another thread has begun


class Kernel(Protocol):
    """`kernel` or `reference`."""

    def append(
        self, k: np.ndarray, v: np.ndarray, blocks: np.ndarray, offsets: np.ndarray, data: np.ndarray, head: HeadFormat
    ) -> None: ...

    def attend_pieces(
        self,
        q: np.ndarray,
        data: np.ndarray,
        head: HeadFormat,
        block_tables: np.ndarray,
        pieces: Pieces,
        rule: AttentionRule,
        state: State,
    ) -> None: ...


class NewTokens(NamedTuple):
    """K and V to store, and where."""

    k: np.ndarray  # [num_tokens, num_kv_heads, head_dim] of any float dtype
    v: np.ndarray  # like k
    blocks: np.ndarray  # [num_tokens] int32
    offsets: np.ndarray  # [num_tokens] int32, places in the blocks


class Attention:
    def __init__(self, num_threads: int = 1, kernel: Kernel = compiled, cores: Sequence[int] = ()) -> None:
        """cores: its threads are pinned to the second and following ones; the first is for the caller to take by
        `pin_thread`.  None given: not pinned."""
        self._kernel = kernel
        self._num_threads = num_threads
        self._pool: ThreadPoolExecutor | None = None
        if num_threads > 1:
            places: queue.SimpleQueue[int] = queue.SimpleQueue()
            for index in range(1, num_threads) if cores else ():
                places.put(cores[index % len(cores)])
            self._pool = ThreadPoolExecutor(num_threads - 1, "attend", pin_next, (places,))

    def cut(self, positions: np.ndarray, window: int | None, block_tokens: int) -> Work:
        """Work for `attend`: row r attends to keys 0..positions[r], or to the last `window` of them."""
        ends = positions.astype(np.int64) + 1
        begins = np.zeros_like(ends) if window is None else np.maximum(ends - window, 0)
        shares = self._num_threads * _SHARES_PER_THREAD if self._num_threads > 1 else 1
        return cut_work(begins, ends, shares, block_tokens)

    def cut_append(self, blocks: np.ndarray) -> list[slice]:
        """Shares for `append`; blocks: [num_tokens], where each token goes."""
        return cut_tokens(blocks, min(self._num_threads, 1 + len(blocks) // _LEAST_TOKENS))

    def append(self, new: NewTokens, data: np.ndarray, head: HeadFormat, shares: Sequence[slice]) -> None:
        """See `reference.append`; shares: of these tokens, by `cut_append`."""
        self._share_out(lambda index: self._append(new, shares[index], data, head), len(shares))

    def attend(
        self,
        q: np.ndarray,  # [num_rows, num_q_heads, head_dim] float32
        data: np.ndarray,  # [num_blocks, num_kv_heads, head.nbytes] uint8
        head: HeadFormat,
        block_tables: np.ndarray,  # [num_rows, max_blocks] int32
        work: Work,  # of these rows
        rule: AttentionRule,  # its window is in `work` already
        new: NewTokens | None = None,  # the newest token of each row, stored on the way
    ) -> np.ndarray:
        """softmax(q·K)·V of each row over its own sequence.  # [num_rows, num_q_heads, head_dim] float32"""
        state = self.attend_part(q, data, head, block_tables, work, rule, new)
        return (state if rule.sinks is None else with_sinks(state, rule.sinks)).out

    def attend_part(
        self,
        q: np.ndarray,
        data: np.ndarray,
        head: HeadFormat,
        block_tables: np.ndarray,
        work: Work,
        rule: AttentionRule,
        new: NewTokens | None = None,
    ) -> State:
        """As `attend`, but can be merged with the same queries' attention over other keys.  Sinks are not in it."""
        state = State.empty(work.num_slots, *q.shape[1:])

        def attend_share(index: int) -> None:
            if new is not None:  # by the thread that reads them next
                self._append(new, work.ending_rows[index], data, head)
            pieces = work.pieces[work.shares[index]]
            self._kernel.attend_pieces(q, data, head, block_tables, pieces, rule, state)

        self._share_out(attend_share, len(work.shares))
        for slot, row in enumerate(work.split_rows.tolist(), work.num_rows):
            whole = merge(state[row : row + 1], state[slot : slot + 1])
            state.out[row], state.maxima[row], state.sums[row] = whole.out[0], whole.maxima[0], whole.sums[0]
        return state[: work.num_rows]

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown()

    def _append(self, new: NewTokens, part: slice, data: np.ndarray, head: HeadFormat) -> None:
        self._kernel.append(new.k[part], new.v[part], new.blocks[part], new.offsets[part], data, head)

    def _share_out(self, do: Callable[[int], None], num_shares: int) -> None:
        """Every share once, on this thread and the pool's."""
        remaining = iter(range(num_shares))  # taken from by all threads; `next` on it is atomic

        def take() -> None:
            for share in remaining:
                do(share)

        helpers = min(self._num_threads, num_shares) - 1
        others = [self._pool.submit(take) for _ in range(helpers)] if self._pool else []
        try:
            take()
        finally:
            for other in others:
                other.result()
