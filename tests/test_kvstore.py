"""The KV store as a state machine: whatever happens in whatever order, no block is lost or shared."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cpu_attention import (
    AttentionRule,
    BadRequest,
    KVBudgetExceeded,
    KVLayout,
    KVStore,
    LayerShape,
    SequenceExists,
    UnknownSequence,
    kernel,
    reference,
)
from cpu_attention.multicore import Attention

LAYOUTS = {
    dtype: KVLayout((LayerShape(2, 16), LayerShape(1, 32)), dtype, block_tokens=16)
    for dtype in ("float32", "k8v4", "int4")
}
LAYOUT = LAYOUTS["float32"]


@cache
def token(value: int, shape: LayerShape) -> np.ndarray:
    """K of the token that is known by `value`.  # [1, num_kv_heads, head_dim] float32"""
    return np.random.default_rng(value).standard_normal((1, shape.num_kv_heads, shape.head_dim)).astype(np.float32)


@cache
def as_stored(value: int, dtype: str, layer: int) -> np.ndarray:
    """What that token's K and V are when nothing was there before.  # [2, num_kv_heads, head_dim]"""
    head, shape, zero = LAYOUTS[dtype].heads[layer], LAYOUTS[dtype].layers[layer], np.zeros(1, np.int32)
    data = np.zeros((1, shape.num_kv_heads, head.nbytes), np.uint8)
    reference.append(token(value, shape), -token(value, shape), zero, zero, data, head)
    return np.stack([part[0, :, 0] for part in reference.read(data, head)])


