"""K and V on the S-worker's device: attention over them against its definition, states against the R-workers' algebra,
and the store as a state machine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cpu_attention import state as numpy_state
from gpu_sworker import (
    AttentionSpec,
    DeviceKV,
    DeviceKVFull,
    DeviceKVMisused,
    PartialState,
    attend_tokens,
    attend_tokens_plainly,
    merge,
    with_sinks,
)
from gpu_sworker.device_attention import fused_kernel
from gpu_sworker.device_kv import token_bytes

CPU = torch.device("cpu")
SPECS = {
    "all keys": AttentionSpec(4, 4, 16, 0.25, None, None, None),
    "groups": AttentionSpec(6, 2, 24, 0.2, None, None, None),
    "one KV head": AttentionSpec(4, 1, 8, 0.4, None, None, (9.0,) * 4),  # sinks are not in a partial state
    "odd heads": AttentionSpec(3, 3, 37, 0.17, None, None, None),
    "window": AttentionSpec(4, 2, 16, 0.25, 9, None, None),
    "window of one": AttentionSpec(2, 2, 16, 0.25, 1, None, None),
    "wide window": AttentionSpec(4, 2, 16, 0.25, 100, None, None),
    "soft cap": AttentionSpec(4, 2, 16, 1.5, None, 5.0, None),
    "soft cap, window": AttentionSpec(4, 2, 20, 1.5, 9, 5.0, None),
}


def tokens(num_queries: int, num_tokens: int, spec: AttentionSpec, seed: int = 0) -> list[torch.Tensor]:
    """q, k and v."""
    generator, group = torch.Generator().manual_seed(seed), spec.num_q_heads // spec.num_kv_heads
    shapes = (num_queries, group), (num_tokens, 1), (num_tokens, 1)
    return [torch.randn(n, spec.num_kv_heads * g, spec.head_dim, generator=generator) for n, g in shapes]


def assert_equal(state: PartialState, expected: PartialState, tolerance: float = 2e-5) -> None:
    assert state.o.dtype == expected.o.dtype and state.lse.dtype == expected.lse.dtype
    torch.testing.assert_close(state.o, expected.o, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(state.lse, expected.lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("way", ["masked", "in parts", "in slabs"])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("num_queries, num_tokens", [(1, 1), (1, 40), (7, 7), (7, 40), (40, 40), (3, 120), (50, 120)])
def test_attention_is_its_definition(
    num_queries: int, num_tokens: int, name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "gpu_sworker.device_attention"
    monkeypatch.setattr(f"{module}._LEAST_WINDOW", 1)
    monkeypatch.setattr(f"{module}._SLAB", 8)
    monkeypatch.setattr(f"{module}._SCORES_AT_ONCE", 500)
    if way == "in slabs":
        monkeypatch.setattr(f"{module}.fused_kernel", lambda *_: None)
    if way == "in parts":
        monkeypatch.setattr(f"{module}._SMALL", 0)
    q, k, v = tokens(num_queries, num_tokens, SPECS[name])
    assert_equal(attend_tokens(q, k, v, SPECS[name]), attend_tokens_plainly(q, k, v, SPECS[name]))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 3e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-5)])
@pytest.mark.parametrize("name", SPECS)
def test_attention_in_other_dtypes(name: str, dtype: torch.dtype, tolerance: float) -> None:
    q, k, v = (t.to(dtype) for t in tokens(20, 300, SPECS[name]))
    assert_equal(attend_tokens(q, k, v, SPECS[name]), attend_tokens_plainly(q, k, v, SPECS[name]), tolerance)


def test_windows_of_usual_sizes() -> None:
    spec = AttentionSpec(2, 1, 16, 0.25, 128, None, None)
    q, k, v = tokens(500, 700, spec)
    assert_equal(attend_tokens(q, k, v, spec), attend_tokens_plainly(q, k, v, spec))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_processors_have_a_fused_kernel(dtype: torch.dtype) -> None:
    """If a version of torch takes it away, prompts still attend, but slowly."""
    for spec in SPECS.values():
        assert fused_kernel(CPU, dtype, spec)


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def wrong(q: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        return q, q[..., 0]

    def missing(*_: object) -> tuple[torch.Tensor, torch.Tensor]:
        raise AttributeError("no such operator")

    monkeypatch.setattr("gpu_sworker.device_attention._KERNELS", {"cpu": (wrong, missing)})
    spec = AttentionSpec(4, 2, 18, 0.25, None, None, None)
    assert fused_kernel(CPU, torch.float32, spec) is None
    assert "wrong gives other numbers" in caplog.text


def test_a_long_context_takes_no_mask() -> None:
    """A chunk of 1024 tokens behind 15,000: a mask would be 65 MB, scores 131 MB."""
    for window in (None, 2048):
        spec = AttentionSpec(2, 1, 16, 0.25, window, None, None)
        q, k, v = tokens(1024, 16384, spec)
        attend_tokens(q[:2], k, v, spec)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            state = attend_tokens(q, k, v, spec)
        assert max(event.self_cpu_memory_usage for event in profile.events()) < 8 << 20
        rows = [0, 511, 1023]
        for row in rows:
            end = 16384 - 1024 + row + 1
            assert_equal(state[row : row + 1], attend_tokens_plainly(q[row : row + 1], k[:end], v[:end], spec))


def states(num_states: int, seed: int = 0) -> list[PartialState]:
    """Of 5 queries and 3 heads, over keys of very different weight; the first of them also over none."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(num_states):
        o, lse = torch.randn(5, 3, 8, generator=generator), 40 * torch.randn(5, 3, generator=generator)
        if i == 0:
            o[2], lse[2] = 0, -torch.inf
        made.append(PartialState(o, lse))
    return made


