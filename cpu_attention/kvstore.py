"""The paged KV store of one R-worker: a fixed budget of blocks, and whose they are.

    admit(seq, max_tokens)              refuses what could not be held even alone; takes no block yet
      ├► fork(children, parents, n)     they begin with the first n tokens of others, and share their full blocks
      └► extend({seq: n}) …             takes blocks as sequences grow; all that are asked for, or none
           ├► truncate(seq, n)          forgets what came after its first n tokens
           └► release(seq)              gives its blocks back, but for those that others have, too

A block is written by its one owner: a partial tail is copied for whoever begins with it, and what lies in a block that
others have, too, after a sequence went back into it, before the sequence goes on.
Who may grow together is the scheduler's to know: it counts the same blocks, and the sum of what sequences may become
is no concern of the store.  Knows nothing of attention, messages or threads.

    block_tables: (sequence, position // block_tokens) -> block
    owners of a block = sequences in whose table it is; free blocks have none
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
        self._owners = np.zeros(self.num_blocks, np.int32)
        self._num_shared = 0  # blocks with more than one
        self._stored: dict[int, _Stored] = {}

    @property
    def num_sequences(self) -> int:
        return len(self._stored)

    @property
    def seq_ids(self) -> set[int]:
        return set(self._stored)

    @property
    def num_free_blocks(self) -> int:
        return self._num_free

    @property
    def num_shared_blocks(self) -> int:
        """That several sequences have."""
        return self._num_shared

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

    def fork(self, children: Sequence[int], parents: Sequence[int], num_tokens: Sequence[int]) -> None:
        """children[i], admitted and still empty, begins with the first num_tokens[i] tokens of parents[i].

        Raises UnknownSequence, BadRequest, KVBudgetExceeded; then nobody does.
        """
        if len(set(children)) < len(children) or not set(children).isdisjoint(parents):
            raise BadRequest("a sequence is forked to twice, or is parent and child at once")
        forks = []
        for child_id, parent_id, count in zip(children, parents, num_tokens, strict=True):
            child, parent = self._find(child_id), self._find(parent_id)
            if child.num_tokens:
                raise BadRequest(
                    f"sequence {child_id} holds {child.num_tokens} tokens already; only an empty one forks"
                )
            if not 0 <= count <= min(parent.num_tokens, child.max_tokens):
                raise BadRequest(
                    f"sequence {child_id} of up to {child.max_tokens} tokens cannot begin with {count} of the "
                    f"{parent.num_tokens} of sequence {parent_id}"
                )
            forks.append((child, parent, count))
        tails = [child for child, _, count in forks if count % self.layout.block_tokens]
        if len(tails) > self._num_free:
            raise KVBudgetExceeded(
                f"{len(forks)} sequences need {len(tails)} blocks for what they do not share; {self._num_free} of "
                f"{self.num_blocks} are free"
            )
        for child, parent, count in forks:
            child.blocks, child.num_tokens = parent.blocks[: self.layout.num_blocks(count)], count
            self._num_shared += int((self._owners[child.blocks] == 1).sum())
            self._owners[child.blocks] += 1
        self._own_tails(tails)

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
        to_copy = self._shared_tails(stored for stored, total, _ in growing if total > stored.num_tokens)
        # The last of several owners that all go on needs no copy: this may be some too many.
        needed = sum(missing for _, _, missing in growing) + len(to_copy)
        if needed > self._num_free:
            raise KVBudgetExceeded(
                f"{len(growing)} sequences need {needed} more blocks; {self._num_free} of {self.num_blocks} are free"
            )
        self._own_tails(to_copy)
        for stored, total, missing in growing:
            stored.blocks += self._take(missing)
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
        owners = np.zeros_like(self._owners)
        for seq_id, stored in self._stored.items():
            assert 0 <= stored.num_tokens <= stored.max_tokens, f"sequence {seq_id} is over its limit"
            assert len(stored.blocks) == self.layout.num_blocks(stored.num_tokens), (
                f"sequence {seq_id} has wrong blocks"
            )
            assert len(set(stored.blocks)) == len(stored.blocks), f"sequence {seq_id} has a block twice"
            owners[stored.blocks] += 1
        assert (owners == self._owners).all(), "a block has wrong owners"
        assert self._num_shared == (owners > 1).sum()
        free = self._free[: self._num_free]
        assert np.array_equal(np.sort(free), np.flatnonzero(owners == 0)), "a block is lost, or free and held"

    def _take(self, count: int) -> list[int]:
        """Free blocks, which there are."""
        self._num_free -= count
        blocks = self._free[self._num_free : self._num_free + count][::-1]
        self._owners[blocks] = 1
        return blocks.tolist()

    def _give_back(self, stored: _Stored, keep: int) -> None:
        """All of its blocks but the first `keep`."""
        blocks = np.array(stored.blocks[keep:], np.int32)
        del stored.blocks[keep:]
        owners = self._owners[blocks] - 1
        self._owners[blocks] = owners
        freed = blocks[owners == 0]
        self._num_shared -= int((owners == 1).sum())
        self._free[self._num_free : self._num_free + len(freed)] = freed[::-1]
        self._num_free += len(freed)

    def _shared_tails(self, growing: Iterable[_Stored]) -> list[_Stored]:
        """Those whose next token would go into a block that others have, too."""
        if not self._num_shared:
            return []
        tails = [stored for stored in growing if stored.num_tokens % self.layout.block_tokens]
        return [stored for stored in tails if self._owners[stored.blocks[-1]] > 1]

    def _own_tails(self, sequences: Iterable[_Stored]) -> None:
        """Copies the last block of each, unless it is the only one by now that has it; there are blocks for all."""
        for stored in sequences:
            source = stored.blocks[-1]
            if self._owners[source] == 1:
                continue
            (target,) = stored.blocks[-1:] = self._take(1)
            self._owners[source] -= 1
            self._num_shared -= int(self._owners[source] == 1)
            for data in self.data:
                data[target] = data[source]

    def _find(self, seq_id: int) -> _Stored:
        try:
            return self._stored[seq_id]
        except KeyError:
            raise UnknownSequence(f"sequence {seq_id} is not on this R-worker") from None
