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

A sequence in parts begins with nothing of others, and nobody with something of it.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

from fastdecode.scheduling.chains import Tokens
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
        self._running: dict[int, PrefixTree] = {}  # sequence -> where it is
        self._cut: dict[int, dict[int, int]] = {}  # R-worker -> ended sequence -> tokens of it that stay, untold as yet
        self._asked: tuple[Sequence, int, Tokens] | None = None  # whose tokens were looked at last, and how many
        # By R-worker what was found last: the tree and its state, the question, the answer.
        self._found: dict[int, tuple[PrefixTree, int, tuple[int, Tokens, int], Found]] = {}
        self._counts = counts

    def find(self, sequence: Sequence) -> dict[int, Found]:
        """Where there is something that it could begin with.  R-worker -> what"""
        if not self._is_sharing(sequence) or not self._trees:
            return {}
        tokens, most = self._tokens(sequence), sequence.num_tokens - 1
        if sequence.num_scored < sequence.num_to_score:
            most = min(most, sequence.num_scored)  # the logits of the rest are wanted
        found = {worker: self._find(sequence, tokens, most, worker, tree) for worker, tree in self._trees.items()}
        return {worker: one for worker, one in found.items() if one.num_tokens}

    def start(self, sequence: Sequence, parts: tuple[Part, ...], found: Found | None, end: int) -> Change:
        """It runs there from now on, until about the step `end`.  What that changes for others."""
        if not self._is_sharing(sequence):
            return Change(0)
        worker = parts[0].r_worker
        if len(parts) > 1:
            for other in self._trees if sequence.num_preemptions else ():  # it comes again under its number
                self._note_cuts(other, dict.fromkeys(self.forget(other, [sequence.seq_id]), 0))
            return Change(0)
        tree = self._running[sequence.seq_id] = self._trees.setdefault(worker, PrefixTree(self._block_tokens))
        return tree.join(
            sequence.seq_id, self._scope(sequence), self._tokens(sequence), found or Found(),
            sequence.request.priority, end,
        )  # fmt: skip

    def num_unpaid(self, sequence: Sequence) -> int:
        """Of its blocks those that are part of the demand of another that runs."""
        tree = self._running.get(sequence.seq_id)
        return tree.num_unpaid(sequence.seq_id) if tree else 0

    def is_to_wait(self, sequence: Sequence) -> bool:
        """Whether what it begins with is on its way."""
        tree = self._running.get(sequence.seq_id)
        return tree is not None and tree.is_to_wait(sequence.seq_id)

    def begin(self, sequence: Sequence, is_spare: abc.Callable[[], bool]) -> tuple[int, bool]:
        """Its first tokens go through the model now.  How many of them need not, and whether it had them already.

        is_spare: takes a block where it is, if there is one, for what it copies; it is given back by `make_room`.
        """
        tree = self._running.get(sequence.seq_id)
        num_tokens, has_them = tree.begin(sequence.seq_id, is_spare) if tree else (0, False)
        if tree and not sequence.num_preemptions:
            self._counts.num_queried += sequence.num_tokens
            self._counts.num_found += num_tokens
        return num_tokens, has_them

    def note(self, sequence: Sequence) -> None:
        """More of its prompt has its KV."""
        if tree := self._running.get(sequence.seq_id):
            tree.note(sequence.seq_id, sequence.num_prefilled)

    def leave(self, sequence: Sequence, *, may_stay: bool) -> tuple[Change, bool]:
        """It runs no more.  What that changes for others, and whether its KV stays for those to come.

        What is on its way in does not stay: part of it may be on the S-worker alone.
        """
        tree = self._running.pop(sequence.seq_id, None)
        if tree is None:
            return Change(0), False
        kept = None
        if may_stay and self._sharing == "prompts" and not sequence.is_prefilling:
            kept = Tokens.of(sequence.token_ids[: sequence.num_kv_tokens], self._block_tokens)
        change, num_kept = tree.leave(sequence.seq_id, kept)
        if 0 < num_kept < sequence.num_kv_tokens:
            assert sequence.r_worker is not None
            self._note_cuts(sequence.r_worker, {sequence.seq_id: num_kept})
        return change, num_kept > 0

    @property
    def keeps_something(self) -> bool:
        return any(tree.keeps_something for tree in self._trees.values())

    def kept(self, worker: int) -> set[int]:
        """Ended sequences that are there still; of some of them all is given up, and nobody told."""
        tree = self._trees.get(worker)
        return {*(tree.kept if tree else ()), *self._cut.get(worker, ())}

    def make_room(self, num_free_blocks: abc.Sequence[int]) -> list[Forking]:
        """Where ended sequences hold more than that, they give it up.  [num_r_workers]; what runs has taken its part.

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

    def check_integrity(self, running: abc.Iterable[Sequence]) -> None:
        for tree in self._trees.values():
            tree.check_integrity()
        whole = (sequence for sequence in running if self._is_sharing(sequence) and not sequence.is_in_parts)
        there = {sequence.seq_id: sequence.r_worker for sequence in whole}
        assert there.keys() == self._running.keys()
        assert all(self._trees.get(worker or 0) is self._running[seq_id] for seq_id, worker in there.items())

    def _is_sharing(self, sequence: Sequence) -> bool:
        return self._sharing == "prompts" or (self._sharing == "samples" and sequence.request.params.n > 1)

    def _scope(self, sequence: Sequence) -> str | None:
        return sequence.request.cache_salt if self._sharing == "prompts" else sequence.request.request_id

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
