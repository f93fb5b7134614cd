"""Block tables of sequences that were forked from one another, and rows that see some of their tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from cpu_attention.sharing import Tables

BLOCK_TOKENS = 16


@dataclass(frozen=True)
class Tree:
    tables: Tables
    positions: np.ndarray  # [num_rows] int64, of each row's last token

    @property
    def num_blocks(self) -> int:
        return int(self.tables.tables.max()) + 1


def grow(parents: list[int], lengths: list[int], common: list[float], num_rows: list[int], seed: int) -> Tree:
    """Sequence i begins with a part of sequence parents[i] (modulo i), whole blocks of it shared, and goes on to
    lengths[i] tokens; its last num_rows[i] tokens have a row each."""
    generator = np.random.default_rng(seed)
    counts = [-(-length // BLOCK_TOKENS) for length in lengths]
    free = generator.permutation(sum(counts)).astype(np.int32).tolist()
    blocks: list[list[int]] = []
    for i, (count, parent) in enumerate(zip(counts, parents, strict=True)):
        most = min(lengths[i], lengths[parent % i]) if i else 0
        kept = blocks[parent % i][: int(most * common[i]) // BLOCK_TOKENS] if i else []
        blocks.append(kept + [free.pop() for _ in range(count - len(kept))])
    tables = np.zeros((len(blocks), max(counts)), np.int32)
    for table, of_sequence in zip(tables, blocks, strict=True):
        table[: len(of_sequence)] = of_sequence
    rows = [min(*pair) for pair in zip(num_rows, lengths, strict=True)]
    positions = [np.arange(length - count, length) for length, count in zip(lengths, rows, strict=True)]
    return Tree(Tables(tables, np.repeat(np.arange(len(rows)), rows)), np.concatenate(positions))


@st.composite
def trees(draw: st.DrawFn, max_sequences: int = 12, max_tokens: int = 200, max_rows: int = 90) -> Tree:
    count = draw(st.integers(1, max_sequences))

    def column(strategy: st.SearchStrategy) -> list:
        return draw(st.lists(strategy, min_size=count, max_size=count))

    return grow(
        column(st.integers(0, count)),
        column(st.integers(1, max_tokens)),
        column(st.sampled_from([0.0, 0.5, 1.0, 1.0])),
        column(st.sampled_from([1, 1, 1, 2, max_rows])),
        draw(st.integers(0, 2**31)),
    )


TREES = trees()
