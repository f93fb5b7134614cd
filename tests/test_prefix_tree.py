"""The tree of what sequences begin with, as a state machine: whatever comes in whatever order, nothing wrong is found,
nothing that is there is missed, and what is kept is what lies on the R-worker beside what runs."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cpu_attention.kvstore import KVStore
from fastdecode.scheduling.chains import Tokens
from fastdecode.scheduling.prefix_tree import Fork, Found, PrefixTree

MOST = 400  # tokens that a sequence may come to hold
LEAST = 16  # tokens that are worth a fork


def store_of(block_tokens: int, num_blocks: int = 4000) -> KVStore:
    layout: Any = SimpleNamespace(
        block_bytes=1, block_tokens=block_tokens, layers=(), heads=(), num_blocks=lambda n: -(-n // block_tokens)
    )
    return KVStore(layout, num_blocks)


def num_common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@dataclass
class Running:
    scope: str | None
    tokens: tuple[int, ...]  # all that it has by now
    joined: tuple[int, ...]  # that it had when it joined
    priority: int
    found: Found
    is_whole: bool  # of all its full blocks it is the one that was there first, or found it
    has_begun: bool = False
    num_kv: int = 0  # tokens whose KV it has


@dataclass
class Kept:
    scope: str | None
    tokens: tuple[int, ...]


# Texts that are the same over and over, and join each other in the midst of blocks.
pieces = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 37)), min_size=1, max_size=3)
scopes = st.sampled_from([None, None, None, "a", "b"])
some = st.integers(0, 1 << 20)


def text(of: list[tuple[int, int]]) -> tuple[int, ...]:
    """At least one token."""
    return (*(kind * (at % 3 > 0) for kind, length in of for at in range(length)), 7)


class TreeMachine(RuleBasedStateMachine):
    """Beside the tree a KVStore that does what an R-worker would be told, and for each sequence its tokens.

    A step is open from the first join or begin until room is made; who leaves, or has computed something, does so
    between two steps, as with the scheduler.
    """

    @initialize(block_tokens=st.sampled_from([4, 16]))
    def open(self, block_tokens: int) -> None:
        self.size = block_tokens
        self.tree, self.store = PrefixTree(block_tokens), store_of(block_tokens)
        self.stored: dict[int, tuple[int, ...]] = {}  # whose K and V are there
        self.running: dict[int, Running] = {}
        self.kept: dict[int, Kept] = {}
        self.preempted: dict[int, tuple[str | None, tuple[int, ...], int]] = {}  # may come again, under its number
        self.began: dict[int, tuple[int, bool]] = {}  # in the step that is open
        self.is_open = False
        self.num_shared, self.unpaid = 0, Counter[int]()
        self.next_id = 0
        self.answers: dict[Any, tuple[int, Found]] = {}  # by question

    # What may be found

    def _look(self, seq_id: int, scope: str | None, tokens: tuple[int, ...], most: int, priority: int) -> Found:
        found = self.tree.find(seq_id, scope, Tokens.of(tokens, self.size), most, priority)
        for question, (num_changes, answer) in self.answers.items():
            if num_changes == self.tree.num_changes:
                assert self.tree.find(*question) == answer, "it has changed, and nobody was told"
        self.answers[seq_id, scope, Tokens.of(tokens, self.size), most, priority] = self.tree.num_changes, found
        if own := self.kept.get(seq_id):
            assert found.num_tokens == len(own.tokens) and own.tokens == tokens[: len(own.tokens)]
            return found
        wanted = tokens[:most]
        kept = [num_common(wanted, one.tokens) for one in self.kept.values() if one.scope == scope]
        joined = [num_common(wanted, one.joined) for one in self.running.values() if one.scope == scope]
        assert found.num_tokens <= max([0, *kept, *joined]), "more than anybody has, or will have"
        assert found.num_tokens == len(found.blocks) * self.size + found.num_copied and bool(found.source) == (
            found.num_copied > 0
        )
        whole = [one for one in self.running.values() if one.scope == scope and one.is_whole]
        there = [num_common(wanted, one.joined[: one.num_kv]) for one in whole]
        if all(one.priority <= priority for one in self.running.values()):
            there += [num_common(wanted, one.joined) for one in whole]
        least = max([0, *kept, *there]) // self.size * self.size
        assert found.num_tokens >= least or least < LEAST, "it was there, and not found"
        return found

    @rule(of=pieces, scope=scopes, most=st.integers(0, 120), priority=st.integers(0, 1))
    def find(self, of: list[tuple[int, int]], scope: str | None, most: int, priority: int) -> None:
        self._look(-1, scope, text(of), most, priority)

    # Who comes

    @rule(of=pieces, scope=scopes, priority=st.integers(0, 1), end=st.integers(0, 99), misses=st.integers(1, 20))
    def join(self, of: list[tuple[int, int]], scope: str | None, priority: int, end: int, misses: int) -> None:
        """misses: from that token on it does not look; 1: the last one is to be computed always."""
        self.next_id += 1
        self._join(self.next_id, scope, text(of), priority, end, misses if misses > 15 else 1)

    @precondition(lambda self: self.running or self.kept)
    @rule(which=some, less=st.integers(0, 18), of=pieces, begins=st.booleans(), is_spare=st.booleans())
    def join_like(self, which: int, less: int, of: list[tuple[int, int]], begins: bool, is_spare: bool) -> None:
        """It begins with what another one is known to have, but for the last few tokens."""
        kept = [one for i, one in self.kept.items() if i in self.preempted or which % 3]
        others = kept or [*self.running.values(), *self.kept.values()]
        other = others[which % len(others)]
        tokens = other.tokens[: max(0, len(other.tokens) - less)] + text(of)
        self.next_id += 1
        self._join(self.next_id, other.scope, tokens[: MOST // 2], 1, 50, 1)
        if begins and not self.tree.is_to_wait(self.next_id):
            self._begin(self.next_id, is_spare)
        if self.preempted and which % 2:
            self._come_again(which, which % 7, 50)

    @precondition(lambda self: self.preempted)
    @rule(which=some, new=st.integers(0, 30), end=st.integers(0, 99))
    def come_again(self, which: int, new: int, end: int) -> None:
        """With what is left of its KV, or without."""
        self._come_again(which, new, end)

    def _come_again(self, which: int, new: int, end: int) -> None:
        seq_id = list(self.preempted)[which % len(self.preempted)]
        scope, tokens, priority = self.preempted.pop(seq_id)
        is_kept = seq_id in self.kept
        self._join(seq_id, scope, tokens + (3,) * new, priority, end, 1)
        if is_kept:
            assert not self.tree.is_to_wait(seq_id)
            self._begin(seq_id, is_spare=False)

    def _join(
        self, seq_id: int, scope: str | None, tokens: tuple[int, ...], priority: int, end: int, misses: int
    ) -> None:
        most = max(0, len(tokens) - misses)
        found = self._look(seq_id, scope, tokens, most, priority)
        before = [one.tokens for one in self.kept.values() if one.scope == scope]
        before += [one.joined for one in self.running.values() if one.scope == scope]
        is_whole = max([num_common(tokens, one) for one in before], default=0) // self.size <= len(found.blocks)
        change = self.tree.join(seq_id, scope, Tokens.of(tokens, self.size), found, priority, end)
        self.is_open = True
        own = self.kept.pop(seq_id, None)
        self.running[seq_id] = Running(scope, tokens, tokens, priority, found, is_whole)
        if own:
            self.running[seq_id].num_kv = len(own.tokens)
        self.num_shared += change.num_shared
        for other, blocks in change.paid.items():
            self.unpaid[other] -= blocks
        self.unpaid[seq_id] = self.tree.num_unpaid(seq_id)

    @precondition(lambda self: self._ready)
    @rule(which=some, is_spare=st.booleans())
    def begin(self, which: int, is_spare: bool) -> None:
        ready = self._ready
        self._begin(ready[which % len(ready)], is_spare)

    @property
    def _ready(self) -> list[int]:
        return [i for i, one in self.running.items() if not one.has_begun and not self.tree.is_to_wait(i)]

    def _begin(self, seq_id: int, is_spare: bool) -> None:
        self.is_open = True
        one = self.running[seq_id]
        held_before = [bool(block.held_by) for block in one.found.blocks]
        num_tokens, had_them = self.tree.begin(seq_id, lambda: is_spare)
        one.has_begun = True
        self.began[seq_id] = num_tokens, had_them
        assert had_them == (seq_id in self.stored)
        if had_them:
            assert num_tokens == one.num_kv < len(one.tokens)
        else:
            assert num_tokens < len(one.tokens)
            assert num_tokens >= self.size * sum(held_before) and held_before == sorted(held_before, reverse=True)
            one.num_kv = num_tokens

    @precondition(lambda self: self.is_open or self.tree.num_kept)
    @rule(share=st.sampled_from([0, 0, 0, 0.1, 0.5, 1]))
    def make_room(self, share: float) -> None:
        """The step is complete, and the R-worker told."""
        cut, forks = self.tree.make_room(int(self.tree.num_kept * share))
        for seq_id, num_tokens in cut.items():
            assert seq_id not in self.running, "it runs"
            self._cut(seq_id, num_tokens)
        for seq_id, (_, had_them) in self.began.items():
            if not had_them:
                self.store.admit(seq_id, MOST)
                self.stored[seq_id] = ()
        expected = {seq_id: count for seq_id, (count, had_them) in self.began.items() if count and not had_them}
        assert {fork.child: fork.num_tokens for fork in forks} == expected
        for child, parent, count in forks:
            assert self.stored[child] == () and len(self.stored[parent]) >= count
            assert self.stored[parent][:count] == self.running[child].tokens[:count]
            holder = self.running.get(parent) or self.kept[parent]
            assert holder.scope == self.running[child].scope
            self.store.fork([child], [parent], [count])
            self.stored[child] = self.stored[parent][:count]
        self.began.clear()
        self.is_open = False

    def _cut(self, seq_id: int, num_tokens: int) -> None:
        """One that is kept holds so many tokens now."""
        if not num_tokens:
            self._release(seq_id)
            self.kept.pop(seq_id)
            return
        kept = self.kept[seq_id]
        assert 0 < num_tokens < len(kept.tokens)
        kept.tokens = kept.tokens[:num_tokens]
        self._truncate(seq_id, num_tokens)

    def _truncate(self, seq_id: int, num_tokens: int) -> None:
        self.store.truncate(seq_id, num_tokens)
        self.stored[seq_id] = self.stored[seq_id][:num_tokens]

    def _release(self, seq_id: int) -> None:
        self.store.release(seq_id)
        del self.stored[seq_id]

    # Who goes on

    @precondition(lambda self: not self.is_open and self._computing)
    @rule(which=some, count=st.integers(1, 60))
    def note(self, which: int, count: int) -> None:
        """A chunk of its prompt is through the model."""
        computing = self._computing
        self._compute(computing[which % len(computing)], count)

    def _compute(self, seq_id: int, count: int) -> None:
        one = self.running[seq_id]
        new = one.joined[one.num_kv : one.num_kv + count]
        self._extend(seq_id, new)
        self.tree.note(seq_id, one.num_kv)

    @property
    def _computing(self) -> list[int]:
        return [i for i, one in self.running.items() if one.has_begun and one.num_kv < len(one.joined)]

    @precondition(lambda self: not self.is_open and self._decoding)
    @rule(which=some, new=st.lists(st.integers(0, 3), min_size=1, max_size=20))
    def decode(self, which: int, new: list[int]) -> None:
        """Which the tree is not told."""
        decoding = self._decoding
        self._decode(decoding[which % len(decoding)], new)

    def _decode(self, seq_id: int, new: list[int]) -> None:
        one = self.running[seq_id]
        one.tokens += tuple(new)
        self._extend(seq_id, one.tokens[one.num_kv : -1])

    @property
    def _decoding(self) -> list[int]:
        return [
            i
            for i, one in self.running.items()
            if one.has_begun and one.num_kv >= len(one.joined) and len(one.tokens) < 300
        ]

    def _extend(self, seq_id: int, new: tuple[int, ...]) -> None:
        one = self.running[seq_id]
        assert len(self.stored[seq_id]) == one.num_kv
        self.store.extend({seq_id: len(new)})
        self.stored[seq_id] += new
        one.num_kv += len(new)
        assert self.stored[seq_id] == one.tokens[: one.num_kv]

    # Who goes

    @precondition(lambda self: not self.is_open and self.running)
    @rule(which=some, may_stay=st.booleans(), comes_again=st.booleans())
    def leave(self, which: int, may_stay: bool, comes_again: bool) -> None:
        self._leave(list(self.running)[which % len(self.running)], may_stay, comes_again)

    def _leave(self, seq_id: int, may_stay: bool, comes_again: bool) -> None:
        one = self.running.pop(seq_id)
        kept = None
        if may_stay and one.num_kv >= len(one.joined):
            kept = Tokens.of(one.tokens[: one.num_kv], self.size)
        change, num_kept = self.tree.leave(seq_id, kept)
        self.num_shared -= change.num_shared
        for other, blocks in change.paid.items():
            self.unpaid[other] -= blocks
        del self.unpaid[seq_id]
        assert 0 <= num_kept <= one.num_kv and (kept or not num_kept)
        if num_kept:
            self.kept[seq_id] = Kept(one.scope, one.tokens[:num_kept])
            if num_kept < one.num_kv:
                self._truncate(seq_id, num_kept)
        elif one.has_begun:
            self._release(seq_id)
        if comes_again and len(one.tokens) < 200:
            self.preempted[seq_id] = one.scope, (*one.tokens, 7), one.priority
        if kept:  # whoever asks for just that finds it, of this one or of another
            found = self.tree.find(-1, one.scope, kept, one.num_kv, one.priority)
            num_full = one.num_kv // self.size * self.size
            assert found.num_tokens >= num_full or num_full < LEAST or not one.is_whole

    @precondition(lambda self: not self.is_open)
    @rule(of=pieces, scope=scopes, new=st.lists(st.integers(0, 3), min_size=1, max_size=20), comes_again=st.booleans())
    def live(self, of: list[tuple[int, int]], scope: str | None, new: list[int], comes_again: bool) -> None:
        """A whole life, if it need not wait: until it is kept, and perhaps to come again."""
        self.next_id += 1
        seq_id, tokens = self.next_id, text(of)
        self._join(seq_id, scope, tokens, 0, 9, 1)
        if not self.tree.is_to_wait(seq_id):
            self._begin(seq_id, is_spare=True)
            self.make_room(0)
            self._compute(seq_id, MOST)
            self._decode(seq_id, new)
            self._leave(seq_id, may_stay=True, comes_again=comes_again)

    @precondition(lambda self: not self.is_open)
    @rule(which=st.sets(st.integers(1, 40), max_size=4))
    def forget(self, which: set[int]) -> None:
        gone = self.tree.forget(which)
        assert set(gone) == which & self.kept.keys() and len(gone) == len(set(gone))
        for seq_id in gone:
            self._cut(seq_id, 0)

    @precondition(lambda self: not self.is_open)
    @rule()
    def forget_all(self) -> None:
        for seq_id in self.tree.forget(self.tree.kept):
            self._cut(seq_id, 0)
        assert not self.tree.num_kept and not self.tree.kept

    # What holds between any two steps

    @invariant()
    def all_agree(self) -> None:
        if not hasattr(self, "tree") or self.is_open:
            return
        self.tree.check_integrity()
        self.store.check_integrity()
        assert set(self.tree.kept) == self.kept.keys()
        assert self.stored.keys() == self.store.seq_ids
        assert self.stored.keys() == {*self.kept, *(i for i, one in self.running.items() if one.has_begun)}
        blocks_of = {seq_id: self._blocks(seq_id) for seq_id in self.stored}
        of_running = [block for i in self.running.keys() & blocks_of.keys() for block in blocks_of[i]]
        for seq_id, one in self.kept.items():
            assert self.store.num_tokens(seq_id) == len(one.tokens)
        needed = set(of_running)
        for one in self.running.values():
            if not one.has_begun:  # it is to get them from whoever holds them
                for depth, block in enumerate(one.found.blocks):
                    needed.update(blocks_of[holder][depth] for holder in block.held_by)
        held = {block for blocks in blocks_of.values() for block in blocks}
        assert len(held - needed) == self.tree.num_kept
        assert len(held) == self.store.num_blocks - self.store.num_free_blocks
        assert len(self.kept) <= self.tree.num_kept + len(needed)
        if all(one.has_begun for one in self.running.values()):
            assert len(of_running) - len(set(of_running)) == self.num_shared
        assert all(self.tree.num_unpaid(i) == self.unpaid[i] for i in self.running)

    def _blocks(self, seq_id: int) -> list[int]:
        blocks: list[int] = self.store.block_tables([seq_id])[0].tolist()
        return blocks

    def teardown(self) -> None:
        """When all have left and are forgotten nothing is left of them."""
        if not hasattr(self, "tree"):
            return
        self.make_room(0)
        while self.running:
            self.leave(0, False, False)
        self.forget_all()
        self.all_agree()
        assert self.store.num_free_blocks == self.store.num_blocks and not self.tree._roots


TestTree = TreeMachine.TestCase
TestTree.settings = settings(max_examples=150, stateful_step_count=60)


def test_one_that_goes_on_in_the_step_in_which_another_copies_its_tail() -> None:
    """The copy is made before it writes there again."""
    size, tokens = 16, tuple(range(27))
    tree = PrefixTree(size)
    tree.join(1, None, Tokens.of(tokens[:20], size), Found(), 0, 5)
    assert tree.begin(1, lambda: True) == (0, False) and tree.make_room(0) == ({}, [])
    tree.note(1, 20)
    assert tree.leave(1, Tokens.of(tokens[:26], size))[1] == 26 and tree.num_kept == 2
    other, again = Tokens.of((*tokens[:24], 99, 98), size), Tokens.of(tokens, size)
    tree.join(2, None, other, tree.find(2, None, other, 25, 0), 0, 9)
    assert tree.begin(2, lambda: True) == (24, False)
    tree.join(1, None, again, tree.find(1, None, again, 26, 0), 0, 9)
    assert tree.begin(1, lambda: True) == (26, True)
    assert tree.make_room(0) == ({}, [Fork(2, 1, 24)])
    tree.check_integrity()
    assert tree.num_kept == 0


class Same(bytes):
    """Keys whose hashes are all the same: a table that went by them alone would take one for the other."""

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return bytes.__eq__(self, other)


def alone(tree: PrefixTree, seq_id: int, scope: str | None, tokens: Tokens, num_tokens: int) -> int:
    """It comes, is computed and stays; how many of its tokens were found."""
    found = tree.find(seq_id, scope, tokens, num_tokens - 1, 0)
    tree.join(seq_id, scope, tokens, found, 0, 9)
    count, _ = tree.begin(seq_id, lambda: True)
    tree.make_room(0)
    tree.note(seq_id, num_tokens)
    tree.leave(seq_id, tokens)
    tree.check_integrity()
    return count


def test_keys_whose_hashes_are_the_same() -> None:
    generator, size = np.random.default_rng(0), 16
    tree, everybody = PrefixTree(size), list[tuple[int, ...]]()
    for seq_id in range(60):
        tokens = tuple(generator.integers(0, 2, 40).tolist())
        if seq_id % 3 == 2:
            tokens = everybody[int(generator.integers(seq_id))][: int(generator.integers(16, 40))] + tokens
        plain = Tokens.of(tokens, size)
        found = alone(tree, seq_id, None, Tokens(tuple(map(Same, plain.blocks)), Same(plain.rest)), len(tokens))
        common = max((num_common(tokens[:-1], other) for other in everybody), default=0)
        assert common // size * size <= found <= common or (found == 0 and common < size + 16)
        everybody.append(tokens)


@pytest.mark.parametrize("first", [0, -1, 2**31 - 1])
def test_keys_that_agree_in_their_first_token_alone(first: int) -> None:
    """As prompts do that all begin with the same mark; whatever number that is."""
    size, tree = 16, PrefixTree(16)
    texts = [(first, *range(100 * i, 100 * i + 39)) for i in range(20)]
    assert [alone(tree, i, None, Tokens.of(one, size), 40) for i, one in enumerate(texts)] == [0] * 20
    # Of each all but the last token is there, and nothing of any other.
    for i, one in enumerate(texts):
        assert alone(tree, 100 + i, None, Tokens.of((*one, 7, 7), size), 42) == 40
    swapped = [(*one[:16], *other[16:]) for one, other in itertools.pairwise(texts)]
    assert [alone(tree, 200 + i, None, Tokens.of(one, size), 40) for i, one in enumerate(swapped)] == [16] * 19


def test_tokens_whose_bytes_are_shifted_are_others() -> None:
    """A chain is cut where tokens are, and blocks at their own place are compared."""
    size, tree = 16, PrefixTree(16)
    tokens = tuple(1 << (8 * (i % 3)) for i in range(48))
    assert alone(tree, 0, None, Tokens.of(tokens, size), 48) == 0
    for shift in (1, 2):
        moved = tokens[shift:] + tokens[:shift]
        assert alone(tree, shift, None, Tokens.of(moved, size), 48) == 0


def test_salts_never_meet() -> None:
    """The same prompt under each: found under its own, and nowhere else, running, waited for or kept."""
    tree, tokens = PrefixTree(16), Tokens.of(range(40), 16)
    salts = [None, "", "a", "b", "None", "\0"]
    for i, salt in enumerate(salts):
        assert not tree.find(-1, salt, tokens, 39, 9).num_tokens
        tree.join(i, salt, tokens, Found(), 0, 9)
    for i, salt in enumerate(salts):
        found = tree.find(-1, salt, tokens, 39, 9)
        assert found.num_tokens == 39 and not tree.is_to_wait(i)
        assert all(list(block.users) == [i] for block in found.blocks)
        assert tree.begin(i, lambda: True) == (0, False) and tree.make_room(0) == ({}, [])
        tree.note(i, 40)
    assert [tree.leave(i, tokens)[1] for i in range(len(salts))] == [40] * len(salts)
    for i, salt in enumerate(salts):
        seq_id = 10 + i
        tree.join(seq_id, salt, tokens, tree.find(seq_id, salt, tokens, 39, 0), 0, 9)
        assert tree.begin(seq_id, lambda: True) == (39, False)
        assert tree.make_room(0)[1] == [Fork(seq_id, i, 39)]
        tree.forget([i])
        tree.check_integrity()
    assert not tree.find(-1, "c", tokens, 39, 9).num_tokens
