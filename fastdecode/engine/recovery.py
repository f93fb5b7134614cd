"""After an R-worker was lost: those that are left come to rest, and hold what the scheduler thinks they do.

    lost R-worker        its sequences wait again, and are computed from prompt and output on the others, or on it when
                         it is back
    lanes with rows      their steps did not happen: prompts of theirs start again; whoever decodes goes back to before
    there                the step
    other lanes          finish theirs

The order is: note a loss, drop the worker, let the scheduler decide who starts again, release those (each by itself,
because nobody knows how far a worker had heard of them), a barrier, then rewind the rest.  A loss in the middle of that
begins it anew.  Then whoever has come back, or is new, joins; if nobody is left that is waited for, a while at a time,
so that requests can be added and aborted meanwhile.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Mapping

from fastdecode.engine.pipeline import Pipeline
from fastdecode.engine.requests import Failure
from fastdecode.errors import RequestError, RWorkerError
from fastdecode.holders.rpool import RPool
from fastdecode.scheduling.request import Sequence
from fastdecode.scheduling.scheduler import Loss, Scheduler

logger = logging.getLogger(__name__)

_LOOK_S = 0.2  # a step's wait while there is no R-worker: so late, at most, a request is aborted meanwhile
_STEADY_S = 60.0  # being without any R-worker again sooner than that counts as the same trouble,
_MOST_RETURNS = 3  # which somebody who comes back may end so many times: a request may be what kills them


class Recovery:
    def __init__(self, rpool: RPool, pipeline: Pipeline, scheduler: Scheduler) -> None:
        self._rpool, self._pipeline, self._scheduler = rpool, pipeline, scheduler
        self._last_loss: RWorkerError | None = None
        self._alone_since: float | None = None  # without any R-worker
        self._together_since = -math.inf
        self._times_alone = 0  # in the same trouble
        self._is_checked = True  # that whoever waits fits somewhere
        self._noted: deque[RWorkerError] = deque()
        self._unsettled: set[tuple[int, int]] = set()  # (R-worker, sequence) that may or may not know of their end
        self._kept: dict[int, dict[int, int]] = {}  # R-worker -> sequence -> tokens of it that stay, to be told
        self._is_restless = False  # one was begun and has not ended
        self._final: RWorkerError | None = None

    @property
    def is_final(self) -> bool:
        """No R-worker is left and none comes back, or none can go on without those that are lost."""
        return self._final is not None

    def note(self, error: RWorkerError, unsettled: Iterable[tuple[int, int]] = ()) -> None:
        """A loss, to be dealt with by the next `run`, and what could not be told on account of it."""
        self._noted.append(error)
        self._unsettled.update(unsettled)

    def break_off(self, *, all_anew: bool) -> None:
        """All steps under way did not happen, and no R-worker is to blame; the next `run` brings all to rest.

        all_anew: who decodes in them starts again, too.
        """
        self._is_restless = True
        self._take_back(self._scheduler.break_off(self._unbegun, all_anew=all_anew))

    def rest(self) -> None:
        """After an interrupt, wherever it was, and when all sequences have ended: whatever R-workers may still know of
        is released, and they come to rest.  If one is lost meanwhile, the next `run` goes on with it.
        """
        self._is_restless = True  # first: interrupted again, the next `run` begins anew
        self._pipeline.break_off(self._pipeline.under_way)
        self._pipeline.forget_all()
        self._unsettled.update(self._rpool.held)
        self._kept = {}
        if not self._final:
            self._settle()

    def run(self) -> list[Failure]:
        """Deals with what was noted, and lets in who has come back.

        Returns sequences that fit on no R-worker any more, with the loss that is to blame.  Raises RWorkerError if none
        is left or comes back, and from then on always.  Interrupted, it is begun anew by the next call; all sequences
        have to have ended by then, and `rest` be called.
        """
        is_loss = False
        while self._final or self._noted or self._is_restless:
            if self._final:
                raise self._final
            self._is_restless = True
            if self._noted:
                self._last_loss = error = self._noted[0]
                self._is_checked = False
                if not self._rpool.drop(error.r_worker):
                    self._final = error
                    continue
                where = "on the others" if self._rpool.alive else "when one is back"
                logger.warning("%s.  What it held is computed again %s", error, where)
                self._take_back(self._scheduler.lose(error.r_worker, self._unbegun))
                self._kept.pop(error.r_worker, None)
                self._noted.popleft()  # interrupted before, it is dealt with again
                is_loss = True
            if self._settle():
                self._rpool.totals.num_recoveries += is_loss
        self._join()
        if self._is_checked or self._last_loss is None:
            return []
        self._is_checked = True
        return [_no_room(sequence, self._last_loss) for sequence in self._scheduler.homeless()]

    @property
    def _unbegun(self) -> set[int]:
        """Lanes whose steps were scheduled, and are not under way: perhaps not everybody was told of them."""
        return set(self._scheduler.under_way).difference(self._pipeline.under_way)

    def _take_back(self, loss: Loss) -> None:
        """Here, what did not happen; R-workers are told when all come to rest."""
        self._pipeline.break_off(loss.broken)
        self._unsettled.update(pairs(loss.released))
        for worker, kept in loss.kept.items():
            self._kept.setdefault(worker, {}).update(kept)

    def _settle(self) -> bool:
        """Whether all came to rest; who did not is lost, and noted."""
        try:
            self._pipeline.settle(sorted(self._unsettled))
            self._pipeline.rewind(self._kept)
        except RWorkerError as error:
            self.note(error)
            return False
        self._unsettled.clear()
        self._kept = {}
        self._is_restless = False
        return True

    def _join(self) -> None:
        """R-workers that have come back, or are new, get sequences from the next step on.  Raises RWorkerError."""
        for joined in self._rpool.take_joined(0.0 if self._rpool.is_able else _LOOK_S):
            self._scheduler.gain(joined.worker, joined.welcome.num_blocks)
            self._is_checked = False
        now = time.monotonic()
        if self._rpool.is_able:
            if self._alone_since is not None:
                self._alone_since, self._together_since = None, now
            return
        if self._alone_since is None:
            self._alone_since = now
            self._times_alone = 1 + (self._times_alone if now - self._together_since < _STEADY_S else 0)
        if self._times_alone > _MOST_RETURNS or now - self._alone_since > self._rpool.timeout_s:
            self._final = self._last_loss
            assert self._final, "a pool begins with R-workers"
            raise self._final


def _no_room(sequence: Sequence, loss: RWorkerError) -> Failure:
    why = f"{loss}; the others have no room for {sequence.max_kv_tokens} tokens of KV"
    return Failure(sequence, RequestError("worker_lost", why))


def pairs(sequences: Mapping[int, Iterable[int]]) -> list[tuple[int, int]]:
    """(R-worker, sequence) of each."""
    return [(worker, seq_id) for worker, seq_ids in sequences.items() for seq_id in seq_ids]
