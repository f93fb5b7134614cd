"""What a step's new rows become for the kernels: where K and V go, which blocks each query reads, who does what part.

Made once per step and used by every layer.  It takes memory beside the KV, and a few bytes of a message can ask for
terabytes of it: so that is counted first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np

from cpu_attention.errors import BadRequest
from cpu_attention.kvstore import KVStore
from cpu_attention.machine import format_bytes
from cpu_attention.multicore import Attention
from cpu_attention.sharing import Tables

# All steps that are begun may take so much, and this part of the KV.  A step of 4096 sequences, one of them with
# 250,000 tokens, takes 64 MiB.
_STEPS_BYTES, _STEPS_SHARE = 64 << 20, 8
_TOKEN_BYTES, _PIECE_BYTES = 48, 64  # about, while a step is begun
MAX_WINDOWS = 64  # of a session's layers: each cuts the work in its own way


@dataclass(frozen=True)
class NewRows:
    """Of n sequences.  The columns have been checked against the store."""

    seq_ids: np.ndarray  # [n] int64
    starts: np.ndarray  # [n] int32
    num_tokens: np.ndarray  # [n] int32
    num_queries: np.ndarray  # [n] int32
    query_starts: np.ndarray  # [n] int64, position of the first query

    @classmethod
    def of(
        cls,
        seq_ids: np.ndarray,
        starts: np.ndarray,
        num_tokens: np.ndarray,
        num_queries: np.ndarray,
        query_starts: np.ndarray | None,
    ) -> Self:
        """query_starts: None: the last query is the last token."""
        if query_starts is None:
            query_starts = starts + num_tokens.astype(np.int64) - num_queries
        return cls(seq_ids, starts, num_tokens, num_queries, query_starts.astype(np.int64))

    def num_bytes(self, store: KVStore, num_windows: int) -> int:
        """What a micro-batch of them takes, about."""
        longest = int((self.starts.astype(np.int64) + self.num_tokens).max(initial=0))
        table_bytes = 4 * store.layout.num_blocks(longest)
        num_tokens, num_queries = (int(column.sum(dtype=np.int64)) for column in (self.num_tokens, self.num_queries))
        pieces_bytes = num_queries * _PIECE_BYTES * num_windows
        return (len(self.seq_ids) + num_queries) * table_bytes + pieces_bytes + num_tokens * _TOKEN_BYTES


class MicroBatch:
    """T, A: tokens and queries, see `transport.messages`."""

    def __init__(
        self,
        step: int,
        new: NewRows,
        store: KVStore,
        attention: Attention,
        windows: set[int | None],
        num_bytes: int,
        *,
        is_partial: bool = False,
    ) -> None:
        """The store has room for the new tokens already.  Raises BadRequest if a query sees nothing, unless partial."""
        block_tokens = store.layout.block_tokens
        self.step, self.num_bytes, self.next_layer, self.is_partial = step, num_bytes, 0, is_partial
        self._starts = dict(zip(new.seq_ids.tolist(), new.starts.tolist(), strict=True))
        self.seq_ids = self._starts.keys()
        tables = store.block_tables(new.seq_ids.tolist())
        rows, token_positions = np.arange(len(tables)), _ranges(new.starts, new.num_tokens)
        positions = _ranges(new.query_starts, new.num_queries)
        totals = np.repeat(new.starts.astype(np.int64) + new.num_tokens, new.num_queries)
        # Where each token's K and V go: [T] int32 each.
        self.blocks = tables[np.repeat(rows, new.num_tokens), token_positions // block_tokens]
        self.offsets = token_positions % block_tokens
        # Which of them a thread stores; None: one token and one query for each sequence, see `NewTokens`.
        is_plain = (new.num_tokens == 1) & (new.num_queries == 1) & (new.query_starts == new.starts)
        self.append_shares = None if is_plain.all() else attention.cut_append(self.blocks)
        self.block_tables = tables[np.repeat(rows, new.num_queries)]  # [A, max_blocks] int32
        # By window, the queries' attention in shares.
        may_share = store.num_shared_blocks > 0 or bool((new.num_queries > 1).any())
        shared = Tables(tables, np.repeat(rows, new.num_queries)) if may_share else None
        self.works = {window: attention.cut(positions, window, block_tokens, totals, shared) for window in windows}
        if not is_partial and any(len(work.rows_of_nothing) for work in self.works.values()):
            raise BadRequest("a query sees none of the tokens that are here, and its answer is not to be merged")

    def start(self, seq_id: int) -> int:
        """How many tokens the sequence had before."""
        return self._starts[seq_id]


def check_room(store: KVStore, num_bytes: int, begun: Iterable[MicroBatch]) -> None:
    """Raises BadRequest if a step of so many bytes is too much beside those that are begun."""
    taken = sum(batch.num_bytes for batch in begun)
    limit = _STEPS_BYTES + store.num_blocks * store.layout.block_bytes // _STEPS_SHARE
    if num_bytes + taken > limit:
        raise BadRequest(
            f"the step takes {format_bytes(num_bytes)} beside its KV, unfinished ones {format_bytes(taken)}; "
            f"the limit is {format_bytes(limit)}: send fewer queries at a time"
        )


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts [n], counts [n] -> [sum of counts], like starts: each start, start + 1, ... behind one another."""
    ends = np.cumsum(counts)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return (np.repeat(starts, counts) + within).astype(starts.dtype)
