"""The S-worker's room for K and V of prompts that come in chunks: taken whole with the first one.  Pure.

a chunk is …                       its prompt attends …                    room
────────────────────────────────   ─────────────────────────────────────   ─────────────────────────────────────
the whole prompt                   on the S-worker, over its own K and V   none
the first one, and there is room   on the S-worker                         for all of it, until its last chunk
the first one, and there is none   on its R-worker, which has K and V      none
a later one                        where the first one did
the rest, after a fork             on its R-worker, which has K and V      none
"""

from __future__ import annotations


class PromptRoom:
    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self._num_blocks, self._block_tokens = num_blocks, block_tokens
        self._taken: dict[int, int] = {}  # seq_id -> blocks

    @property
    def num_free_blocks(self) -> int:
        return self._num_blocks - sum(self._taken.values())

    def take(self, seq_id: int, num_tokens: int) -> bool:
        """For a whole prompt; whether there was room."""
        needed = -(-num_tokens // self._block_tokens)
        if needed > self.num_free_blocks:
            return False
        self._taken[seq_id] = needed
        return True

    def give_back(self, seq_id: int) -> None:
        """Its last chunk has passed, or will not come; nothing, if it had none."""
        self._taken.pop(seq_id, None)

    def check_integrity(self, prefilling: set[int]) -> None:
        assert self._taken.keys() <= prefilling and self.num_free_blocks >= 0
