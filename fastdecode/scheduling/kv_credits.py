"""The KV memory of every R-worker: what sequences hold, what they will hold, and whether one more fits.  Pure.

    policy            a sequence starts on an R-worker if …
    ───────────────   ───────────────────────────────────────────────────────────────────────────────────
    greedy            what it has now fits beside what the others hold now; whoever came last is thrown out
                      when they grow (vLLM)
    reserve-static    its predicted end fits beside the predicted ends of all others, as if all came at once
    reserve-dynamic   at every future step what all hold then fits: others will have ended (TetriInfer's
                      reserve-dynamic looks at the first end only, this at all of them)

KV comes in blocks.  Steps ahead are looked at in tokens, with one block less a token for each sequence beside them:
whatever part of its last block a sequence fills, it holds no more than that.  What fits by reserve-static, which counts
blocks, fits by reserve-dynamic, too.

A sequence in parts takes on each of their R-workers what it will have there at its end, from its start on.  The
S-worker's device counts as one of them (`DEVICE`), but has no parts.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass

import numpy as np

from fastdecode.scheduling.load import Demand, Projection, Shared
from fastdecode.scheduling.parts import DEVICE, Part, divide, lengths, whole_on
from fastdecode.scheduling.request import Sequence

_LOOK_AHEAD = 32  # steps

_NOT_SHARED = Shared()
_NONE: abc.Mapping[int, Shared] = {}
_NO_BLOCKS: abc.Mapping[int, int] = {}

KV_POLICIES = ("greedy", "reserve-static", "reserve-dynamic")


@dataclass
class _Account:
    """Of one R-worker."""

    capacity: int  # blocks
    projection: Projection  # of those that lie there whole
    num_sequences: int = 0
    reserved: int = 0  # blocks, at the predicted ends
    in_parts: int = 0  # of them, those of sequences in parts
    held: int = 0  # blocks, in the step at hand, each once
    tokens: int = 0  # that the blocks held are for
    shared: int = 0  # by how much blocks of all sequences, each counted by itself, are more than those held


class KVCredits:
    def __init__(
        self, policy: str, capacity_blocks: abc.Sequence[int], block_tokens: int, device_blocks: int = 0
    ) -> None:
        """capacity_blocks: [num_r_workers]"""
        assert policy in KV_POLICIES
        self._policy, self._block_tokens = policy, block_tokens
        self._accounts = {worker: _Account(blocks, Projection()) for worker, blocks in enumerate(capacity_blocks)}
        if device_blocks:
            self._accounts[DEVICE] = _Account(device_blocks, Projection())
        self._lost_last = 0  # blocks
        self._demands: dict[int, tuple[tuple[Part, ...], Demand]] = {}  # seq_id -> where, and what it will hold
        self._unpaid: dict[int, dict[int, int]] = {}  # one in parts -> R-worker -> blocks that are part of another's

    @property
    def capacity_tokens(self) -> list[int]:
        """[num_r_workers]"""
        return [self.tokens_of(account.capacity) for account in self._r_workers]

    @property
    def capacities(self) -> dict[int, int]:
        """R-worker, or device -> tokens."""
        return {worker: self.tokens_of(account.capacity) for worker, account in self._accounts.items()}

    @property
    def most(self) -> int:
        """Blocks that a sequence may have: all R-workers together, or the device; if there is neither, as the R-worker
        had that was lost last, which may come back."""
        of_device = self._accounts[DEVICE].capacity if DEVICE in self._accounts else 0
        return max(sum(account.capacity for account in self._r_workers), of_device) or self._lost_last

    def describe(self) -> str:
        """How much a sequence may have, and which option says so."""
        if DEVICE in self._accounts and self._accounts[DEVICE].capacity == self.most:
            return f"the S-worker's device has {self.most} by device_kv_memory"
        return f"the R-workers have {self.most} in all by kv_cache_memory"

    @property
    def tokens(self) -> tuple[int, ...]:
        """Held in the step at hand.  [num_r_workers]"""
        return tuple(account.tokens for account in self._r_workers)

    @property
    def device_tokens(self) -> int:
        """Likewise, on the device."""
        return self._accounts[DEVICE].tokens if DEVICE in self._accounts else 0

    @property
    def device_room(self) -> int:
        """Blocks that nobody who runs has or will have there."""
        account = self._accounts.get(DEVICE)
        return account.capacity - max(account.held, account.reserved) if account else 0

    @property
    def _r_workers(self) -> list[_Account]:
        return [account for worker, account in sorted(self._accounts.items()) if worker != DEVICE]

    def lose(self, worker: int) -> None:
        """It holds nothing any more; its sequences have left already."""
        account = self._accounts[worker]
        assert not account.num_sequences
        self._lost_last = account.capacity or self._lost_last
        account.capacity = account.held = account.tokens = 0

    def gain(self, worker: int, capacity_blocks: int) -> None:
        """One that was lost has come back, or a new one is there; either way it is empty."""
        for new in range(worker + 1):
            self._accounts.setdefault(new, _Account(0, Projection()))
        assert not self._accounts[worker].num_sequences
        self._accounts[worker].capacity = capacity_blocks

    def blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)

    def tokens_of(self, num_blocks: int) -> int:
        return num_blocks * self._block_tokens

    def with_slack(self, demand: Demand) -> Demand:
        """The same in tokens that its blocks may take."""
        return Demand(demand.start, demand.end, demand.first + self._block_tokens - 1)

    def count(self, workers: np.ndarray, num_tokens: np.ndarray) -> None:
        """What is held in the step at hand, prompts on their way in as if they were there.

        workers, num_tokens: [n], of each running sequence.
        """
        blocks = -(-num_tokens // self._block_tokens)
        places = workers - DEVICE  # from 0 on
        num_places = max(self._accounts, default=0) - DEVICE + 1
        # Sums are exact: float64 holds whole numbers up to 2^53.
        held, tokens = (np.bincount(places, of_each, num_places).astype(np.int64) for of_each in (blocks, num_tokens))
        for worker, account in self._accounts.items():
            account.held = int(held[worker - DEVICE]) - account.shared
            account.tokens = int(tokens[worker - DEVICE]) - account.shared * self._block_tokens

    def overdrawn(self) -> int | None:
        """An R-worker that would have to hold more in this step than it can."""
        return next((w for w, account in self._accounts.items() if account.held > account.capacity), None)

    @property
    def num_free_blocks(self) -> dict[int, int]:
        """R-worker -> what the step at hand leaves."""
        return {worker: account.capacity - account.held for worker, account in self._accounts.items()}

    def take_spare(self, worker: int) -> bool:
        """A block more in the step at hand, if there is one."""
        account = self._accounts[worker]
        is_spare = account.held < account.capacity
        account.held += is_spare
        return is_spare

    def give_back(
        self, parts: tuple[Part, ...], num_tokens: int, num_shared: abc.Mapping[int, int] = _NO_BLOCKS
    ) -> None:
        """A sequence of so many tokens leaves in the step at hand; others go on holding the blocks they share with it.

        num_shared: R-worker -> blocks
        """
        self._hold(parts, -1, num_tokens, num_shared)

    def fitting(self, demand: Demand, max_kv_tokens: int, shared: abc.Mapping[int, Shared] = _NONE) -> list[int]:
        """The R-workers where it fits.  shared: what of it they have, where that is something."""
        now, last, longest = self.blocks(demand.first), self.blocks(demand.last), self.blocks(max_kv_tokens)
        is_for_parts = not self.fits_one(max_kv_tokens)
        with_slack = self.with_slack(demand)

        def fits(worker: int, account: _Account, shared: Shared) -> bool:
            # It could outlive every prediction, and must be able to end where it is; or, if no R-worker could hold it
            # then, to start again in parts.
            most = last if is_for_parts and worker != DEVICE else longest
            if most > account.capacity:
                return False
            if account.num_sequences == 0:
                return True
            if account.held + now - shared.num_blocks > account.capacity:
                return False
            if self._policy == "greedy" or account.reserved + last - shared.num_blocks <= account.capacity:
                return True
            if self._policy == "reserve-dynamic":
                own = with_slack.sharing(self.tokens_of(shared.num_blocks), shared.until)
                return max(map(account.projection.peak, own)) <= self.tokens_of(account.capacity - account.in_parts)
            return False

        return [
            worker
            for worker, account in self._accounts.items()
            if fits(worker, account, shared.get(worker, _NOT_SHARED))
        ]

    def lightest(
        self, workers: abc.Iterable[int], until_mean: Demand | None, shared: abc.Mapping[int, Shared] = _NONE
    ) -> int | None:
        """Of these the R-worker with the least KV, now and until the sequence's mean end; None if there are none.

        By what is there now alone, loads swing: whoever has a sequence less gets all that start, which weigh little
        as yet, and more than its share of them later.  (With equal lengths the largest of eight R-workers came to 3.4
        times the mean, step after step.)  Where nobody knows when sequences end, what they all grow by in some steps
        stands for the time to come.

        shared: what of it they have, where that is something.  That need not be read once more for it, and not be
        computed: so it counts twice.
        """

        def load(worker: int) -> float:
            account, spared = self._accounts[worker], 2 * shared.get(worker, _NOT_SHARED).num_tokens
            now = account.tokens - spared
            if until_mean is None:
                return now + _LOOK_AHEAD * account.num_sequences
            coming = account.projection.mean(until_mean.start, until_mean.end) + self.tokens_of(account.in_parts)
            return now + coming - spared

        workers = list(workers)
        return min(workers, key=load) if len(workers) > 1 else next(iter(workers), None)

    def fits_one(self, num_tokens: int) -> bool:
        """Whether any R-worker could hold so many alone."""
        return self.blocks(num_tokens) <= max((account.capacity for account in self._r_workers), default=0)

    def parts(self, num_tokens: int, least_tokens: int, first: int | None = None) -> tuple[Part, ...] | None:
        """Where a sequence of so many tokens, at its end, would lie in parts, so that the most that an R-worker has to
        read comes to as little as it can; None: there is no room.

        least_tokens: of a part; first: the R-worker that is to have the first one, if it gets any.
        """
        room = self._room()
        loads = {worker: self.blocks(self._accounts[worker].tokens) for worker in room}
        sizes = divide(self.blocks(num_tokens), loads, room, self.blocks(least_tokens))
        if sizes is None:
            return None
        parts, first_token = [], 0
        for worker, num_blocks in sorted(sizes.items(), key=lambda item: item[0] != first):
            parts.append(Part(worker, first_token))
            first_token += self.tokens_of(num_blocks)
        return tuple(parts)

    def extended(
        self, parts: tuple[Part, ...], num_tokens: int, num_used: abc.Mapping[int, int]
    ) -> tuple[Part, ...] | None:
        """These parts for a sequence of so many tokens at its end, and one more where the last one's R-worker has not
        room for all the rest; None: there is none.

        num_used: R-worker -> blocks of it that are another's
        """
        room = self._room()
        missing = 0
        for (worker, length), part in zip(lengths(parts, num_tokens), parts, strict=True):
            missing = self.blocks(length) - num_used.get(worker, 0) - room.get(worker, 0)
            if missing > 0 and part is not parts[-1]:
                return None
        if missing <= 0:
            return parts
        begin = self.tokens_of(self.blocks(num_tokens) - missing)
        others = [worker for worker in room if all(worker != part.r_worker for part in parts)]
        most = max(others, key=lambda worker: room[worker], default=None)
        if most is None or room[most] < missing or begin <= parts[-1].first_token:
            return None
        return (*parts, Part(most, begin))

    def start(
        self,
        seq_id: int,
        parts: tuple[Part, ...],
        demand: Demand,
        num_tokens: int,
        num_shared: abc.Mapping[int, int] = _NO_BLOCKS,
        unpaid: abc.Mapping[int, int] = _NO_BLOCKS,
    ) -> None:
        """In the step at hand.  demand: without what is part of another's; num_tokens: with it.

        num_shared: R-worker -> blocks that others have, too; unpaid: those of them that are part of another's demand.
        """
        for worker, num_blocks in num_shared.items():
            self._accounts[worker].shared += num_blocks
        self._hold(parts, 1, num_tokens, num_shared)
        if len(parts) > 1:
            self._unpaid[seq_id] = dict(unpaid)
        self._reserve(seq_id, parts, demand)

    def change(self, seq_id: int, demand: Demand, paid: abc.Mapping[int, int] = _NO_BLOCKS) -> None:
        """It will hold something else than was thought.

        paid: R-worker -> so many blocks more that were another's are part of its demand
        """
        parts = self._cancel(seq_id)
        for worker, num_blocks in paid.items() if seq_id in self._unpaid else ():
            self._unpaid[seq_id][worker] = self._unpaid[seq_id].get(worker, 0) - num_blocks
        self._reserve(seq_id, parts, demand)

    def end(self, seq_id: int, num_shared: abc.Mapping[int, int] = _NO_BLOCKS) -> None:
        self._cancel(seq_id)
        self._unpaid.pop(seq_id, None)
        for worker, num_blocks in num_shared.items():
            self._accounts[worker].shared -= num_blocks

    def check_integrity(self, running: abc.Iterable[Sequence]) -> None:
        """Asserts that exactly the running sequences have credit, where they are."""
        assert {s.seq_id: s.parts for s in running} == {i: parts for i, (parts, _) in self._demands.items()}
        for worker, account in self._accounts.items():
            whole = [demand for parts, demand in self._demands.values() if parts == whole_on(worker)]
            in_parts = [
                num_blocks
                for seq_id, (parts, demand) in self._demands.items()
                for place, num_blocks in self._at_end(seq_id, parts, demand)
                if place == worker and len(parts) > 1
            ]
            assert len(account.projection) == len(whole) and account.num_sequences == len(whole) + len(in_parts)
            assert account.in_parts == sum(in_parts)
            assert account.reserved == sum(self.blocks(demand.last) for demand in whole) + sum(in_parts)

    def _room(self) -> dict[int, int]:
        """R-worker -> blocks that nobody who runs has or will have, and that parts may have."""
        accounts = {w: account for w, account in self._accounts.items() if account.capacity and w != DEVICE}
        taken = {w: a.held if self._policy == "greedy" else max(a.held, a.reserved) for w, a in accounts.items()}
        return {worker: account.capacity - taken[worker] for worker, account in accounts.items()}

    def _hold(self, parts: tuple[Part, ...], sign: int, num_tokens: int, num_shared: abc.Mapping[int, int]) -> None:
        """In the step at hand, more or less."""
        for worker, length in lengths(parts, num_tokens):
            account, of_others = self._accounts[worker], num_shared.get(worker, 0)
            account.held += sign * (self.blocks(length) - of_others)
            account.tokens += sign * (length - self.tokens_of(of_others))

    def _reserve(self, seq_id: int, parts: tuple[Part, ...], demand: Demand) -> None:
        self._demands[seq_id] = parts, demand
        if len(parts) == 1:
            self._accounts[parts[0].r_worker].projection.add(self.with_slack(demand))
        self._take(seq_id, parts, demand, 1)

    def _cancel(self, seq_id: int) -> tuple[Part, ...]:
        """Where it was."""
        parts, demand = self._demands.pop(seq_id)
        if len(parts) == 1:
            self._accounts[parts[0].r_worker].projection.remove(self.with_slack(demand))
        self._take(seq_id, parts, demand, -1)
        return parts

    def _take(self, seq_id: int, parts: tuple[Part, ...], demand: Demand, sign: int) -> None:
        """Up to the predicted end, more or less."""
        for worker, num_blocks in self._at_end(seq_id, parts, demand):
            account = self._accounts[worker]
            account.reserved += sign * num_blocks
            account.in_parts += sign * num_blocks if len(parts) > 1 else 0
            account.num_sequences += sign

    def _at_end(self, seq_id: int, parts: tuple[Part, ...], demand: Demand) -> list[tuple[int, int]]:
        """R-worker, and the blocks there that are its own, not another's."""
        of_others = self._unpaid.get(seq_id, _NO_BLOCKS)
        num_tokens = demand.last + self.tokens_of(sum(of_others.values()))
        return [(worker, self.blocks(n) - of_others.get(worker, 0)) for worker, n in lengths(parts, num_tokens)]
