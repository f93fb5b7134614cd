"""Tokens as chains of blocks, and the blocks of an R-worker that they lead along: plain data.  Pure.

Tokens    [64 tokens][64 tokens][20 tokens]      of a sequence, as bytes
Root ─── Block ─── Block ─── Block               what there is of them on an R-worker, each behind its parent
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from typing import Self

import numpy as np


class Block:
    """KV of some tokens after those of its parents; with fewer tokens than a block holds it is the end of a chain."""

    __slots__ = ("by_first", "children", "held_by", "is_end", "key", "parent", "payer", "users")

    def __init__(self, parent: Block | None, key: bytes) -> None:
        self.parent, self.key = parent, key
        self.children: dict[bytes, Block] = {}
        # In the order they came; dictionaries, for sets have none.
        self.by_first: dict[bytes, dict[Block, None]] = {}  # the children again, by their first token
        self.users: dict[int, None] = {}
        self.held_by: dict[int, None] = {}
        self.payer: int | None = None  # of the users, the one whose demand it is part of
        self.is_end = False  # of an ended sequence that is kept; of one, or there might be more of them than blocks


Scope = abc.Hashable  # of chains: those of different ones share nothing

_TOKEN = np.dtype(np.int32)
TOKEN_BYTES = _TOKEN.itemsize


@dataclass(frozen=True)
class Tokens:
    """Of a sequence, as chains of blocks are compared: by their bytes."""

    blocks: tuple[bytes, ...]  # full ones
    rest: bytes  # what comes after them; may be nothing

    @classmethod
    def of(cls, token_ids: abc.Sequence[int], block_tokens: int) -> Self:
        chain, size = np.array(token_ids, _TOKEN).tobytes(), block_tokens * TOKEN_BYTES
        num_full = len(token_ids) // block_tokens * size
        return cls(tuple(chain[at : at + size] for at in range(0, num_full, size)), chain[num_full:])

    def block(self, index: int) -> bytes:
        return self.blocks[index] if index < len(self.blocks) else self.rest

    def part(self, begin: int, end: int | None) -> Tokens:
        """From a block up to before another one; None: up to the end."""
        return Tokens(self.blocks[begin:end], self.rest if end is None or end > len(self.blocks) else b"")

    def before(self, block: int) -> bytes:
        """All that come before a block."""
        return b"".join(self.blocks[:block])


class Root(Block):
    """Of all chains that may share."""

    __slots__ = ("scope",)

    def __init__(self, scope: Scope) -> None:
        super().__init__(None, b"")
        self.scope = scope


def num_common(a: bytes, b: bytes) -> int:
    """How many tokens both begin with."""
    most = min(len(a), len(b)) // TOKEN_BYTES
    differ = np.frombuffer(a, _TOKEN, most) != np.frombuffer(b, _TOKEN, most)
    return int(differ.argmax()) if differ.any() else most
