"""What every holder of K and V does, whoever it is: checks that run against an R-worker and against a device's store.

make() -> Holder        with NUM_BLOCKS blocks of BLOCK_TOKENS tokens, for LAYERS, empty
check_*(make)           one promise each; the answers are compared with attention in float64
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pytest

NUM_BLOCKS, BLOCK_TOKENS = 10, 16
TOLERANCE = 5e-5


@dataclass(frozen=True)
class Layer:
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: tuple[float, ...] | None = None


LAYERS = (
    Layer(4, 2, 16, 0.25),
    Layer(3, 3, 37, 0.2, window=9, sinks=(0.5, -3.0, 4.0)),
    Layer(4, 1, 24, 0.8, softcap=4.0),
    Layer(4, 2, 16, 0.25, window=40, softcap=20.0, sinks=(-1.0, 1.0, 2.0, 0.0)),
)


class Refused(Exception):
    """The holder says no, and has changed nothing."""


@dataclass(frozen=True)
class Row:
    """A sequence in a step."""

    seq_id: int
    start: int  # how many tokens it had before
    num_tokens: int  # new ones
    num_queries: int  # how many of its last tokens attend, causal among themselves


@dataclass(frozen=True)
class Tensors:
    """Of one layer, the rows behind one another; all float32."""

    q: np.ndarray  # [queries of all rows, num_q_heads, head_dim]
    k: np.ndarray  # [new tokens of all rows, num_kv_heads, head_dim]
    v: np.ndarray  # like k


@dataclass(frozen=True)
class Answer:
    o: np.ndarray  # [queries of all rows, num_q_heads, head_dim]
    lse: np.ndarray | None  # [queries of all rows, num_q_heads]; None: o is final, with sinks


class Holder(Protocol):
    """Every method but `step` changes the holder for all that are named or for none, and raises Refused then."""

    is_partial: bool  # it tells the log-sum-exp beside o, and leaves sinks out of both

    def admit(self, max_tokens: Mapping[int, int]) -> None: ...

    def fork(self, children: Sequence[int], parents: Sequence[int], num_tokens: Sequence[int]) -> None: ...

    def step(self, rows: Sequence[Row], layers: Sequence[Tensors]) -> list[Answer]:
        """Room for the new tokens, or Refused; then, layer by layer, K and V are kept and q attends.  Fewer layers
        than there are break the step off."""

    def rewind(self, num_tokens: Mapping[int, int]) -> None: ...

    def release(self, seq_ids: Sequence[int]) -> None: ...

    def num_free_blocks(self) -> int: ...

    def check_integrity(self) -> None: ...


Make = Callable[[], AbstractContextManager[Holder]]


@dataclass
class Oracle:
    """Beside a holder: what it should have, and what it should say."""

    holder: Holder
    random: np.random.Generator
    limits: dict[int, int] = field(default_factory=dict)
    kept: dict[int, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)  # seq -> per layer k and v

    def num_tokens(self, seq_id: int) -> int:
        return len(self.kept[seq_id][0][0])

    def admit(self, **max_tokens: int) -> None:
        """admit(s1=30): sequence 1 of up to 30 tokens."""
        self.admit_all({int(name[1:]): limit for name, limit in max_tokens.items()})

    def admit_all(self, max_tokens: Mapping[int, int]) -> None:
        self.holder.admit(max_tokens)
        for seq_id, limit in max_tokens.items():
            self.limits[seq_id] = limit
            empty = [np.zeros((0, layer.num_kv_heads, layer.head_dim), np.float32) for layer in LAYERS]
            self.kept[seq_id] = [(k, k) for k in empty]
        self.check()

    def step(self, *rows: tuple[int, int, int], num_layers: int = len(LAYERS)) -> None:
        """rows: (seq_id, new tokens, queries).  Raises Refused."""
        step = [Row(seq_id, self.num_tokens(seq_id), count, queries) for seq_id, count, queries in rows]
        tensors = [self.tensors(step, layer) for layer in LAYERS]
        answers = self.holder.step(step, tensors[:num_layers])
        for index, layer in enumerate(LAYERS):
            first_token, first_query = 0, 0
            for row in step:
                k, v = self.kept[row.seq_id][index]
                new = slice(first_token, first_token + row.num_tokens)
                k, v = (np.concatenate(pair) for pair in ((k, tensors[index].k[new]), (v, tensors[index].v[new])))
                self.kept[row.seq_id][index] = k, v
                own = slice(first_query, first_query + row.num_queries)
                if index < num_layers:
                    check_answer(answers[index], own, attention(tensors[index].q[own], k, v, layer), layer)
                first_token, first_query = new.stop, own.stop
        self.check()

    def fork(self, children: Sequence[int], parents: Sequence[int], num_tokens: Sequence[int]) -> None:
        self.holder.fork(children, parents, num_tokens)
        for child, parent, count in zip(children, parents, num_tokens, strict=True):
            self.kept[child] = [(k[:count], v[:count]) for k, v in self.kept[parent]]
        self.check()

    def rewind(self, num_tokens: Mapping[int, int]) -> None:
        self.holder.rewind(num_tokens)
        for seq_id, count in num_tokens.items():
            self.kept[seq_id] = [(k[:count], v[:count]) for k, v in self.kept[seq_id]]
        self.check()

    def release(self, *seq_ids: int) -> None:
        self.holder.release(seq_ids)
        for seq_id in seq_ids:
            del self.kept[seq_id], self.limits[seq_id]
        self.check()

    def everybody_attends(self) -> None:
        """One more token each, so that all that is kept is read."""
        for seq_id in self.kept:
            if self.num_tokens(seq_id) < self.limits[seq_id]:
                self.step((seq_id, 1, 1))

    def check(self) -> None:
        self.holder.check_integrity()
        if not any(self.num_tokens(seq_id) for seq_id in self.kept):
            assert self.holder.num_free_blocks() == NUM_BLOCKS

    def tensors(self, rows: Sequence[Row], layer: Layer) -> Tensors:
        num_tokens, num_queries = sum(row.num_tokens for row in rows), sum(row.num_queries for row in rows)
        shape = (num_tokens, layer.num_kv_heads, layer.head_dim)
        q = self.random.standard_normal((num_queries, layer.num_q_heads, layer.head_dim))
        k, v = self.random.standard_normal(shape), self.random.standard_normal(shape)
        return Tensors(q.astype(np.float32), k.astype(np.float32), v.astype(np.float32))


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, layer: Layer) -> Answer:
    """From the formula, in float64: of the last tokens of a sequence, without sinks."""
    o = np.zeros(q.shape)
    lse = np.zeros(q.shape[:2])
    group = layer.num_q_heads // layer.num_kv_heads
    for row in range(len(q)):
        end = len(k) - len(q) + row + 1
        begin = 0 if layer.window is None else max(0, end - layer.window)
        for head in range(layer.num_q_heads):
            keys, values = (kv[begin:end, head // group].astype(np.float64) for kv in (k, v))
            scores = layer.scale * keys @ q[row, head].astype(np.float64)
            if layer.softcap is not None:
                scores = layer.softcap * np.tanh(scores / layer.softcap)
            weights = np.exp(scores - scores.max())
            o[row, head] = weights @ values / weights.sum()
            lse[row, head] = scores.max() + np.log(weights.sum())
    return Answer(o, lse)


def check_answer(answer: Answer, own: slice, expected: Answer, layer: Layer) -> None:
    assert expected.lse is not None
    o = expected.o
    if answer.lse is None and layer.sinks is not None:
        o = o / (1 + np.exp(np.array(layer.sinks) - expected.lse))[..., None]
    assert answer.o[own].shape == o.shape
    np.testing.assert_allclose(answer.o[own], o, atol=TOLERANCE, rtol=TOLERANCE)
    if answer.lse is not None:
        assert answer.lse.dtype == np.float32
        np.testing.assert_allclose(answer.lse[own], expected.lse, atol=TOLERANCE, rtol=TOLERANCE)


def open_oracle(holder: Holder, seed: int = 0) -> Oracle:
    return Oracle(holder, np.random.default_rng(seed))


def check_prompts_and_decoding(make: Make) -> None:
    """Whole prompts, prompts in chunks, and single tokens, all in one step; with and without queries."""
    with make() as holder:
        oracle = open_oracle(holder)
        oracle.admit(s1=60, s2=50, s3=40)
        oracle.step((1, 37, 37))
        oracle.step((1, 1, 1), (2, 20, 20))
        oracle.step((2, 19, 19), (1, 1, 1), (3, 5, 0))
        oracle.step((3, 1, 1), (2, 11, 3), (1, 21, 1))
        oracle.everybody_attends()


def check_admitting(make: Make) -> None:
    """Nobody comes twice, nor with more than could be held alone; then nobody of those named is admitted."""
    with make() as holder:
        oracle = open_oracle(holder)
        oracle.admit(s1=20)
        for refused in ({2: 30, 1: 20}, {2: 30, 3: NUM_BLOCKS * BLOCK_TOKENS + 1}, {2: 30, 3: 0}):
            with pytest.raises(Refused):
                oracle.admit_all(refused)
            oracle.check()
        oracle.admit(s2=NUM_BLOCKS * BLOCK_TOKENS, s3=1)
        oracle.step((1, 3, 1), (2, 3, 1), (3, 1, 1))


def check_room(make: Make) -> None:
    """New tokens of a step find room, or none of them do and the step may come again, smaller."""
    with make() as holder:
        oracle = open_oracle(holder)
        oracle.admit(s1=9 * BLOCK_TOKENS, s2=9 * BLOCK_TOKENS, s3=20)
        oracle.step((1, 7 * BLOCK_TOKENS, 1), (3, 3, 3))
        free = oracle.holder.num_free_blocks()
        assert free == NUM_BLOCKS - 8
        for refused in ([(1, 1, 1), (2, BLOCK_TOKENS + 1, 1)], [(2, 2 * BLOCK_TOKENS + 1, 1)], [(1, 1, 1), (3, 18, 1)]):
            with pytest.raises(Refused):
                oracle.step(*refused)
            assert oracle.holder.num_free_blocks() == free
            oracle.check()
        oracle.step((1, 1, 1), (2, BLOCK_TOKENS, 1), (3, 13, 1))
        oracle.release(1)
        oracle.step((2, 6 * BLOCK_TOKENS, 5))
        oracle.everybody_attends()


def check_rewinding(make: Make) -> None:
    """What comes again is as if nothing had been there, also when a step was broken off between layers."""
    with make() as holder:
        oracle = open_oracle(holder)
        oracle.admit(s1=90, s2=90)
        oracle.step((1, 40, 1), (2, 33, 1))
        for num_layers in range(len(LAYERS)):
            held = {seq_id: oracle.num_tokens(seq_id) for seq_id in (1, 2)}
            oracle.step((1, 3, 3), (2, 17, 1), num_layers=num_layers)
            oracle.rewind(held)
            oracle.step((1, 1, 1), (2, 1, 1))
        for refused in ({1: 40, 2: 38}, {1: 1, 3: 0}, {1: -1}):
            with pytest.raises(Refused):
                oracle.rewind(refused)
            oracle.check()
        oracle.rewind({1: 32, 2: 5})
        oracle.step((2, 30, 30), (1, 1, 1))
        oracle.rewind({1: 0, 2: 35})
        oracle.step((1, 2, 2), (2, 1, 1))


def check_releasing(make: Make) -> None:
    """Blocks come back and are used again; a number, too.  What is named falsely leaves all as it was."""
    with make() as holder:
        oracle = open_oracle(holder)
        for round_number in range(4):
            oracle.admit(s1=70, s2=70, s3=20)
            oracle.step((1, 60 - round_number, 1), (2, 50 + 3 * round_number, 1), (3, 7, 7))
            for refused in ((1, 4), (1, 1)):
                with pytest.raises(Refused):
                    oracle.release(*refused)
                oracle.check()
            oracle.release(1)
            oracle.step((3, 9, 2), (2, 1, 1))
            oracle.admit(s1=40)
            oracle.step((1, 40, 40))
            oracle.release(3, 1)
            oracle.release(2)


def check_strangers(make: Make) -> None:
    """Nothing is done for a step with a sequence that is not there, or is there twice."""
    with make() as holder:
        oracle = open_oracle(holder)
        oracle.admit(s1=20, s2=20)
        oracle.step((1, 4, 1), (2, 4, 1))
        oracle.release(2)
        tensors = [oracle.tensors([Row(1, 4, 2, 2)], layer) for layer in LAYERS]
        for rows in ([Row(1, 4, 1, 1), Row(2, 4, 1, 1)], [Row(1, 4, 1, 1), Row(1, 5, 1, 1)]):
            with pytest.raises(Refused):
                holder.step(rows, tensors)
            oracle.check()
        oracle.step((1, 1, 1))


def check_forking(make: Make) -> None:
    """Children begin with their parents' tokens; whoever goes on, goes back or ends leaves the others as they are."""
    with make() as holder:
        oracle = open_oracle(holder)
        oracle.admit(s1=70, s2=70, s3=70, s4=70, s5=30)
        oracle.step((1, 3 * BLOCK_TOKENS + 5, 1))
        free = oracle.holder.num_free_blocks()
        oracle.fork([2, 3, 4], [1, 1, 1], [3 * BLOCK_TOKENS + 5, 2 * BLOCK_TOKENS, 7])
        assert free - oracle.holder.num_free_blocks() == 2  # the partial tails
        oracle.step((1, 4, 4), (2, 3, 3), (3, 2, 2), (4, 1, 1))
        for refused in (([5], [1], [99]), ([5], [1], [31]), ([3], [1], [1]), ([5, 5], [1, 2], [1, 1]), ([5], [6], [0])):
            with pytest.raises(Refused):
                oracle.fork(*refused)
            oracle.check()
        oracle.rewind({2: 20, 1: 18})  # into what they share
        oracle.step((1, 2, 2), (2, 2, 2), (3, 1, 1))
        oracle.fork([5], [2], [17])
        oracle.release(1)
        oracle.everybody_attends()
        oracle.release(2, 4)
        oracle.everybody_attends()
        oracle.release(3, 5)