class StoreMachine(RuleBasedStateMachine):
    """Beside the store a model of it: what every sequence should hold, token by token."""

    @initialize(dtype=st.sampled_from(list(LAYOUTS)))
    def open(self, dtype: str) -> None:
        self.layout = LAYOUTS[dtype]
        self.store = KVStore(self.layout, 12 * self.layout.block_bytes + 5)
        self.limits: dict[int, int] = {}
        self.values: dict[int, list[int]] = {}
        self.next_value = 1

    @rule(seq_id=st.integers(0, 5), max_tokens=st.integers(1, 220))
    def admit(self, seq_id: int, max_tokens: int) -> None:
        if seq_id in self.limits:
            with pytest.raises(SequenceExists):
                self.store.admit(seq_id, max_tokens)
        elif -(-max_tokens // 16) > 12:
            with pytest.raises(KVBudgetExceeded, match="this R-worker has 12"):
                self.store.admit(seq_id, max_tokens)
        else:
            self.store.admit(seq_id, max_tokens)
            self.limits[seq_id], self.values[seq_id] = max_tokens, []

    @rule(seq_id=st.integers(0, 5), count=st.integers(0, 48))
    def extend_and_write(self, seq_id: int, count: int) -> None:
        held = {other: len(values) for other, values in self.values.items()}
        tail = self.store._shared_tails([self.store._stored[seq_id]]) if seq_id in self.limits and count else []
        missing = -(-(held.get(seq_id, 0) + count) // 16) - -(-held.get(seq_id, 0) // 16) + len(tail)
        if seq_id not in self.limits:
            with pytest.raises(UnknownSequence):
                self.store.extend({**dict.fromkeys(self.limits, 0), seq_id: count})
        elif held[seq_id] + count > self.limits[seq_id]:
            with pytest.raises(KVBudgetExceeded, match="admitted for"):
                self.store.extend({seq_id: count})
        elif missing > self.store.num_free_blocks:
            with pytest.raises(KVBudgetExceeded, match="free"):
                self.store.extend({seq_id: count})
        else:
            start = len(self.values[seq_id])
            self.store.extend({seq_id: count})
            positions = np.arange(start, start + count)
            fresh = range(self.next_value, self.next_value + count)
            self.next_value += count
            self.values[seq_id] += fresh
            blocks = self.store.block_tables([seq_id])[0][positions // 16] if count else np.zeros(0, np.int32)
            for layer, shape in enumerate(self.layout.layers):
                none = np.empty((0, shape.num_kv_heads, shape.head_dim), np.float32)
                rows = np.concatenate([none, *(token(value, shape) for value in fresh)])
                offsets = (positions % 16).astype(np.int32)
                kernel.append(rows, -rows, blocks, offsets, self.store.data[layer], self.layout.heads[layer])

    @rule(parent=st.integers(0, 5), child=st.integers(0, 5), share=st.floats(0, 1))
    def fork(self, parent: int, child: int, share: float) -> None:
        count = round(share * len(self.values.get(parent, [])))
        if parent not in self.limits or child not in self.limits:
            with pytest.raises((UnknownSequence, BadRequest)):
                self.store.fork([child], [parent], [count])
        elif parent == child or self.values[child] or count > self.limits[child]:
            with pytest.raises(BadRequest):
                self.store.fork([child], [parent], [count])
        elif count % 16 and not self.store.num_free_blocks:
            with pytest.raises(KVBudgetExceeded, match="do not share"):
                self.store.fork([child], [parent], [count])
        else:
            free = self.store.num_free_blocks
            self.store.fork([child], [parent], [count])
            assert free - self.store.num_free_blocks == (count % 16 > 0)
            self.values[child] = self.values[parent][:count]

    @rule(seq_id=st.integers(0, 5), back=st.integers(0, 40))
    def truncate(self, seq_id: int, back: int) -> None:
        """As a Rewind does: what comes then goes where something else was."""
        if seq_id not in self.limits:
            with pytest.raises(UnknownSequence):
                self.store.truncate(seq_id, 0)
        else:
            keep = max(0, len(self.values[seq_id]) - back)
            self.store.truncate(seq_id, keep)
            del self.values[seq_id][keep:]

    @rule(seq_id=st.integers(0, 5))
    def release(self, seq_id: int) -> None:
        if seq_id in self.limits:
            self.store.release(seq_id)
            del self.limits[seq_id], self.values[seq_id]
        else:
            with pytest.raises(UnknownSequence):
                self.store.release(seq_id)

    @invariant()
    def sound(self) -> None:
        self.store.check_integrity()
        assert self.store.num_sequences == len(self.limits)

    @invariant()
    def nothing_overwritten(self) -> None:
        for seq_id, values in self.values.items():
            table = self.store.block_tables([seq_id])[0]
            assert self.store.num_tokens(seq_id) == len(values)
            if not values:
                continue
            for layer, (data, head) in enumerate(zip(self.store.data, self.layout.heads, strict=True)):
                parts = reference.read(data[table], head)  # [blocks, num_kv_heads, 16, head_dim] each
                held = np.stack([part.swapaxes(1, 2).reshape(-1, *part.shape[1::2]) for part in parts], axis=1)
                expected = [as_stored(value, self.layout.dtype, layer) for value in values]
                assert np.array_equal(held[: len(values)], expected)

    @precondition(lambda self: not self.limits)
    @invariant()
    def empty_is_empty(self) -> None:
        assert self.store.num_free_blocks == self.store.num_blocks == 12


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestStore = StoreMachine.TestCase


def test_layout_arithmetic() -> None:
    # (2 heads x 16 + 1 head x 32) x K and V x 4 bytes
    assert LAYOUT.token_bytes == 512 and LAYOUT.block_bytes == 8192
    assert [LAYOUT.num_blocks(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_budget_below_one_block_shows_the_arithmetic() -> None:
    with pytest.raises(KVBudgetExceeded, match="budget of 8191 bytes.*16 tokens x 512 bytes per token = 8192"):
        KVStore(LAYOUT, 8191)


def test_budget_is_not_exceeded() -> None:
    store = KVStore(LAYOUT, 50_000)
    assert sum(array.nbytes for array in store.data) == store.num_blocks * 8192 <= 50_000


def test_zero_tokens_cannot_be_admitted() -> None:
    with pytest.raises(BadRequest):
        KVStore(LAYOUT, 50_000).admit(1, 0)


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="float16"):
        KVLayout((LayerShape(1, 1),), "int3", 16)


@pytest.mark.parametrize(
    "dtype, bits", [("float32", 32), ("float16", 16), ("bfloat16", 16), ("int8", 8.125), ("k8v4", 6.5625), ("int4", 5)]
)
def test_bits_per_number(dtype: str, bits: float) -> None:
    """head_dim 128: int8 has a scale of 16 bits for 128 channels, int4 a scale and a minimum for 32."""
    layout = KVLayout((LayerShape(8, 128),), dtype, 64)
    assert layout.block_bytes * 8 == 64 * 8 * 128 * 2 * bits


@pytest.mark.parametrize("block_tokens", [0, 1, 15, 24])
def test_block_size_that_is_no_multiple_of_the_lanes(block_tokens: int) -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        KVLayout((LayerShape(1, 64),), "float16", block_tokens)


@pytest.mark.parametrize("dtype", ["float16", "int4"])
def test_ten_thousand_steps_leak_nothing(dtype: str) -> None:
    """Sequences come, grow, are attended to and go in random order; every answer is the reference's over what the
    sequence holds, whoever had its blocks before, and in the end every block is free."""
    generator = np.random.default_rng(0)
    layout = KVLayout((LayerShape(1, 16),), dtype, 16)
    [head], store, attention = layout.heads, KVStore(layout, 40 * layout.block_bytes), Attention()
    rule, next_id, live = AttentionRule(0.25), 0, {}
    for step in range(10_000):
        action = generator.integers(0, 10)
        if action < 2 and len(live) < 10:
            live[next_id] = int(generator.integers(1, 64))
            store.admit(next_id, live[next_id])
            next_id += 1
        elif action == 2 and live:
            seq_id = int(generator.choice(list(live)))
            store.release(seq_id)
            del live[seq_id]
        elif live:
            seq_id = int(generator.choice(list(live)))
            start = store.num_tokens(seq_id)
            count = min(live[seq_id] - start, int(generator.integers(1, 4)))
            store.extend({seq_id: count})
            table, positions = store.block_tables([seq_id]), np.arange(start, start + count)
            k, v = (generator.standard_normal((count, 1, 16)).astype(np.float32) for _ in "kv")
            places = table[0][positions // 16], (positions % 16).astype(np.int32)
            kernel.append(k, v, *places, store.data[0], head)
            if start + count and step % 5 == 0:
                q = generator.standard_normal((1, 2, 16)).astype(np.float32)
                work = attention.cut(np.array([start + count - 1]), None, 16)
                outs = [
                    Attention(1, which).attend(q, store.data[0], head, table, work, rule)
                    for which in (kernel, reference)
                ]
                np.testing.assert_allclose(*outs, atol=5e-6)
        if step % 500 == 0:
            store.check_integrity()
    for seq_id in live:
        store.release(seq_id)
    store.check_integrity()
    assert store.num_free_blocks == store.num_blocks == 40 and next_id > 500
