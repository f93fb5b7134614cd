"""After the S-worker's device had no memory for a step: it is done again, and the next ones are smaller.

    it fails            none of the steps under way happened, of no lane; the next ones have half its tokens at most
    again, as large     because so many decode: they start anew, as many at a time as may be in a step now
    again, as small     as it can be: its requests end with an error, and whoever waits has the room

What a step takes there, beside weights and KV, grows with its tokens.  Once all has gone well for a while the next ones
have twice as many, and each time that was too many the while is twice as long.
"""

from __future__ import annotations

import logging

import torch

from fastdecode.engine.recovery import Recovery
from fastdecode.engine.requests import Failure
from fastdecode.errors import RequestError
from fastdecode.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)

_STEADY_STEPS = 256  # that go through before the next ones are larger, at first


class Shortage:
    def __init__(self, scheduler: Scheduler, recovery: Recovery) -> None:
        self._scheduler, self._recovery = scheduler, recovery
        self._most = scheduler.step_tokens  # of a step, where memory is no question
        self._failed: int | None = None  # tokens of the step that failed last, if none has gone through since
        self._num_steady, self._num_passed = _STEADY_STEPS, 0  # steps to go through, and that did
        self._has_grown = False  # since one failed

    def passed(self) -> None:
        """A step went through."""
        self._failed = None
        limit = self._scheduler.step_tokens
        if limit == self._most:
            return
        self._num_passed += 1
        if self._num_passed >= self._num_steady:
            self._num_passed, self._has_grown = 0, True
            self._scheduler.step_tokens = min(2 * limit, self._most)

    def note(self, told: str) -> list[Failure]:
        """One of those under way failed: none of them happened.  Call `Recovery.run` before anything else.

        Returns sequences that cannot go on.  told: the device's own words; the error itself holds what took the memory.
        """
        steps = self._scheduler.steps_under_way
        num_tokens, num_decodes = max(s.num_tokens for s in steps), max(len(s.decodes) for s in steps)
        is_again = self._failed is not None and num_tokens >= self._failed
        are_too_many = is_again and num_decodes > 1
        error = RequestError(
            "out_of_memory",
            f"the S-worker's device has no memory for a step of {num_tokens} tokens ({told}): lower max_num_seqs, "
            "max_num_batched_tokens, device_kv_memory or prompt_kv_memory",
        )
        seq_ids = [seq_id for s in steps for seq_id in s.seq_ids] if is_again and not are_too_many else []
        failures = [Failure(self._scheduler.running(seq_id), error) for seq_id in seq_ids]
        limit = max(1, min(self._scheduler.step_tokens, num_tokens) // 2)
        what_now = f"It failed again, and ends {len(failures)} sequences" if failures else "It is done again"
        logger.warning("%s.  %s; the next steps have up to %d", error, what_now, limit)
        self._failed, self._num_passed = (None if failures else num_tokens), 0
        self._num_steady *= 2 if self._has_grown else 1
        self._has_grown = False
        self._scheduler.step_tokens = limit
        self._recovery.break_off(all_anew=are_too_many)
        torch.cuda.empty_cache()  # of what is in pieces of other sizes; nothing where there is no CUDA
        return failures
