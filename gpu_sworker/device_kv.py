"""A holder of K and V on the S-worker's own device: a paged store with a budget, and attention over what is in it.

    admit(seq, max_tokens)          knows the sequence; takes no block yet, or with `reserve` all it will ever need
      ├► fork(children, parents, n) they begin with the first n tokens of others: full blocks are shared
      └► extend({seq: n}) …         takes blocks as sequences grow; all that are asked for, or none
           ├► rows → write → attend the new tokens' K and V, layer by layer, then queries over all there are
           ├► rewind({seq: n})      forgets what came after its first n tokens
           └► release([seq])        gives its blocks back, but for those that others share

A block is written by its one owner only: what two sequences share are full blocks, and a partial tail is copied for
whoever goes on from it.  Nothing here depends on a block's neighbours, but consecutive blocks are taken where there are
some, because K and V of a sequence that lies in one piece are views.

    block tables: (sequence, position // block_tokens) -> block
    references of a block = sequences in whose table it is; free blocks have none

Knows no tokens and no policy.  Raises what `errors.py` lists under DeviceKVError, and has changed nothing then.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from gpu_sworker.device_attention import attend_tokens
from gpu_sworker.errors import DeviceKVFull, DeviceKVMisused
from gpu_sworker.memory import untouched_memory
from gpu_sworker.paged_attention import paged_kernel
from gpu_sworker.partial_state import PartialState
from gpu_sworker.probe import AttentionSpec
from gpu_sworker.staging import on_device


@dataclass
class _Stored:
    max_tokens: int
    is_reserved: bool
    num_tokens: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Reading:
    """Queries of one sequence, and where its keys are."""

    queries: slice  # among those of the rows
    num_tokens: int
    first_slot: int | None  # of consecutive blocks; None: they are not
    blocks: torch.Tensor  # [num_blocks] int32, on the device


@dataclass(frozen=True)
class DeviceRows:
    """Whose tokens the next `write` and `attend` of every layer are about, in row order; see `DeviceKV.rows`."""

    num_tokens: int  # whose K and V are written
    num_queries: int
    slots: slice | torch.Tensor  # of those tokens: block * block_tokens + offset
    readings: tuple[_Reading, ...]  # of the sequences that have queries
    # Once more what they are about, on the device, for all of them to attend in one call:
    tables: torch.Tensor  # [num_readings, max_blocks] int32, 0 beyond a sequence's own blocks
    lengths: torch.Tensor  # [num_readings] int32, tokens

    @property
    def are_decodes(self) -> bool:
        """One query each, of more than one sequence."""
        return len(self.readings) == self.num_queries > 1


class DeviceKV:
    def __init__(
        self,
        layers: Sequence[AttentionSpec],
        *,
        dtype: torch.dtype,
        device: torch.device,
        budget_bytes: int,
        block_tokens: int = 64,
    ) -> None:
        """A budget below one block makes a store that holds nothing.  Raises DeviceKVFull if it is not there.

        On a processor memory is taken only as blocks are first written, on other devices at once.
        """
        self._layers, self.block_tokens, self.device = tuple(layers), block_tokens, device
        self.block_bytes = block_tokens * token_bytes(layers, dtype)
        self.num_blocks = budget_bytes // self.block_bytes
        # Per layer [K or V, num_blocks, block_tokens, num_kv_heads, head_dim]
        self._data = [
            _empty((2, self.num_blocks, block_tokens, spec.num_kv_heads, spec.head_dim), dtype, device)
            for spec in layers
        ]
        self._references = np.zeros(self.num_blocks, np.int32)
        self._num_free = self.num_blocks
        self._stored: dict[int, _Stored] = {}

    def __len__(self) -> int:
        """Sequences that are known."""
        return len(self._stored)

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._stored

    @property
    def num_free_blocks(self) -> int:
        return self._num_free

    def num_tokens(self, seq_id: int) -> int:
        return self._find(seq_id).num_tokens

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def admit(self, seq_id: int, max_tokens: int, *, reserve: bool = False) -> None:
        """max_tokens: the most it will ever hold; reserve: it takes the blocks for them now, in one piece if it can.

        Raises DeviceKVFull if it could not be held even alone, or, reserving, beside what is there.
        """
        if seq_id in self._stored:
            raise DeviceKVMisused(f"sequence {seq_id} is here already")
        if max_tokens < 1:
            raise DeviceKVMisused(f"sequence {seq_id} wants {max_tokens} tokens; the least is 1")
        needed = self.blocks_for(max_tokens)
        if needed > (self._num_free if reserve else self.num_blocks):
            raise self._full(f"sequence {seq_id} of up to {max_tokens} tokens needs {needed} blocks")
        stored = _Stored(max_tokens, reserve)
        if reserve:
            stored.blocks = self._take(needed)
        self._stored[seq_id] = stored

    def fork(self, children: Sequence[int], parents: Sequence[int], num_tokens: Sequence[int]) -> None:
        """children[i], admitted and still empty, begins with the first num_tokens[i] tokens of parents[i].

        Raises DeviceKVFull if there are no blocks for partial tails.
        """
        if len(set(children)) < len(children) or set(children) & set(parents):
            raise DeviceKVMisused("a sequence is forked to twice, or is parent and child at once")
        forks = []
        for child_id, parent_id, count in zip(children, parents, num_tokens, strict=True):
            child, parent = self._find(child_id), self._find(parent_id)
            if child.num_tokens or child.is_reserved:
                raise DeviceKVMisused(f"sequence {child_id} holds tokens or blocks already; only an empty one forks")
            if not 0 <= count <= min(parent.num_tokens, child.max_tokens):
                raise DeviceKVMisused(
                    f"sequence {child_id} of up to {child.max_tokens} tokens cannot begin with {count} of the "
                    f"{parent.num_tokens} of sequence {parent_id}"
                )
            forks.append((child, parent, count))
        num_tails = sum(count % self.block_tokens > 0 for _, _, count in forks)
        if num_tails > self._num_free:
            raise self._full(f"{len(forks)} forks need {num_tails} blocks for what they do not share")
        for child, parent, count in forks:
            child.blocks, child.num_tokens = parent.blocks[: self.blocks_for(count)], count
            self._references[child.blocks] += 1
        self._own([(child, count + 1) for child, _, count in forks])

    def extend(self, new_tokens: Mapping[int, int]) -> None:
        """Makes room for the next tokens of sequences.  Raises DeviceKVFull; then for none."""
        growing, needed = [], 0
        for seq_id, count in new_tokens.items():
            stored = self._find(seq_id)
            total = stored.num_tokens + count
            if count < 0 or total > stored.max_tokens:
                raise DeviceKVMisused(
                    f"sequence {seq_id} would hold {total} tokens; it was admitted for {stored.max_tokens}"
                )
            missing = max(0, self.blocks_for(total) - len(stored.blocks))
            needed += missing
            if count:
                growing.append((stored, total, missing))
        # Of a block from which all its owners go on the last one needs no copy: this may be one too many.
        needed += sum(len(self._shared(stored, total)) for stored, total, _ in growing)
        if needed > self._num_free:
            raise self._full(f"{len(growing)} sequences need {needed} more blocks")
        self._own([(stored, total) for stored, total, _ in growing])
        for stored, total, missing in growing:
            stored.blocks += self._take(missing, after=stored.blocks[-1] if stored.blocks else None)
            stored.num_tokens = total

    def rewind(self, kept: Mapping[int, int]) -> None:
        """sequence -> how many of its tokens stay."""
        for seq_id, num_tokens in kept.items():
            stored = self._find(seq_id)
            if not 0 <= num_tokens <= stored.num_tokens:
                raise DeviceKVMisused(
                    f"sequence {seq_id} holds {stored.num_tokens} tokens; it cannot go back to {num_tokens}"
                )
        for seq_id, num_tokens in kept.items():
            stored = self._find(seq_id)
            if not stored.is_reserved:
                self._give_back(stored, self.blocks_for(num_tokens))
            stored.num_tokens = num_tokens

    def release(self, seq_ids: Iterable[int]) -> None:
        seq_ids = list(seq_ids)
        if len(set(seq_ids)) < len(seq_ids):
            raise DeviceKVMisused("a sequence is released twice")
        for stored in [self._find(seq_id) for seq_id in seq_ids]:
            self._give_back(stored, 0)
        for seq_id in seq_ids:
            del self._stored[seq_id]

    def clear(self) -> None:
        """Nothing is known any more, whatever was going on."""
        self._stored = {}
        self._references[:] = 0
        self._num_free = self.num_blocks

    def rows(self, seq_ids: Sequence[int], num_tokens: Sequence[int], num_queries: Sequence[int]) -> DeviceRows:
        """After `extend`: of each sequence the last num_tokens[i] are to be written, the last num_queries[i] attend.

        Made once, for all layers; holds until one of the sequences is changed.  Queries are causal among themselves.
        """
        if len(set(seq_ids)) < len(seq_ids):
            raise DeviceKVMisused("a sequence comes twice among the rows")
        slots, asking = [np.zeros(0, np.int64)], []
        for seq_id, count, queries in zip(seq_ids, num_tokens, num_queries, strict=True):
            stored = self._find(seq_id)
            if not (0 <= count <= stored.num_tokens and 0 <= queries <= stored.num_tokens):
                raise DeviceKVMisused(
                    f"sequence {seq_id} holds {stored.num_tokens} tokens; {count} of them cannot be new and {queries} "
                    "ask"
                )
            blocks = np.array(stored.blocks[: self.blocks_for(stored.num_tokens)], np.int64)
            positions = np.arange(stored.num_tokens - count, stored.num_tokens)
            slots.append(blocks[positions // self.block_tokens] * self.block_tokens + positions % self.block_tokens)
            if queries:
                asking.append((queries, stored.num_tokens, blocks))
        host_tables = np.zeros((len(asking), max((len(blocks) for *_, blocks in asking), default=0)), np.int32)
        for row, (*_, blocks) in enumerate(asking):
            host_tables[row, : len(blocks)] = blocks
        tables = on_device(host_tables, self.device)
        readings, first_query = [], 0
        for row, (queries, length, blocks) in enumerate(asking):
            is_one_piece = bool((np.diff(blocks) == 1).all())
            readings.append(
                _Reading(
                    slice(first_query, first_query + queries),
                    length,
                    int(blocks[0]) * self.block_tokens if is_one_piece else None,
                    tables[row, : len(blocks)],
                )
            )
            first_query += queries
        where = np.concatenate(slots)
        in_order = bool((np.diff(where) == 1).all())
        begin = int(where[0]) if len(where) else 0
        return DeviceRows(
            len(where),
            first_query,
            slice(begin, begin + len(where)) if in_order else on_device(where, self.device),
            tuple(readings),
            tables,
            on_device(np.array([length for _, length, _ in asking], np.int32), self.device),
        )

    def write(
        self,
        layer: int,
        rows: DeviceRows,
        k: torch.Tensor,  # [rows.num_tokens, num_kv_heads, head_dim]
        v: torch.Tensor,  # like k
    ) -> None:
        """K and V of the new tokens."""
        spec = self._layers[layer]
        assert k.shape == v.shape == (rows.num_tokens, spec.num_kv_heads, spec.head_dim), (k.shape, v.shape)
        keys, values = self._data[layer].flatten(1, 2)
        keys[rows.slots], values[rows.slots] = k, v

    def attend(
        self,
        layer: int,
        rows: DeviceRows,
        q: torch.Tensor,  # [rows.num_queries, num_q_heads, head_dim]
    ) -> PartialState:
        """Of each query over its sequence up to itself, K and V of new tokens being written; without sinks.

        In one call for all where there is a kernel for it, else sequence by sequence.
        """
        spec = self._layers[layer]
        assert q.shape == (rows.num_queries, spec.num_q_heads, spec.head_dim), q.shape
        if len(rows.readings) == 1:
            return attend_tokens(q, *self._read(layer, rows.readings[0]), spec)
        attend_paged = paged_kernel(q.device, q.dtype, spec) if rows.are_decodes else None
        if attend_paged is not None:
            return attend_paged(q, self._data[layer], rows.tables, rows.lengths, spec)
        state = PartialState(torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device))
        for reading in rows.readings:
            part = attend_tokens(q[reading.queries], *self._read(layer, reading), spec)
            state.o[reading.queries], state.lse[reading.queries] = part.o, part.lse
        return state

    def check_integrity(self) -> None:
        """Asserts what the head of this file promises."""
        references = np.zeros_like(self._references)
        for seq_id, stored in self._stored.items():
            held = stored.max_tokens if stored.is_reserved else stored.num_tokens
            assert 0 <= stored.num_tokens <= stored.max_tokens, f"sequence {seq_id} is over its limit"
            assert len(stored.blocks) == self.blocks_for(held), f"sequence {seq_id} has wrong blocks"
            assert len(set(stored.blocks)) == len(stored.blocks), f"sequence {seq_id} has a block twice"
            references[stored.blocks] += 1
        assert (references == self._references).all(), "a block has wrong references"
        assert self._num_free == (references == 0).sum(), "a block is lost"

    def _read(self, layer: int, reading: _Reading) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V from the first token that a query of the reading sees to its last one: views if they lie together.

        # [some tokens, num_kv_heads, head_dim] each
        """
        window, count = self._layers[layer].window, reading.queries.stop - reading.queries.start
        first = 0 if window is None else max(0, reading.num_tokens - count + 1 - window)
        if reading.first_slot is not None:
            place = slice(reading.first_slot + first, reading.first_slot + reading.num_tokens)
            keys, values = self._data[layer].flatten(1, 2)[:, place]
            return keys, values
        first_block = first // self.block_tokens
        begin = first_block * self.block_tokens
        gathered = self._data[layer].index_select(1, reading.blocks[first_block:])
        keys, values = gathered.flatten(1, 2)[:, first - begin : reading.num_tokens - begin]
        return keys, values

    def _shared(self, stored: _Stored, total: int) -> list[int]:
        """Places in its table of blocks that it would write to on its way to `total` tokens, and that are others', too.

        The partial tail of a fork or of what was rewound, and further ones of what was reserved, forked and rewound.
        """
        ahead = range(stored.num_tokens // self.block_tokens, min(self.blocks_for(total), len(stored.blocks)))
        return [place for place in ahead if self._references[stored.blocks[place]] > 1]

    def _own(self, growing: Sequence[tuple[_Stored, int]]) -> None:
        """Copies blocks that are shared for sequences that write to them; there are blocks for all."""
        sources, targets = [], []
        for stored, total in growing:
            for place in self._shared(stored, total):
                source = stored.blocks[place]
                (target,) = self._take(1, after=source)
                self._references[source] -= 1
                stored.blocks[place] = target
                sources.append(source)
                targets.append(target)
        if sources:
            source_index, target_index = (on_device(np.array(blocks), self.device) for blocks in (sources, targets))
            for data in self._data:
                data[:, target_index] = data[:, source_index]

    def _take(self, count: int, after: int | None = None) -> list[int]:
        """Free blocks: those behind block `after`, or the first that lie together, or the first there are."""
        if count == 0:
            return []
        is_free = self._references == 0
        if after is not None and after + count < self.num_blocks and is_free[after + 1 : after + 1 + count].all():
            taken = np.arange(after + 1, after + 1 + count)
        else:
            free = np.flatnonzero(is_free)
            together = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1)
            taken = free[together[0] : together[0] + count] if len(together) else free[:count]
        self._references[taken] = 1
        self._num_free -= count
        blocks: list[int] = taken.tolist()
        return blocks

    def _give_back(self, stored: _Stored, keep: int) -> None:
        """All of its blocks but the first `keep`."""
        freed = stored.blocks[keep:]
        self._references[freed] -= 1
        self._num_free += int((self._references[freed] == 0).sum())
        del stored.blocks[keep:]

    def _full(self, what: str) -> DeviceKVFull:
        return DeviceKVFull(
            f"{what}; {self._num_free} of {self.num_blocks} are free on {self.device} ({self.block_tokens} tokens or "
            f"{self.block_bytes} bytes each): raise the budget of K and V there, or let R-workers attend"
        )

    def _find(self, seq_id: int) -> _Stored:
        try:
            return self._stored[seq_id]
        except KeyError:
            raise DeviceKVMisused(f"sequence {seq_id} is not on this device") from None


def token_bytes(layers: Sequence[AttentionSpec], dtype: torch.dtype) -> int:
    """K and V of one token over all layers."""
    return sum(2 * spec.num_kv_heads * spec.head_dim for spec in layers) * dtype.itemsize


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised.  Raises DeviceKVFull if the device, or a limit on this process, does not give so much."""
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        if device.type == "cpu":
            return untouched_memory(num_bytes).view(dtype).view(shape)
        return torch.empty(shape, dtype=dtype, device=device)
    except (OSError, torch.OutOfMemoryError) as error:
        raise DeviceKVFull(
            f"{num_bytes} bytes for a layer's K and V are not to be had on {device} ({error})"
        ) from error
