"""Which sequences of one R-worker begin alike, and which of its KV blocks they have in common.  Pure.

    root ─┬─ [the first 64 tokens] ─┬─ [the next 64] ─── [the last 20]        a block for each chain of tokens
          │                         └─ [another 64] …
          └─ […]

A block has users, sequences that run, and holders, who have its KV already: they have computed it, or were forked from
one who had.  Who starts gets the blocks that its tokens lead along, and adds those that come after.  A block without a
holder is promised: the first of its users computes it, and the others wait for that in their seats, to be forked then.
Whoever is first can only wait for those that came before it, so nobody waits in a circle; and if one who has promised
leaves, the next user is the first.

Sequences that have ended may stay as holders alone, and are cut back from their ends, those first that were used
longest ago, where there is no room for them.  Chains are found by the tokens themselves, not by digests of them: there
is nothing that could collide.

A block that is full is never written again, so it is shared; what is found of one that is not, or not the same to its
end, is copied by whoever begins with it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, abc
from dataclasses import dataclass, field
from typing import NamedTuple

from fastdecode.scheduling.chains import TOKEN_BYTES, Block, Root, Scope, Tokens, num_common

_LEAST_TOKENS = 16  # that are worth a fork


@dataclass(frozen=True)
class Found:
    """How far a sequence would go along a tree."""

    blocks: tuple[Block, ...] = ()  # full ones
    source: Block | None = None  # that would be copied in part
    num_copied: int = 0  # tokens of it
    num_tokens: int = 0  # in all
    num_used: int = 0  # of the blocks, those that running sequences have,
    used_until: int = 0  # and the step up to which they are expected to


@dataclass(frozen=True)
class Change:
    """What a sequence that comes or goes changes for the others."""

    num_shared: int  # of its blocks those that another running sequence has, too
    paid: abc.Mapping[int, int] = field(default_factory=dict)  # other sequence -> blocks it pays for, more or fewer


class Fork(NamedTuple):
    child: int
    parent: int
    num_tokens: int


@dataclass
class _Member:
    """A sequence."""

    scope: Scope
    path: list[Block]  # of its full blocks the first ones, up to where others have been before it
    tail: Block | None = None  # the end of its chain, if that is no full block
    num_held: int = 0  # of the path, how many it holds
    num_own: int = 0  # tokens that it had when it started: it had run before
    source: Block | None = None  # after its path as it was found, whose first tokens it is to copy
    num_copied: int = 0
    priority: int = 0
    end: int = 0  # the step in which it is expected to end
    has_begun: bool = False
    is_whole: bool = True  # its path has all of its full blocks

    @property
    def num_tokens(self) -> int:
        """Of path and tail: those of the path are full."""
        num_bytes = len(self.path) * len(self.path[0].key) if self.path else 0
        return (num_bytes + (len(self.tail.key) if self.tail else 0)) // TOKEN_BYTES

    @property
    def blocks(self) -> list[Block]:
        return [*self.path, self.tail] if self.tail else self.path


class PrefixTree:
    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._roots: dict[Scope, Root] = {}
        self._running: dict[int, _Member] = {}
        self._kept: dict[int, _Member] = {}
        self._leaves: OrderedDict[Block, None] = OrderedDict()  # that can be given up, the next one first
        self._begun: list[tuple[int, Block, int]] = []  # sequence, the last block it begins with, how many tokens
        self._pinned: list[Block] = []  # kept ones that they are to copy from
        self._written: list[tuple[Block, int]] = []  # of these, that a sequence is about to write after that
        self.num_kept = 0  # blocks that ended sequences alone hold, but for those
        self.num_changes = 0  # as long as it stays, `find` gives the same answers

    def is_own(self, seq_id: int, scope: Scope, most_tokens: int) -> bool:
        """It has run here before, and what is left of it are its first tokens there, up to so many."""
        own = self._kept.get(seq_id)
        return own is not None and own.scope == scope and own.num_tokens <= most_tokens

    def find(self, seq_id: int, scope: Scope, tokens: Tokens, most_tokens: int, priority: int) -> Found:
        """How many of its first tokens, up to so many, are there, or promised by somebody who does not rank after it;
        if it has run here before, what there is left of it.  priority: its own, lower goes first.
        """
        if self.is_own(seq_id, scope, most_tokens):
            own = self._kept[seq_id]
            return self._found(own.path, None, 0, own.num_tokens)
        block: Block | None = self._roots.get(scope)
        if block is None:
            return Found()
        path: list[Block] = []
        for key in tokens.blocks[: most_tokens // self._block_tokens]:
            child = block.children.get(key)
            if child is None or not self._is_due(child, priority):
                break
            path.append(child)
            block = child
        begin = len(path) * self._block_tokens
        rest = tokens.block(len(path))[: (most_tokens - begin) * TOKEN_BYTES]
        source = next(reversed(block.by_first.get(rest[:TOKEN_BYTES], {})), None)
        copied = num_common(source.key, rest) if source and self._is_due(source, priority) else 0
        if begin + copied < _LEAST_TOKENS:
            return Found()
        return self._found(path, source if copied else None, copied, begin + copied)

    def _found(self, path: list[Block], source: Block | None, num_copied: int, num_tokens: int) -> Found:
        ends = [self._running[block.payer].end for block in path if block.payer is not None]
        return Found(tuple(path), source, num_copied, num_tokens, len(ends), min(ends, default=0))

    def join(self, seq_id: int, scope: Scope, tokens: Tokens, found: Found, priority: int, end: int) -> Change:
        """It runs from now on.  end: when it is expected to end."""
        self.num_changes += 1
        member = self._kept.pop(seq_id, None)
        if member is None:
            member = _Member(scope, list(found.blocks), source=found.source, num_copied=found.num_copied)
        else:
            member.num_own = member.num_tokens
            member.blocks[-1].is_end = False
            if member.tail:  # that is about to be written
                if member.tail in self._pinned:
                    self._written.append((member.tail, seq_id))
                else:
                    self._drop_holder(member.tail, seq_id)
                member.tail = None
        member.priority, member.end = priority, end
        self._grow(member, tokens)
        self._running[seq_id] = member
        num_shared, paid = 0, Counter[int]()
        for block in member.path:
            self._use(block, seq_id)
            num_shared += len(block.users) > 1
            if block.payer is None or self._running[block.payer].end < end:  # whoever is there longest
                if block.payer is not None:
                    paid[block.payer] -= 1
                block.payer = seq_id
        if member.tail:
            self._use(member.tail, seq_id)
        return Change(num_shared, paid)

    def num_unpaid(self, seq_id: int) -> int:
        """Of its blocks those that are part of another one's demand."""
        return sum(block.payer != seq_id for block in self._running[seq_id].path)

    def has_own(self, seq_id: int) -> bool:
        """Its R-worker knew it when it started."""
        return self._running[seq_id].num_own > 0

    def is_to_wait(self, seq_id: int) -> bool:
        """Whether what it begins with is on its way."""
        member = self._running[seq_id]
        if member.has_begun or member.num_own:
            return False
        for block in member.path:
            if not block.held_by:
                return next(iter(block.users)) != seq_id
        return bool(member.source and member.source.users and not member.source.held_by)

    def begin(self, seq_id: int, is_spare: abc.Callable[[], bool]) -> tuple[int, bool]:
        """Its first tokens go through the model now.  How many of them need not, and whether it had them already.

        The others it has from now on; from whom, `make_room` tells.

        is_spare: takes a block for what is copied and may else have been given up, if there is one; until `make_room`.
        """
        member = self._running[seq_id]
        self.num_changes += 1
        assert not member.has_begun
        member.has_begun = True
        if member.num_own:
            return member.num_own, True
        held = [block for block in member.path if block.held_by]
        last, num_tokens = held[-1] if held else None, len(held) * self._block_tokens
        source, member.source = member.source, None
        if source and source.held_by and source.parent is (last or self._roots.get(member.scope)):
            is_kept = not source.users and source not in self._pinned
            if not is_kept or is_spare():
                if is_kept:
                    self._pin(source)
                last, num_tokens = source, num_tokens + member.num_copied
        if last:
            self._begun.append((seq_id, last, num_tokens))
        self._hold(seq_id, member, len(held))
        return num_tokens, False

    def note(self, seq_id: int, num_tokens: int) -> None:
        """So many of its first tokens have their KV."""
        member = self._running[seq_id]
        self._hold(seq_id, member, min(num_tokens // self._block_tokens, len(member.path)))
        if member.tail and num_tokens >= member.num_tokens:
            self.num_changes += 1
            member.tail.held_by[seq_id] = None

    def leave(self, seq_id: int, kept: Tokens | None) -> tuple[Change, int]:
        """It runs no more.  kept: the tokens that it has KV of, if that may stay.

        What changes for others, and how many tokens of it do stay; 0 if others have all of them.
        """
        member = self._running.pop(seq_id)
        self.num_changes += 1
        if member.tail:
            self._stop_using(member.tail, seq_id, stays=False)
            member.tail = None
        num_kept = member.num_held if kept else 0
        num_shared, paid = 0, Counter[int]()
        for index in range(len(member.path) - 1, -1, -1):
            block = member.path[index]
            self._stop_using(block, seq_id, stays=index < num_kept)
            num_shared += bool(block.users)
            if block.payer == seq_id:
                block.payer = next(reversed(block.users), None)
                if block.payer is not None:
                    paid[block.payer] += 1
        del member.path[num_kept:]
        return Change(num_shared, paid), self._keep(seq_id, member, kept) if kept else 0

    def make_room(self, num_blocks: int) -> tuple[dict[int, int], list[Fork]]:
        """Gives up so many blocks that ended sequences alone hold, but none that is to be copied.

        # sequence -> how many tokens of it stay; what those are forked from that have begun since the last call: from
        somebody who stays, for of several who hold a block one does.
        """
        cut: dict[int, int] = {}
        self.num_changes += num_blocks > 0 or bool(self._written)
        for _ in range(num_blocks):
            block = next(iter(self._leaves))
            (seq_id,) = block.held_by
            member = self._kept[seq_id]
            if member.tail is block:
                member.tail = None
            else:
                member.path.pop()
            member.num_held = len(member.path)
            self._drop_holder(block, seq_id)
            cut[seq_id] = member.num_tokens
            if member.path and not member.path[-1].is_end:
                member.path[-1].is_end = True
            else:  # another one has as much
                cut[seq_id] = 0
                self._forget(seq_id)
        begun, self._begun = self._begun, []
        children = {seq_id for seq_id, _, _ in begun}
        forks = [
            Fork(seq_id, next(parent for parent in block.held_by if parent not in children), num_tokens)
            for seq_id, block, num_tokens in begun
        ]
        pinned, self._pinned = self._pinned, []
        for block in pinned:
            self.num_kept += not block.users
            self._see(block)
        written, self._written = self._written, []
        for block, seq_id in written:
            self._drop_holder(block, seq_id)
        return cut, forks

    def forget(self, seq_ids: abc.Iterable[int]) -> list[int]:
        """Ended sequences of these do not stay any longer; they are returned."""
        gone = [seq_id for seq_id in seq_ids if seq_id in self._kept]
        self.num_changes += bool(gone)
        for seq_id in gone:
            self._kept[seq_id].blocks[-1].is_end = False
            self._forget(seq_id)
        return gone

    @property
    def keeps_something(self) -> bool:
        return bool(self._kept)

    @property
    def kept(self) -> list[int]:
        """Sequences that have ended and stay."""
        return list(self._kept)

    def check_integrity(self) -> None:
        """Asserts that blocks know their sequences, and the other way round."""
        assert not self._pinned and not self._begun and not self._written
        blocks: list[Block] = []
        to_see: list[Block] = [*self._roots.values()]
        assert all(root.children for root in to_see)
        while to_see:
            block = to_see.pop()
            for key, child in block.children.items():
                assert child.key == key and child.parent is block
                blocks.append(child)
                to_see.append(child)
            alike = [(first, child) for first, children in block.by_first.items() for child in children]
            assert {child for _, child in alike} == set(block.children.values()) and len(alike) == len(block.children)
            assert all(child.key.startswith(first) for first, child in alike)
        users: dict[Block, list[int]] = {block: [] for block in blocks}
        holders: dict[Block, list[int]] = {block: [] for block in blocks}
        for seq_id, member in self._running.items():
            for block in member.blocks:
                users[block].append(seq_id)
            for block in member.path[: member.num_held]:
                holders[block].append(seq_id)
            if member.tail and seq_id in member.tail.held_by:
                holders[member.tail].append(seq_id)
        for seq_id, member in self._kept.items():
            assert member.num_held == len(member.path) and member.blocks
            for block in member.blocks:
                holders[block].append(seq_id)
        ends = [member.blocks[-1] for member in self._kept.values()]
        for block in blocks:
            assert ends.count(block) == block.is_end, "no two kept ones end alike"
            assert sorted(block.users) == sorted(users[block]) and sorted(block.held_by) == sorted(holders[block])
            assert block.users or block.held_by, "a block that nobody has is gone"
            is_full = len(block.key) == self._block_tokens * TOKEN_BYTES
            assert is_full or not block.children
            assert block.payer in block.users if block.users and is_full else block.payer is None
            is_leaf = not block.users and not block.children
            assert is_leaf == (block in self._leaves), "what can be given up is known"
        assert len(self._leaves) == sum(not block.users and not block.children for block in blocks)
        assert self.num_kept == sum(not block.users for block in blocks)

    def _is_due(self, block: Block, priority: int) -> bool:
        """It is there, or will be before one of this priority would have its turn."""
        return bool(block.held_by) or self._running[next(iter(block.users))].priority <= priority

    def _grow(self, member: _Member, tokens: Tokens) -> None:
        """Blocks for what comes after its path, as far as nobody else has them."""
        block: Block
        if member.path:
            block = member.path[-1]
        else:
            block = self._roots.setdefault(member.scope, Root(member.scope))
        for key in tokens.blocks[len(member.path) :]:
            if key in block.children:
                member.is_whole = False
                break
            block = self._add(block, key)
            member.path.append(block)
        else:
            if tokens.rest and tokens.rest not in block.children:
                member.tail = self._add(block, tokens.rest)
        self._see(block)

    def _keep(self, seq_id: int, member: _Member, tokens: Tokens) -> int:
        """How many tokens of it stay, which has left: all that there are blocks for, if nobody else has them all."""
        num_before = len(member.path)
        if member.is_whole:
            self._grow(member, tokens)
        for block in member.blocks[num_before:]:
            block.held_by[seq_id] = None
            self.num_kept += 1
            self._see(block)
        self._kept[seq_id] = _Member(member.scope, member.path, member.tail, len(member.path))
        if not member.blocks or len(member.blocks[-1].held_by) > 1:
            self._forget(seq_id)
            return 0
        member.blocks[-1].is_end = True
        return member.num_tokens

    def _forget(self, seq_id: int) -> None:
        """One that is kept, and counts as the end of no block."""
        for block in reversed(self._kept.pop(seq_id).blocks):
            self._drop_holder(block, seq_id)

    def _hold(self, seq_id: int, member: _Member, num_blocks: int) -> None:
        """It has KV of so many blocks of its path now."""
        for block in member.path[member.num_held : num_blocks]:
            self.num_changes += 1
            block.held_by[seq_id] = None
        member.num_held = max(member.num_held, num_blocks)

    def _pin(self, block: Block) -> None:
        self._pinned.append(block)
        self.num_kept -= 1
        self._leaves.pop(block, None)

    def _use(self, block: Block, seq_id: int) -> None:
        if not block.users and block.held_by and block not in self._pinned:
            self.num_kept -= 1
        block.users[seq_id] = None
        self._see(block)

    def _stop_using(self, block: Block, seq_id: int, *, stays: bool) -> None:
        """stays: it goes on holding it."""
        del block.users[seq_id]
        if not stays:
            block.held_by.pop(seq_id, None)
        if block.users:
            return
        if block.held_by:
            self.num_kept += 1
            self._see(block)
        else:
            self._drop(block)

    def _drop_holder(self, block: Block, seq_id: int) -> None:
        """An ended sequence holds it no more."""
        del block.held_by[seq_id]
        if not block.users and not block.held_by:
            self.num_kept -= 1
            self._drop(block)

    def _add(self, parent: Block, key: bytes) -> Block:
        child = parent.children[key] = Block(parent, key)
        parent.by_first.setdefault(key[:TOKEN_BYTES], {})[child] = None
        self._leaves.pop(parent, None)
        return child

    def _drop(self, block: Block) -> None:
        """Out of the tree; its parent may be next."""
        parent = block.parent
        assert parent is not None and not block.children
        block.users, block.held_by = {}, {}
        del parent.children[block.key]
        alike = parent.by_first[first := block.key[:TOKEN_BYTES]]
        del alike[block]
        if not alike:
            del parent.by_first[first]
        self._leaves.pop(block, None)
        self._see(parent, is_oldest=True)

    def _see(self, block: Block, *, is_oldest: bool = False) -> None:
        """Whether it can be given up now.  is_oldest: as the next one."""
        if isinstance(block, Root):
            if not block.children:
                del self._roots[block.scope]
        elif block.held_by and not block.users and not block.children and block not in self._pinned:
            if block not in self._leaves:
                self._leaves[block] = None
                self._leaves.move_to_end(block, last=not is_oldest)
        else:
            self._leaves.pop(block, None)