def as_numpy(state: PartialState) -> numpy_state.State:
    """With another maximum than the sum's logarithm, as a kernel has it."""
    maxima = np.where(np.isfinite(state.lse.numpy()), state.lse.numpy() - np.float32(0.7), np.float32(-1e30))
    sums = np.where(np.isfinite(state.lse.numpy()), np.exp(np.float32(0.7)), np.float32(0))
    return numpy_state.State(state.o.numpy(), maxima.astype(np.float32), sums.astype(np.float32))


def assert_same(state: PartialState, expected: numpy_state.State) -> None:
    np.testing.assert_allclose(state.o.numpy(), expected.out, atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(state.lse.numpy(), expected.maxima + np.log(expected.sums), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("num_states", [1, 2, 3, 5])
def test_merging_is_the_r_workers_algebra(num_states: int) -> None:
    parts = states(num_states)
    expected = as_numpy(parts[0])
    for part in parts[1:]:
        expected = numpy_state.merge(expected, as_numpy(part))
    if num_states > 1:
        assert_same(merge(parts), expected)
        assert_same(merge([merge(parts[:1]), merge(parts[1:])]), expected)
        assert_same(merge(parts[::-1]), expected)
        sinks = torch.tensor([0.5, -30.0, 90.0])
        assert_same(with_sinks(merge(parts), sinks), numpy_state.with_sinks(expected, sinks.numpy()))
    else:
        assert merge(parts) is parts[0]


def test_over_no_keys_at_all() -> None:
    nothing = PartialState(torch.zeros(2, 3, 4), torch.full((2, 3), -torch.inf))
    merged = merge([nothing, nothing])
    assert not merged.o.any() and (merged.lse == -torch.inf).all()
    sunk = with_sinks(nothing, torch.zeros(3))
    assert not sunk.o.any() and not sunk.lse.any()


def test_merged_parts_are_the_whole_in_half_precision() -> None:
    spec = SPECS["groups"]
    q, k, v = (t.to(torch.bfloat16) for t in tokens(1, 300, spec))
    parts = [attend_tokens(q, k[a:b], v[a:b], spec) for a, b in ((0, 7), (7, 200), (200, 300))]
    merged = merge(parts)
    assert merged.o.dtype == torch.bfloat16
    assert_equal(merged, attend_tokens_plainly(q, k, v, spec), 1e-2)


LAYERS = (SPECS["groups"], SPECS["soft cap, window"])
NUM_BLOCKS, BLOCK_TOKENS = 12, 4


def make_store(num_blocks: int = NUM_BLOCKS, block_tokens: int = BLOCK_TOKENS) -> DeviceKV:
    budget = num_blocks * block_tokens * token_bytes(LAYERS, torch.float32) + 5
    return DeviceKV(LAYERS, dtype=torch.float32, device=CPU, budget_bytes=budget, block_tokens=block_tokens)


class StoreMachine(RuleBasedStateMachine):
    """Beside the store a model of it: what every sequence should hold, token by token."""

    def __init__(self) -> None:
        super().__init__()
        self.store = make_store()
        self.limits: dict[int, int] = {}
        self.values: dict[int, list[int]] = {}
        self.next_value = 1

    @rule(seq_id=st.integers(0, 5), max_tokens=st.integers(0, 48), reserve=st.sampled_from([False, False, True]))
    def admit(self, seq_id: int, max_tokens: int, reserve: bool) -> None:
        needed = -(-max_tokens // BLOCK_TOKENS)
        if seq_id in self.limits or max_tokens < 1:
            with pytest.raises(DeviceKVMisused):
                self.store.admit(seq_id, max_tokens, reserve=reserve)
        elif needed > (self.store.num_free_blocks if reserve else NUM_BLOCKS):
            with pytest.raises(DeviceKVFull, match="raise the budget"):
                self.store.admit(seq_id, max_tokens, reserve=reserve)
        else:
            self.store.admit(seq_id, max_tokens, reserve=reserve)
            self.limits[seq_id], self.values[seq_id] = max_tokens, []

    @precondition(lambda self: self.limits)
    @rule(data=st.data())
    def extend_and_write(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.limits)), unique=True, min_size=1, max_size=3))
        room = {seq_id: self.limits[seq_id] - len(self.values[seq_id]) for seq_id in chosen}
        counts = {seq_id: data.draw(st.integers(0, min(11, most))) for seq_id, most in room.items()}
        try:
            self.store.extend(counts)
        except DeviceKVFull:  # a copy is counted for each block that is shared
            blocks = sum(-(-(len(self.values[i]) + n) // BLOCK_TOKENS) - len(self.values[i]) // BLOCK_TOKENS
                         for i, n in counts.items())  # fmt: skip
            assert blocks > self.store.num_free_blocks
            return
        for seq_id, count in counts.items():
            self.values[seq_id] += range(self.next_value, self.next_value + count)
            self.next_value += count
        rows = self.store.rows(list(counts), list(counts.values()), [0] * len(counts))
        fresh = [value for i, n in counts.items() for value in self.values[i][len(self.values[i]) - n :]]
        for layer, spec in enumerate(LAYERS):
            k = self.token(fresh, spec)
            self.store.write(layer, rows, k, -k)

    @precondition(lambda self: self.limits)
    @rule(data=st.data(), more=st.integers(1, 9))
    def extend_too_far(self, data: st.DataObject, more: int) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.limits)))
        beyond = self.limits[seq_id] - len(self.values[seq_id]) + more
        for wrong in ({seq_id: beyond}, {seq_id: -1}, {99: 1, seq_id: 0}):
            with pytest.raises(DeviceKVMisused):
                self.store.extend({**dict.fromkeys(self.limits, 0), **wrong})

    @precondition(lambda self: any(self.values.values()))
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        children = data.draw(st.lists(st.integers(6, 9), unique=True, min_size=1, max_size=2))
        for child in children:
            if child in self.limits:
                self.store.release([child])
            self.store.admit(child, 40)
            self.limits[child], self.values[child] = 40, []
        if not any(self.values.values()):
            return
        parents = [data.draw(st.sampled_from([i for i, values in self.values.items() if values])) for _ in children]
        most = [min(len(self.values[p]), self.limits[c]) for c, p in zip(children, parents, strict=True)]
        counts = [data.draw(st.integers(0, n)) for n in most]
        for wrong in (most[0] + 1, -1):
            with pytest.raises(DeviceKVMisused):
                self.store.fork(children[:1], parents[:1], [wrong])
        try:
            self.store.fork(children, parents, counts)
        except DeviceKVFull:
            assert sum(n % BLOCK_TOKENS > 0 for n in counts) > self.store.num_free_blocks
            return
        for child, parent, count in zip(children, parents, counts, strict=True):
            self.values[child] = self.values[parent][:count]

    @precondition(lambda self: self.limits)
    @rule(data=st.data())
    def rewind(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.limits)))
        held = self.values[seq_id]
        with pytest.raises(DeviceKVMisused):
            self.store.rewind({**dict.fromkeys(self.values, 0), seq_id: len(held) + 1})
        kept = data.draw(st.integers(0, len(held)))
        self.store.rewind({seq_id: kept})
        del held[kept:]

    @precondition(lambda self: self.limits)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        seq_id = data.draw(st.sampled_from(sorted(self.limits)))
        with pytest.raises(DeviceKVMisused):
            self.store.release([*self.values, 99])
        self.store.release([seq_id])
        del self.values[seq_id], self.limits[seq_id]

    @invariant()
    def everything_holds(self) -> None:
        self.store.check_integrity()
        assert len(self.store) == len(self.limits)

    @precondition(lambda self: any(self.values.values()))
    @invariant()
    def everybody_has_what_was_written(self) -> None:
        asking = [seq_id for seq_id, values in self.values.items() if values]
        counts = [min(3, len(self.values[seq_id])) for seq_id in asking]
        rows = self.store.rows(asking, [0] * len(asking), counts)
        for layer, spec in enumerate(LAYERS):
            q = torch.randn(sum(counts), spec.num_q_heads, spec.head_dim, generator=torch.Generator().manual_seed(7))
            state, first = self.store.attend(layer, rows, q), 0
            for seq_id, count in zip(asking, counts, strict=True):
                k = self.token(self.values[seq_id], spec)
                own = slice(first, first + count)
                assert_equal(state[own], attend_tokens_plainly(q[own], k, -k, spec))
                first += count

    def token(self, values: list[int], spec: AttentionSpec) -> torch.Tensor:
        """K of the tokens that are known by these values."""
        places = torch.arange(spec.num_kv_heads * spec.head_dim, dtype=torch.float32)
        return torch.sin(torch.tensor(values)[:, None] * (1.0 + places)).view(-1, spec.num_kv_heads, spec.head_dim)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_blocks_lie_together_where_they_can() -> None:
    store = make_store()
    for seq_id in (1, 2):
        store.admit(seq_id, 24)
        store.extend({seq_id: 1})
    store.admit(3, 24, reserve=True)
    assert store._stored[3].blocks == [2, 3, 4, 5, 6, 7]
    store.extend({2: 7})
    assert store._stored[2].blocks == [1, 8]
    store.extend({2: 4})
    assert store._stored[2].blocks == [1, 8, 9]
    store.release([3])
    store.extend({1: 9})
    assert store._stored[1].blocks == [0, 2, 3]


