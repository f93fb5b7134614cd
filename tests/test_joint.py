"""Rows that attend jointly, against the plain kernel that takes them one by one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sharing_trees import BLOCK_TOKENS, Tree, grow, trees

from cpu_attention import KV_DTYPES, NUMBER_DTYPES, AttentionRule, HeadFormat, RWorker, kernel, reference, sharing
from cpu_attention.multicore import Attention
from cpu_attention.state import State
from transport import Admit, Attend, Attended, Fork, Hello, LayerSpec, Rows, Welcome

TOLERANCE = 2e-6


@pytest.fixture(autouse=True, scope="module")
def _short_runs() -> Iterator[None]:
    """Runs of one block, which do not pay, so that small cases have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "LEAST_SPARED", 1)
        yield


class Case:
    """Of a tree: every block filled, beyond the sequences' ends too."""

    def __init__(
        self, tree: Tree, dtype: str, kv_heads: int, group: int, head_dim: int, seed: int, block: int = BLOCK_TOKENS
    ) -> None:
        generator = np.random.default_rng(seed)
        self.tree, self.head = tree, HeadFormat(dtype, head_dim, block)
        tokens = np.arange(tree.num_blocks * block, dtype=np.int32)
        self.data = np.zeros((tree.num_blocks, kv_heads, self.head.nbytes), np.uint8)
        k, v = (generator.standard_normal((len(tokens), kv_heads, head_dim), np.float32) for _ in "kv")
        kernel.append(k, v, tokens // block, tokens % block, self.data, self.head)
        shape = (len(tree.positions), kv_heads * group, head_dim)
        self.q = generator.standard_normal(shape, np.float32)

    def agree(
        self, rule: AttentionRule, num_threads: int = 1, tolerance: float = TOLERANCE, wire: str = "float32"
    ) -> int:
        """Returns how many pieces are done for several rows."""
        tables = self.tree.tables.tables[self.tree.tables.sequences]
        attention, states = Attention(num_threads), []
        q, block = self.q.astype(NUMBER_DTYPES[wire]), self.head.block_tokens
        alone = attention.cut(self.tree.positions, rule.window, block)
        jointly = attention.cut(self.tree.positions, rule.window, block, shared=self.tree.tables)
        for which, work in ((kernel, jointly), (reference, jointly), (reference, alone)):
            state = State.empty(*q.shape)
            which.attend(q, self.data, self.head, tables, work, rule, state, None, attention._team)
            states.append(state)
        attention.close()
        for state in states[:2]:
            for name in ("out", "maxima", "sums"):
                expected = getattr(states[2], name)
                np.testing.assert_allclose(getattr(state, name), expected, atol=tolerance, rtol=2 * tolerance)
        return int((jointly.jointly > 1).sum())


def siblings(count: int, blocks: int, block: int = BLOCK_TOKENS) -> Tree:
    """That have so many blocks in common, and a few tokens more."""
    assert block == BLOCK_TOKENS
    return grow([0] * count, [blocks * block + 1 + i % 20 for i in range(count)], [1.0] * count, [1] * count, 0)


# Query heads of a KV head: those of one pass, narrow and wide; of two, the last one narrow and wide; of many.
@pytest.mark.parametrize("count, group", [(2, 1), (2, 3), (4, 3), (13, 1), (8, 3), (65, 1)])
@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_any_number_of_rows(dtype: str, count: int, group: int) -> None:
    case = Case(siblings(count, 5), dtype, 2, group, 40, count)
    sinks = np.random.default_rng(0).normal(0, 2, 2 * group).astype(np.float32)
    assert case.agree(AttentionRule(0.2)) > 0
    assert case.agree(AttentionRule(0.1, window=50, sinks=sinks), num_threads=2, wire="float16") > 0


# Every number of vectors of channels and of tokens that the loops go by in their own way.
@pytest.mark.parametrize(
    "dtype, head_dim, block",
    [
        ("float32", 64, 48), ("int4", 48, 16), ("float16", 128, 64),
        *(
            pytest.param(*shape, marks=pytest.mark.slow)
            for shape in product(("bfloat16", "int8", "k8v4", "int4"), (16, 64, 80, 128), (32, 48))
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("softcap", [None, pytest.param(3.0, marks=pytest.mark.slow)])
def test_shapes(dtype: str, head_dim: int, block: int, softcap: float | None) -> None:
    tree = siblings(12, 3 * block // BLOCK_TOKENS)
    order = np.random.default_rng(0).permutation(20).astype(np.int32)
    tables = np.stack([np.append(order[:3], 3 + row) for row in order[3:15]]).astype(np.int32)
    positions = 3 * block + np.arange(12) % block
    tree = Tree(tree.tables._replace(tables=tables), positions)
    case = Case(tree, dtype, 1, 3, head_dim, 1, block)
    for rows in (12, 2):
        some = Tree(tree.tables._replace(sequences=np.arange(rows)), positions[:rows])
        case.tree, case.q = some, case.q[:rows]
        assert case.agree(AttentionRule(head_dim**-0.5, softcap=softcap)) > 0


@settings(max_examples=50)
@given(
    tree=trees(max_rows=40),
    dtype=st.sampled_from(sorted(KV_DTYPES)),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 3]),
    window=st.none() | st.integers(1, 200),
    has_sinks=st.booleans(),
    num_threads=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_any_tree(
    tree: Tree,
    dtype: str,
    kv_heads: int,
    group: int,
    window: int | None,
    has_sinks: bool,
    num_threads: int,
    seed: int,
) -> None:
    sinks = np.random.default_rng(seed).normal(0, 3, kv_heads * group).astype(np.float32) if has_sinks else None
    Case(tree, dtype, kv_heads, group, 40, seed).agree(AttentionRule(0.3, window, None, sinks), num_threads, 2e-5)


def test_large_scores_and_equal_keys() -> None:
    """Parts of rows whose scores are far apart from one another's: the merge subtracts, and nothing overflows."""
    case = Case(siblings(20, 4), "float32", 1, 1, 40, 0)
    case.agree(AttentionRule(30.0), tolerance=2e-3)
    case.agree(AttentionRule(0.0))


SPECS = (LayerSpec(6, 2, 40, 0.2), LayerSpec(6, 2, 40, 0.2, window=30, sinks=(0.5, -1.0, 2.0, 0.0, 1.0, 0.1)))


@pytest.mark.parametrize("dtype", KV_DTYPES)
def test_children_on_an_r_worker(dtype: str) -> None:
    """Children of a prompt decode, and the parent attends with a chunk, as sequences do that have nothing in common."""
    generator = np.random.default_rng(0)
    ids, starts = np.arange(1, 7), np.array([52, 52, 48, 37, 52, 20], np.int32)
    num_tokens, num_queries = np.array([20, 1, 1, 1, 1, 1], np.int32), np.array([20, 1, 1, 1, 1, 1], np.int32)

    def numbers(count: int, heads: int) -> np.ndarray:
        return generator.standard_normal((count, heads, 40), np.float32)

    prompts = [(numbers(52, 2), numbers(52, 2)) for _ in SPECS]
    news = [(numbers(25, 6), numbers(25, 2), numbers(25, 2)) for _ in SPECS]
    answers: list[list[np.ndarray]] = []
    for is_forked in (True, False):
        worker = RWorker(kv_cache_bytes=1 << 20, num_threads=2)
        assert isinstance(worker.handle(1, Hello(SPECS, dtype, BLOCK_TOKENS)), Welcome)
        worker.handle(1, Admit(ids, np.full(6, 100, np.int32)))
        filled = slice(0, 1) if is_forked else slice(0, 6)
        counts = starts[filled]
        zeros = np.zeros_like(counts)
        worker.handle(1, Rows(1, 0, ids[filled], zeros, counts, zeros))
        for layer, (k, v) in enumerate(prompts):
            k, v = (np.concatenate([part[:count] for count in counts]) for part in (k, v))
            worker.handle(1, Attend(1, 0, layer, numbers(0, 6), k, v))
        if is_forked:
            worker.handle(1, Fork(ids[1:], np.ones(5, np.int64), starts[1:]))
        worker.handle(1, Rows(2, 0, ids, starts, num_tokens, num_queries))
        works = worker._session.micro_batches[0].works  # type: ignore[union-attr]
        decodes = [(work.jointly > 1) & (work.pieces.rows >= 20) for work in works.values()]
        assert any(is_joint.any() for is_joint in decodes) == is_forked
        assert all(work.is_joint for work in works.values()), "the chunk's queries share their own sequence's blocks"
        replies = [worker.handle(1, Attend(2, 0, layer, *new)) for layer, new in enumerate(news)]
        answers.append([reply.o for reply in replies if isinstance(reply, Attended)])
        worker.close()
    for forked, alone in zip(*answers, strict=True):
        np.testing.assert_allclose(forked, alone, atol=TOLERANCE)
    assert len(answers[0]) == len(answers[1]) == len(SPECS)
