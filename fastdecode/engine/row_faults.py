"""Sequences that get no token: whose fault it is, and what their request is told."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import numpy as np

from fastdecode.engine.requests import Failure
from fastdecode.engine.sampling import StepResult
from fastdecode.errors import RequestError
from fastdecode.scheduling.plan import Step
from fastdecode.scheduling.request import Sequence
from gpu_sworker import RowFault

logger = logging.getLogger(__name__)

_WIDER = {"float16": "bfloat16 or float32", "bfloat16": "float32"}  # dtypes that hold larger or finer numbers
_PAUSE_S = 1.0  # between two lines of the log: every request of a model may be hit


class RowFaults:
    def __init__(self, dtype: str) -> None:
        """dtype: that the model computes in."""
        self._dtype = dtype
        self._logged = -math.inf  # when, of the monotonic clock
        self._num_unlogged = 0

    def failures(self, step: Step, result: StepResult, live: Callable[[int], Sequence | None]) -> list[Failure]:
        """Sequences whose logits are no distribution, or leave nothing that their request may take.

        live: seq_id -> sequence; None: nobody wants to know of it any more.
        """
        faults: dict[int, RowFault] = {}
        scores = iter(result.scores)
        for segment in step.scored:
            of_segment = [next(scores)[0].logprob for _ in segment.scored]
            if any(map(math.isnan, of_segment)):
                faults[segment.seq_id] = RowFault.NOT_FINITE
        for row in np.flatnonzero(result.sampled.faults).tolist():
            faults[step.sampled[row]] = RowFault(result.sampled.faults[row])
        found = ((live(seq_id), fault) for seq_id, fault in faults.items())
        return [Failure(one, self.explain(fault, one, step.number)) for one, fault in found if one]

    def explain(self, fault: RowFault, sequence: Sequence, step: int) -> RequestError:
        """What the request of `sequence` is told; the model's faults are logged, too."""
        after = f"after {len(sequence.output_token_ids)} new tokens (step {step})"
        if fault is RowFault.NOTHING_LEFT:
            params = sequence.request.params
            named = [name for name in ("allowed_token_ids", "bad_words", "min_tokens") if getattr(params, name)]
            return RequestError(
                "invalid_request",
                f"{after} {', '.join(named)} leave no token that the model can take; allow more of them",
                named[0] if named else None,
            )
        wider = _WIDER.get(self._dtype)
        message = (
            f"{after} the model's logits are NaN or infinite, computed in {self._dtype}: "
            + (f"try another dtype, {wider}; " if wider else "")
            + "see whether its weights are whole, and whether kv_cache_dtype can hold its K and V"
        )
        self._log(sequence.request.request_id, message)
        return RequestError("invalid_logits", message)

    def _log(self, request_id: str, message: str) -> None:
        if time.monotonic() - self._logged < _PAUSE_S:
            self._num_unlogged += 1
            return
        more = f" ({self._num_unlogged} more requests since the last such line)" if self._num_unlogged else ""
        logger.error("request %s ends: %s%s", request_id, message, more)
        self._logged, self._num_unlogged = time.monotonic(), 0
