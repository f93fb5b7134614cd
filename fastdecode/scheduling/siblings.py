"""The n sequences of one request have one prompt: it goes through the model once.  Pure.

    first of them   prefilling ─► decoding ──────────────────────────►
    the others      wait for it, in their seats ─► fork ─► the last token of the prompt ─► decoding

The first to start computes the prompt.  Whoever starts while it runs, on its R-worker, begins with its KV of the
prompt, but for the last token: that goes through the model once more for each, because every one draws its own next
token.  If the first is gone before that (it has ended, or was preempted), one of those that wait computes the prompt.
"""

from __future__ import annotations

from fastdecode.scheduling.request import Sequence


class Siblings:
    def __init__(self, least_tokens: int | None) -> None:
        """least_tokens: of a prompt, that are worth a fork; None: none are."""
        self._least_tokens = least_tokens
        self._first: dict[str, Sequence] = {}  # by request, of those with several sequences

    def r_worker_for(self, sequence: Sequence) -> int | None:
        """Where it would best start; None: anywhere."""
        first = self._first_for(sequence)
        return first.r_worker if first else None

    def start(self, sequence: Sequence) -> None:
        """It has its R-worker now."""
        first = self._first_for(sequence)
        if first is None:
            if sequence.request.params.n > 1:
                self._first[sequence.request.request_id] = sequence
        elif first.r_worker == sequence.r_worker:
            sequence.awaits = first.seq_id

    def end(self, sequence: Sequence) -> None:
        """It runs no more."""
        if self._first.get(sequence.request.request_id) is sequence:
            del self._first[sequence.request.request_id]

    def is_to_wait(self, sequence: Sequence) -> bool:
        """Whether the KV it awaits is on its way.  If that will not come, it awaits it no longer: who was to bring it
        has ended, or was preempted, and may even run again, on another R-worker.
        """
        if sequence.awaits is None:
            return False
        first = self._first_for(sequence)
        if first is None or first.seq_id != sequence.awaits or first.r_worker != sequence.r_worker:
            sequence.awaits = None
            self.start(sequence)  # it computes the prompt, or awaits another one that does
            first = self._first_for(sequence)
        return sequence.awaits is not None and first is not None and first.is_prefilling

    def num_shared_tokens(self, sequence: Sequence) -> int:
        """Of its prompt, that it begins with."""
        return min(len(sequence.request.prompt_token_ids), sequence.num_tokens - 1)

    def check_integrity(self, running: dict[int, Sequence]) -> None:
        for request_id, first in self._first.items():
            assert first.request.request_id == request_id and running.get(first.seq_id) is first
            assert first.awaits is None
        for sequence in running.values():
            assert sequence.awaits is None or sequence.num_prefilled == 0

    def _first_for(self, sequence: Sequence) -> Sequence | None:
        """One that runs, and has, or will have, KV that is worth a fork."""
        first = self._first.get(sequence.request.request_id)
        if first is None or first is sequence or self._least_tokens is None:
            return None
        if self.num_shared_tokens(sequence) < self._least_tokens:
            return None
        return first
