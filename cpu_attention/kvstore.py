"""The paged KV store of one R-worker: a fixed budget of blocks, and whose they are.

    admit(seq, max_tokens)      refuses what could not be held even alone; takes no block yet
      └► extend({seq: n}) …     takes blocks as sequences grow; all that are asked for, or none
           └► release(seq)      gives them back

Who may grow together is the scheduler's to know: it counts the same blocks, and the sum of what sequences may become
is no concern of the store.  Knows nothing of attention, messages or threads.

    block_tables: (sequence, position // block_tokens) -> block
    free + held by sequences = all blocks
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cpu_attention.errors import BadRequest, KVBudgetExceeded, SequenceExists, UnknownSequence
from cpu_attention.layout import KVLayout
from cpu_attention.machine import zeroed_pages


@dataclass
class _Stored:
    max_tokens: int
    num_tokens: int = 0
    blocks: list[int] = field(default_factory=list)


class KVStore:
    def __init__(self, layout: KVLayout, budget_bytes: int) -> None:
        """Raises KVBudgetExceeded if not even one block fits.  Memory is touched only as it fills."""
        self.layout = layout
        self.num_blocks = min(budget_bytes // layout.block_bytes, np.iinfo(np.int32).max)  # tables are int32
        if self.num_blocks < 1:
            raise KVBudgetExceeded(
                f"a KV budget of {budget_bytes} bytes holds no block: {layout.block_tokens} tokens x "
                f"{layout.token_bytes} bytes per token = {layout.block_bytes} bytes per block"
            )
        # Per layer [num_blocks, num_kv_heads, bytes of a head] uint8; layout.py has what is in them.
        self.data = [
            zeroed_pages(self.num_blocks * shape.num_kv_heads * head.nbytes).reshape(
                self.num_blocks, shape.num_kv_heads, head.nbytes
            )
            for shape, head in zip(layout.layers, layout.heads, strict=True)
        ]
        # A stack, [:_num_free] of it: what was used last is taken first, while it is still in cache.
        self._free = np.arange(self.num_blocks - 1, -1, -1, dtype=np.int32)
        self._num_free = self.num_blocks
        self._stored: dict[int, _Stored] = {}

    @property
    def num_sequences(self) -> int:
        return len(self._stored)

    @property
    def num_free_blocks(self) -> int:
        return self._num_free

    def num_tokens(self, seq_id: int) -> int:
        return self._find(seq_id).num_tokens

    def check_room(self, count: int) -> None:
        """Raises KVBudgetExceeded if there can be no block for each of so many more sequences."""
        if self.num_sequences + count > self.num_blocks:
            raise KVBudgetExceeded(
                f"{count} sequences are to come, {self.num_sequences} are here; there are {self.num_blocks} blocks"
            )

    def admit(self, seq_id: int, max_tokens: int) -> None:
        """Raises SequenceExists, KVBudgetExceeded."""
        if seq_id in self._stored:
            raise SequenceExists(f"sequence {seq_id} is here already")
        if max_tokens < 1:
            raise BadRequest(f"sequence {seq_id} wants {max_tokens} tokens; the least is 1")
        needed = self.layout.num_blocks(max_tokens)
        if needed > self.num_blocks:
            raise KVBudgetExceeded(
                f"sequence {seq_id} may need {needed} blocks ({max_tokens} tokens, {self.layout.block_tokens} per "
                f"block); this R-worker has {self.num_blocks}"
            )
        self._stored[seq_id] = _Stored(max_tokens)

    def extend(self, new_tokens: Mapping[int, int]) -> None:
        """Makes room for the next tokens of sequences.  Raises UnknownSequence, KVBudgetExceeded; then for none."""
        growing = []
        for seq_id, count in new_tokens.items():
            stored = self._find(seq_id)
            total = stored.num_tokens + count
            if count < 0 or total > stored.max_tokens:
                raise KVBudgetExceeded(
                    f"sequence {seq_id} would hold {total} tokens; it was admitted for {stored.max_tokens}"
                )
            growing.append((stored, total, self.layout.num_blocks(total) - len(stored.blocks)))
        needed = sum(missing for _, _, missing in growing)
        if needed > self._num_free:
            raise KVBudgetExceeded(
                f"{len(growing)} sequences need {needed} more blocks; {self._num_free} of {self.num_blocks} are free"
            )
        for stored, total, missing in growing:
            self._num_free -= missing
            stored.blocks.extend(self._free[self._num_free : self._num_free + missing][::-1].tolist())
            stored.num_tokens = total

    def truncate(self, seq_id: int, num_tokens: int) -> None:
        """Its first `num_tokens` stay.  Raises UnknownSequence."""
        stored = self._find(seq_id)
        assert 0 <= num_tokens <= stored.num_tokens
        self._give_back(stored, self.layout.num_blocks(num_tokens))
        stored.num_tokens = num_tokens

    def release(self, seq_id: int) -> None:
        """Raises UnknownSequence."""
        self._give_back(self._find(seq_id), 0)
        del self._stored[seq_id]

    def block_tables(self, seq_ids: Sequence[int]) -> np.ndarray:
        """# [len(seq_ids), most blocks of any] int32, rows filled up with block 0"""
        rows = [self._find(seq_id).blocks for seq_id in seq_ids]
        tables = np.zeros((len(rows), max(map(len, rows), default=0)), np.int32)
        for table, blocks in zip(tables, rows, strict=True):
            table[: len(blocks)] = blocks
        return tables

    def check_integrity(self) -> None:
        """Asserts what the head of this file promises."""
        layout, held = self.layout, [block for s in self._stored.values() for block in s.blocks]
        free = self._free[: self._num_free].tolist()
        assert sorted(free + held) == list(range(self.num_blocks)), "a block is lost or held twice"
        for seq_id, stored in self._stored.items():
            assert 0 <= stored.num_tokens <= stored.max_tokens, f"sequence {seq_id} is over its limit"
            assert len(stored.blocks) == layout.num_blocks(stored.num_tokens), f"sequence {seq_id} has wrong blocks"

    def _give_back(self, stored: _Stored, keep: int) -> None:
        """All of its blocks but the first `keep`."""
        freed = stored.blocks[keep:]
        self._free[self._num_free : self._num_free + len(freed)] = freed[::-1]
        self._num_free += len(freed)
        del stored.blocks[keep:]

    def _find(self, seq_id: int) -> _Stored:
        try:
            return self._stored[seq_id]
        except KeyError:
            raise UnknownSequence(f"sequence {seq_id} is not on this R-worker") from None
