"""After an R-worker was lost: those that are left come to rest, and hold what the scheduler thinks they do.

    lost R-worker        its sequences wait again, and are computed from prompt and output on the others
    the others           prompts of the broken step start again; whoever decodes goes back to before the step

The order is: note a loss, drop the worker, let the scheduler decide who starts again, release those (each by itself,
because nobody knows how far a worker had heard of them), a barrier, then rewind the rest.  A loss in the middle of that
begins it anew.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Mapping

from fastdecode.errors import RWorkerError
from fastdecode.pipeline import Pipeline
from fastdecode.plan import Step
from fastdecode.r_workers.rpool import RPool
from fastdecode.request import Sequence
from fastdecode.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Recovery:
    def __init__(self, rpool: RPool, pipeline: Pipeline, scheduler: Scheduler) -> None:
        self._rpool, self._pipeline, self._scheduler = rpool, pipeline, scheduler
        self._noted: deque[RWorkerError] = deque()
        self._unsettled: set[tuple[int, int]] = set()  # (R-worker, sequence) that may or may not know of their end
        self._is_restless = False  # one was begun and has not ended
        self._final: RWorkerError | None = None

    @property
    def is_final(self) -> bool:
        """No R-worker is left, or none that can go on without those that are lost."""
        return self._final is not None

    def note(self, error: RWorkerError, unsettled: Iterable[tuple[int, int]] = ()) -> None:
        """A loss, to be dealt with by the next `run`, and what could not be told on account of it."""
        self._noted.append(error)
        self._unsettled.update(unsettled)

    def run(self, step: Step | None) -> list[tuple[Sequence, RWorkerError]]:
        """Deals with what was noted, in the middle of `step` or before the next one; nothing noted, nothing done.

        Returns sequences that fit on no R-worker any more, and on account of which loss.  Raises RWorkerError if none
        is left, and from then on always.  Interrupted, it is begun anew by the next call; all sequences have to have
        ended by then.
        """
        homeless: list[tuple[Sequence, RWorkerError]] = []
        while self._final or self._noted or self._is_restless:
            if self._final:
                raise self._final
            self._is_restless = True
            kept: Mapping[int, Mapping[int, int]] = {}
            if self._noted:
                error = self._noted.popleft()
                is_vital = self._rpool.is_vital(error.r_worker)
                self._rpool.drop(error.r_worker)
                if is_vital:
                    self._final = error
                    continue
                logger.warning("%s.  What it held is computed again on the others", error)
                loss = self._scheduler.lose(error.r_worker, step)
                self._unsettled.update(pairs(loss.released), pairs(step.preempted if step else {}))
                kept = loss.kept
                homeless = [(sequence, error) for sequence in loss.homeless]
            try:
                self._pipeline.settle(sorted(self._unsettled))
                self._pipeline.rewind(kept)
            except RWorkerError as another:
                self.note(another)
            else:
                self._is_restless = False
                self._unsettled.clear()
                self._rpool.totals.num_recoveries += 1
        return homeless

    def join(self) -> None:
        """Between two steps: R-workers that have come back, or are new, get sequences from the next step on."""
        for joined in self._rpool.take_joined():
            self._scheduler.gain(joined.worker, joined.welcome.num_blocks)


def pairs(sequences: Mapping[int, Iterable[int]]) -> list[tuple[int, int]]:
    """(R-worker, sequence) of each."""
    return [(worker, seq_id) for worker, seq_ids in sequences.items() for seq_id in seq_ids]