def test_k_and_v_that_lie_together_are_views() -> None:
    store = make_store()
    store.admit(1, 24)
    store.extend({1: 20})
    (reading,) = store.rows([1], [0], [2]).readings
    keys, values = store._read(0, reading)
    assert keys.shape == (20, 2, 24) and keys.data_ptr() == store._data[0].data_ptr()
    assert values.data_ptr() == store._data[0][1].data_ptr()
    keys, _ = store._read(1, reading)  # of a window of 9
    assert keys.data_ptr() == store._data[1][0, 2, 2].data_ptr() and len(keys) == 10


def test_memory_is_taken_only_as_it_fills() -> None:
    def resident_mib() -> float:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 2**20

    before = resident_mib()
    store = DeviceKV(LAYERS, dtype=torch.float32, device=CPU, budget_bytes=1 << 30)
    assert resident_mib() - before < 30
    store.admit(1, store.num_blocks * 64)
    store.extend({1: 64})
    rows = store.rows([1], [64], [0])
    for layer, spec in enumerate(LAYERS):
        k = torch.ones(64, spec.num_kv_heads, spec.head_dim)
        store.write(layer, rows, k, k)
    assert resident_mib() - before < 40


def test_one_sequence_twice() -> None:
    store = make_store()
    store.admit(1, 8)
    store.admit(2, 8)
    store.extend({1: 5})
    for act in (
        lambda: store.rows([1, 1], [0, 0], [1, 1]),
        lambda: store.release([1, 1]),
        lambda: store.fork([2, 2], [1, 1], [1, 1]),
    ):
        with pytest.raises(DeviceKVMisused, match="twice"):
            act()
    with pytest.raises(DeviceKVMisused, match="holds tokens"):
        store.fork([1], [2], [0])
    store.check_integrity()


@pytest.mark.parametrize("reserve", [False, True])
def test_whoever_goes_back_into_what_is_shared_writes_to_blocks_of_its_own(reserve: bool) -> None:
    store = make_store()
    store.admit(1, 12, reserve=reserve)
    store.admit(2, 12)
    store.extend({1: 12})
    store.fork([2], [1], [12])
    assert store._stored[2].blocks == store._stored[1].blocks and store.num_free_blocks == NUM_BLOCKS - 3
    store.rewind({1: 2})
    store.check_integrity()
    store.extend({1: 9})
    store.check_integrity()
    assert not set(store._stored[1].blocks) & set(store._stored[2].blocks)
    assert store.num_free_blocks == NUM_BLOCKS - 6


def test_a_copy_that_finds_no_room_changes_nothing() -> None:
    store = make_store(num_blocks=2)
    store.admit(1, 8)
    store.admit(2, 8)
    store.extend({1: 8})
    for count in (1, 5):
        with pytest.raises(DeviceKVFull, match="1 forks need 1 blocks for what they do not share; 0 of 2 are free"):
            store.fork([2], [1], [count])
    store.fork([2], [1], [4])
    store.rewind({1: 3})
    store.release([2])
    store.extend({1: 2})
    store.check_integrity()
