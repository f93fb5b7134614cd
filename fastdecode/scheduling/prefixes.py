"""What sequences begin with is computed once, and held once on an R-worker.  Pure.

    waiting ── find ──► where how much of it lies ── start ──► running: waits for what is on its way ── begin ──► forked
                                                                                                                    │
    kept, until there is no room ◄── leave ──────────────────────────────── note, as its tokens get their KV ◄──────┘

    sharing    who begins with KV of whom
    ────────   ──────────────────────────────────────────────────────────────────────────────────────────────────────
    prompts    of everybody with the same salt, running or ended: ended ones stay while nobody needs their room
    samples    the n sequences of a request of one another, while they run
    nothing    nobody of anybody

What a sequence is forked from has its KV already, so the tokens after it go through the model alone, and attend on the
R-worker.  The last token of a prompt always does: the next one is drawn from its logits.

Of a sequence in parts each part is shared like a sequence of its own, by those that have the same tokens before it.
Where such a sequence lay is remembered, so that whoever begins like it is divided in the same way.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from functools import partial

from fastdecode.scheduling.chains import Tokens
from fastdecode.scheduling.layouts import Layout, Layouts, Place, places_of
from fastdecode.scheduling.parts import Part
from fastdecode.scheduling.plan import Forking
from fastdecode.scheduling.prefix_tree import Change, Found, PrefixTree
from fastdecode.scheduling.request import Sequence

SHARING = ("prompts", "samples", "nothing")


@dataclass
class PrefixCounts:
    """In tokens, of all sequences that have started, but not of those that started again."""

    num_queried: int = 0  # of their prompts
    num_found: int = 0  # of them those that did not go through the model


class Prefixes:
    def __init__(self, block_tokens: int, sharing: str, counts: PrefixCounts) -> None:
        assert sharing in SHARING
        self._block_tokens, self._sharing = block_tokens, sharing
        self._trees: dict[int, PrefixTree] = {}  # by R-worker
        self._running: dict[int, tuple[Place, ...]] = {}  # sequence -> where it is
        self._layouts = Layouts(block_tokens)  # of sequences in parts, that ran or run
        self._cut: dict[int, dict[int, int]] = {}  # R-worker -> ended sequence -> tokens of it that stay, untold as yet
        self._asked: tuple[Sequence, int, Tokens] | None = None  # whose tokens were looked at last, and how many
        # By R-worker what was found last: the tree and its state, the question, the answer.
        self._found: dict[int, tuple[PrefixTree, int, tuple[int, Tokens, int], Found]] = {}
        self._counts = counts

    def find(self, sequence: Sequence) -> dict[int, Found]:
        """Where there is something that it could begin with.  R-worker -> what"""
        if not self._is_sharing(sequence) or not self._trees:
            return {}
        tokens, most = self._tokens(sequence), self._most(sequence)
        found = {worker: self._find(sequence, tokens, most, worker, tree) for worker, tree in self._trees.items()}
        return {worker: one for worker, one in found.items() if one.num_tokens}

    def layout(self, sequence: Sequence, num_whole: int) -> Layout | None:
        """Where one lies, or lay, in parts of which it would find the most; None: it would not find more than so many
        tokens.
        """
        if not self._layouts or not self._is_sharing(sequence):
            return None
        best, tokens = None, self._tokens(sequence)
        for parts in self._layouts.alike(self._scope(sequence), tokens):
            found = {place.r_worker: self._find_part(sequence, place) for place in self._places(sequence, parts)}
            num_found = sum(one.num_tokens for one in found.values())
            if num_found > num_whole:
                best, num_whole = Layout(parts, {worker: one.num_used for worker, one in found.items()}), num_found
        return best

    def start(
        self, sequence: Sequence, parts: tuple[Part, ...], found: Found | None, end: int
    ) -> list[tuple[int, Change]]:
        """It runs there from now on, until about the step `end`.  R-worker, and what that changes there for others.

        found: there, if it is one.
        """
        if not self._is_sharing(sequence):
            return []
        places = self._running[sequence.seq_id] = self._places(sequence, parts)
        if sequence.num_preemptions:
            self._forget_unfit(sequence, parts)
        changes = []
        for place in places:
            begin_with = self._find_part(sequence, place) if len(parts) > 1 else found or Found()
            changes.append((place.r_worker, self._join(sequence, place, self._tokens(sequence), begin_with, end)))
        if parts[-1].first_token < sequence.num_tokens and len(parts) > 1:
            self._layouts.remember(self._scope(sequence), parts, self._tokens(sequence))
        return changes

    def num_unpaid(self, sequence: Sequence) -> dict[int, int]:
        """R-worker -> of its blocks there those that are part of the demand of another that runs."""
        places = self._running.get(sequence.seq_id, ())
        return {place.r_worker: self._trees[place.r_worker].num_unpaid(sequence.seq_id) for place in places}

    def is_to_wait(self, sequence: Sequence) -> bool:
        """Whether what it begins with is on its way."""
        places = self._running.get(sequence.seq_id, ())
        return any(self._trees[place.r_worker].is_to_wait(sequence.seq_id) for place in places)

    def begin(self, sequence: Sequence, is_spare: abc.Callable[[int], bool]) -> dict[int, tuple[int, bool]]:
        """Its first tokens go through the model now.  R-worker -> how many of its part of them need not, and whether it
        had them already.

        is_spare: takes a block on an R-worker, if there is one, for what it copies; `make_room` gives it back.
        """
        places = self._running.get(sequence.seq_id, ())
        begun = {
            place.r_worker: self._trees[place.r_worker].begin(sequence.seq_id, partial(is_spare, place.r_worker))
            for place in places
        }
        if places and not sequence.num_preemptions:
            self._counts.num_queried += sequence.num_tokens
            self._counts.num_found += sum(num_tokens for num_tokens, _ in begun.values())
        return begun

    def note(self, sequence: Sequence) -> None:
        """More of its prompt has its KV."""
        for place in self._running.get(sequence.seq_id, ()):
            if sequence.num_prefilled > place.begin:
                self._trees[place.r_worker].note(sequence.seq_id, place.length(sequence.num_prefilled))

    def leave(self, sequence: Sequence, *, may_stay: bool) -> tuple[list[tuple[int, Change]], list[int]]:
        """It runs no more.  R-worker, and what that changes there for others; and the R-workers that can free its KV:
        the others keep it for those to come.

        What is on its way in does not stay: part of it may be on the S-worker alone.
        """
        kept, places = None, self._running.pop(sequence.seq_id, ())
        if may_stay and self._sharing == "prompts" and not sequence.is_prefilling:
            kept = Tokens.of(sequence.token_ids[: sequence.num_kv_tokens], self._block_tokens)
            places = self._with_grown(sequence, places, kept)
        changes, stays, owns = [], set(), set()
        for place in places:
            tree, num_tokens = self._trees[place.r_worker], place.length(sequence.num_kv_tokens)
            if tree.has_own(sequence.seq_id):
                owns.add(place.r_worker)
            change, num_kept = tree.leave(sequence.seq_id, place.of(kept, self._block_tokens) if kept else None)
            changes.append((place.r_worker, change))
            if num_kept:
                stays.add(place.r_worker)
            if 0 < num_kept < num_tokens:
                self._note_cuts(place.r_worker, {sequence.seq_id: num_kept})
        known = {worker for worker, _ in sequence.parts} if sequence.is_known else owns
        return changes, sorted(known - stays)

    @property
    def keeps_something(self) -> bool:
        return any(tree.keeps_something for tree in self._trees.values())

    def kept(self, worker: int) -> set[int]:
        """Ended sequences that are there still; of some of them all is given up, and nobody told."""
        tree = self._trees.get(worker)
        return {*(tree.kept if tree else ()), *self._cut.get(worker, ())}

    def make_room(self, num_free_blocks: abc.Mapping[int, int]) -> list[Forking]:
        """Where ended sequences hold more than that, they give it up.  By R-worker; what runs has taken its part.

        From whom those are forked that have begun since the last call.
        """
        forkings = []
        for worker, tree in self._trees.items():
            cut, forks = tree.make_room(max(0, tree.num_kept - num_free_blocks[worker]))
            self._note_cuts(worker, cut)
            forkings += [Forking(child, parent, worker, num_tokens) for child, parent, num_tokens in forks]
        return forkings

    def take_cuts(self) -> dict[int, dict[int, int]]:
        """R-worker -> ended sequence -> how many tokens of it stay; those that nobody was told of yet."""
        taken, self._cut = self._cut, {}
        return taken

    def forget(self, worker: int, seq_ids: abc.Iterable[int]) -> list[int]:
        """Ended sequences of these do not stay any longer; they are returned, and not among the cuts."""
        tree = self._trees.get(worker)
        gone = tree.forget(seq_ids) if tree else []
        for seq_id in gone:
            self._cut.get(worker, {}).pop(seq_id, None)
        return gone

    def forget_all(self) -> None:
        """No ended sequence stays any longer."""
        for worker, tree in self._trees.items():
            self._note_cuts(worker, dict.fromkeys(tree.forget(tree.kept), 0))

    def lose(self, worker: int) -> None:
        """It is gone, and what ended there with it; whoever ran there has left already."""
        self._trees.pop(worker, None)
        self._found.pop(worker, None)
        self._cut.pop(worker, None)
        self._layouts.lose(worker)

    def check_integrity(self, running: abc.Iterable[Sequence]) -> None:
        for tree in self._trees.values():
            tree.check_integrity()
        there = {s.seq_id: s.parts for s in running if self._is_sharing(s)}
        assert there.keys() == self._running.keys()
        for seq_id, places in self._running.items():
            assert all((place.r_worker, place.begin) in there[seq_id] for place in places)

    def _is_sharing(self, sequence: Sequence) -> bool:
        return self._sharing == "prompts" or (self._sharing == "samples" and sequence.request.params.n > 1)

    def _scope(self, sequence: Sequence) -> str | None:
        return sequence.request.cache_salt if self._sharing == "prompts" else sequence.request.request_id

    def _places(self, sequence: Sequence, parts: tuple[Part, ...]) -> tuple[Place, ...]:
        tokens = self._tokens(sequence)
        return places_of(self._scope(sequence), parts, tokens, sequence.num_tokens, self._block_tokens)

    def _find_part(self, sequence: Sequence, place: Place) -> Found:
        tree, most = self._trees.get(place.r_worker), place.length(self._most(sequence))
        if tree is None or most < 1:
            return Found()
        tokens = place.of(self._tokens(sequence), self._block_tokens)
        return tree.find(sequence.seq_id, place.scope, tokens, most, sequence.request.priority)

    def _join(self, sequence: Sequence, place: Place, tokens: Tokens, found: Found, end: int) -> Change:
        tree = self._trees.setdefault(place.r_worker, PrefixTree(self._block_tokens))
        return tree.join(
            sequence.seq_id, place.scope, place.of(tokens, self._block_tokens), found, sequence.request.priority, end
        )

    def _most(self, sequence: Sequence) -> int:
        """Of its tokens that it could find: the logits of the others are wanted."""
        if sequence.num_scored < sequence.num_to_score:
            return min(sequence.num_tokens - 1, sequence.num_scored)
        return sequence.num_tokens - 1

    def _forget_unfit(self, sequence: Sequence, parts: tuple[Part, ...]) -> None:
        """One that comes again, where R-workers have KV of it that does not go with the parts it gets now."""
        fit = {place.r_worker: place for place in self._running[sequence.seq_id]}
        for worker, _ in parts:
            tree, place = self._trees.get(worker), fit.get(worker)
            most = place.length(sequence.num_tokens - 1) if place else 0
            if tree and not tree.is_own(sequence.seq_id, place.scope if place else None, most):
                self._note_cuts(worker, dict.fromkeys(self.forget(worker, [sequence.seq_id]), 0))

    def _with_grown(self, sequence: Sequence, places: tuple[Place, ...], kept: Tokens) -> tuple[Place, ...]:
        """And the parts that it has come to while it ran: they are there for others from now on."""
        if len(places) == len(sequence.parts):
            return places
        reached = places_of(self._scope(sequence), sequence.parts, kept, sequence.num_kv_tokens, self._block_tokens)
        for place in reached[len(places) :]:
            self._join(sequence, place, kept, Found(), 0)
            self._trees[place.r_worker].note(sequence.seq_id, place.length(sequence.num_kv_tokens))
        if len(reached) == len(sequence.parts):
            self._layouts.remember(self._scope(sequence), sequence.parts, kept)
        return reached

    def _tokens(self, sequence: Sequence) -> Tokens:
        """Of prompt and output, as they are now: of who waits at the front they are asked for again in every step."""
        if self._asked and self._asked[0] is sequence and self._asked[1] == sequence.num_tokens:
            return self._asked[2]
        tokens = Tokens.of(sequence.token_ids, self._block_tokens)
        self._asked = sequence, sequence.num_tokens, tokens
        return tokens

    def _find(self, sequence: Sequence, tokens: Tokens, most: int, worker: int, tree: PrefixTree) -> Found:
        """While who waits at the front is the same, it is looked for where something has changed alone."""
        last = self._found.get(worker)
        if last and last[0] is tree and last[1] == tree.num_changes:
            seq_id, of, up_to = last[2]
            if seq_id == sequence.seq_id and of is tokens and up_to == most:
                return last[3]
        found = tree.find(sequence.seq_id, self._scope(sequence), tokens, most, sequence.request.priority)
        self._found[worker] = tree, tree.num_changes, (sequence.seq_id, tokens, most), found
        return found

    def _note_cuts(self, worker: int, cut: abc.Mapping[int, int]) -> None:
        if cut:
            self._cut.setdefault(worker, {}).update(cut)