def check_queries_without_new_tokens(make: Make) -> None:
    """The last tokens of a sequence ask again, or for the first time."""
    with make() as holder:
        oracle = open_oracle(holder)
        oracle.admit(s1=60, s2=30)
        oracle.step((1, 40, 0), (2, 20, 20))
        oracle.step((1, 0, 40), (2, 1, 5))
        oracle.step((2, 0, 1))


def check_anything_in_any_order(make: Make, seed: int) -> None:
    random = np.random.default_rng(seed)
    with make() as holder:
        oracle = open_oracle(holder, seed)
        for _ in range(60):
            there, absent = list(oracle.kept), [i for i in range(6) if i not in oracle.kept]
            some = random.permutation(there).tolist()[: random.integers(1, 4)] if there else []
            try:
                match random.choice(["admit", "step", "step", "step", "rewind", "release", "fork"]):
                    case "admit" if absent:
                        oracle.admit_all({int(random.choice(absent)): int(random.integers(1, 120))})
                    case "step" if some:
                        oracle.step(*(_some_tokens(random, holder, oracle.num_tokens(i), i) for i in some))
                    case "rewind" if some:
                        oracle.rewind({i: int(random.integers(0, oracle.num_tokens(i) + 1)) for i in some})
                    case "release" if some and random.random() < 0.5:
                        oracle.release(*some)
                    case "fork" if absent and some:
                        child, tokens = int(random.choice(absent)), oracle.num_tokens(some[0])
                        oracle.admit_all({child: int(random.integers(1, 120))})
                        oracle.fork([child], some[:1], [int(random.integers(0, tokens + 1))])
            except Refused:
                oracle.check()
        oracle.release(*oracle.kept)
        assert holder.num_free_blocks() == NUM_BLOCKS


def _some_tokens(random: np.random.Generator, holder: Holder, held: int, seq_id: int) -> tuple[int, int, int]:
    can_have_none = held > 0
    num_tokens = int(random.choice([1, random.integers(1, 30), 0 if can_have_none else 1]))
    most = held + num_tokens if can_have_none else num_tokens
    return seq_id, num_tokens, int(random.choice([min(1, most), most, random.integers(0, most + 1)]))


def check_partial_states(make: Make) -> None:
    with make() as holder:
        oracle = open_oracle(holder)
        oracle.admit(s1=20)
        oracle.step((1, 5, 5))
        row = Row(1, 5, 1, 1)
        answers = oracle.holder.step([row], [oracle.tensors([row], layer) for layer in LAYERS])
        assert all((answer.lse is not None) == holder.is_partial for answer in answers)


CHECKS = (
    check_prompts_and_decoding,
    check_admitting,
    check_room,
    check_rewinding,
    check_releasing,
    check_strangers,
    check_forking,
    check_queries_without_new_tokens,
    check_partial_states,
)
