"""Storing and attending on several cores: a kernel, its threads, and the work cut into shares.

cut, cut_append   positions, blocks -> shares       (once per micro-batch, not per layer)
attend            shares ──► team: thread 0, thread 1, ...    each takes the next share when it is done with one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from cpu_attention import kernel as compiled
from cpu_attention.layout import AttentionRule, HeadFormat
from cpu_attention.sharing import Tables, find_runs
from cpu_attention.state import State
from cpu_attention.team import Team
from cpu_attention.work import NewTokens, Work, cut_tokens, cut_work

_SHARES_PER_THREAD = 2  # a core that is slowed down by others then leaves work to the rest
_LEAST_TOKENS = 32  # to append in one share: fewer are done before another thread has begun


class Kernel(Protocol):
    """`kernel` or `reference`."""

    def append(
        self, k: np.ndarray, v: np.ndarray, blocks: np.ndarray, offsets: np.ndarray, data: np.ndarray, head: HeadFormat
    ) -> None: ...

    def attend(
        self,
        q: np.ndarray,
        data: np.ndarray,
        head: HeadFormat,
        block_tables: np.ndarray,
        work: Work,
        rule: AttentionRule,
        state: State,
        new: NewTokens | None = None,
        team: Team = ...,
    ) -> None: ...


class Attention:
    def __init__(self, num_threads: int = 1, kernel: Kernel = compiled, cores: Sequence[int] = ()) -> None:
        """cores: see `Team`."""
        self._kernel = kernel
        self._num_threads = num_threads
        self._team = Team(num_threads, cores)

    def start(self) -> None:
        """Its threads, which otherwise start when they are first needed."""
        if self._kernel is compiled:
            self._team.start()

    def cut(
        self,
        positions: np.ndarray,
        window: int | None,
        block_tokens: int,
        totals: np.ndarray | None = None,
        shared: Tables | None = None,
    ) -> Work:
        """Work for `attend`: row r attends to keys 0..positions[r], or to the last `window` of them.

        totals: [num_rows], how many keys there are, which may be fewer; None: up to every row's position.
        shared: the tables by which blocks are found that are read once for several rows; None: none are.
        """
        ends = positions.astype(np.int64) + 1
        begins = np.zeros_like(ends) if window is None else np.maximum(ends - window, 0)
        if totals is not None:
            ends = np.minimum(ends, totals)
            begins = np.minimum(begins, ends)
        shares = self._num_threads * _SHARES_PER_THREAD if self._num_threads > 1 else 1
        runs = () if shared is None else find_runs(shared, begins, ends, block_tokens)
        return cut_work(begins, ends, shares, block_tokens, runs)

    def cut_append(self, blocks: np.ndarray) -> list[slice]:
        """Shares for `NewTokens`; blocks: [num_tokens], where each token goes."""
        return cut_tokens(blocks, min(self._num_threads, 1 + len(blocks) // _LEAST_TOKENS))

    def attend(
        self,
        q: np.ndarray,  # [num_rows, num_q_heads, head_dim] of any float dtype
        data: np.ndarray,  # [num_blocks, num_kv_heads, head.nbytes] uint8
        head: HeadFormat,
        block_tables: np.ndarray,  # [num_rows, max_blocks] int32
        work: Work,  # of these rows
        rule: AttentionRule,  # its window is in `work` already
        new: NewTokens | None = None,  # stored before
    ) -> np.ndarray:
        """softmax(q·K)·V of each row over its own sequence.  # like q"""
        assert not len(work.rows_of_nothing), "softmax over nothing"
        state = self._empty(q)
        self._kernel.attend(q, data, head, block_tables, work, rule, state, new, self._team)
        return state.out

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
        state = self._empty(q)
        self._kernel.attend(q, data, head, block_tables, work, replace(rule, sinks=None), state, new, self._team)
        if len(nothing := work.rows_of_nothing):
            state.out[nothing], state.maxima[nothing], state.sums[nothing] = 0, -np.inf, 0
        return state

    def _empty(self, q: np.ndarray) -> State:
        num_rows, num_q_heads, head_dim = q.shape
        return State.empty(num_rows, num_q_heads, head_dim, q.dtype)

    def close(self) -> None:
        self._team.close()
