"""The engine: schedule, run, commit; requests in, outputs out.

add_request ─► Scheduler ─► Step ─► Pipeline ─► logits ─► tokens ─► Scheduler ─► RequestOutput
                   ▲                                                    │
                   └───────────── the lane's next step ◄────────────────┘

Lanes take turns: what is done here for one lies beside the R-workers' work for the others.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from fastdecode.api.outputs import Delta, RequestOutput
from fastdecode.api.sampling_params import SamplingParams
from fastdecode.engine.intake import Intake
from fastdecode.engine.pipeline import Pipeline
from fastdecode.engine.recovery import Recovery, pairs
from fastdecode.engine.results import Continuation, LiveRequest, failed_output, finished_output, next_delta
from fastdecode.engine.row_faults import RowFaults
from fastdecode.engine.sampling import StepResult, sampling_rows, scoring_rows
from fastdecode.errors import RequestError, RWorkerError
from fastdecode.holders.rejoin import RWorkerHandle
from fastdecode.holders.rpool import RPool
from fastdecode.observe.step_log import StepRecord, make_record
from fastdecode.observe.timeline import NoTimeline, Timeline
from fastdecode.observe.totals import PoolTotals, Standing
from fastdecode.scheduling.plan import Step
from fastdecode.scheduling.request import Sequence
from fastdecode.scheduling.scheduler import Scheduler
from fastdecode.text.tokenizer import Tokenizer
from gpu_sworker import EmulatedSWorker, RowFault, SWorker

logger = logging.getLogger(__name__)


class Engine:
    def __init__(
        self,
        *,
        sworker: SWorker | EmulatedSWorker,
        rpool: RPool,
        scheduler: Scheduler,
        tokenizer: Tokenizer | None,
        max_model_len: int,
        seed: int,
        eos_token_ids: frozenset[int] | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        """on_step: told of every step that was run; timeline: what the rpool was given, too.

        eos_token_ids: that end a sequence; None: the model's own.
        """
        self._sworker, self._rpool, self._scheduler, self._tokenizer = sworker, rpool, scheduler, tokenizer
        self._timeline = timeline or NoTimeline()
        self._pipeline = Pipeline(sworker, rpool, self._timeline)
        self._intake = Intake(
            sworker.facts,
            tokenizer,
            max_model_len,
            seed,
            frozenset(sworker.facts.eos_token_ids) if eos_token_ids is None else eos_token_ids,
        )
        self._live: dict[str, LiveRequest] = {}
        self._by_sequence: dict[int, tuple[LiveRequest, Continuation]] = {}
        self._heard: set[int] = set()  # sequences whose every token somebody wants to see when it comes
        self._num_requests = 0
        self._recovery = Recovery(rpool, self._pipeline, scheduler)
        self._faults = RowFaults(sworker.facts.dtype)
        self._failed: list[RequestOutput] = []  # requests that ended with an error, and are not handed out yet
        self._on_step = on_step
        self._began: dict[int, float] = {}  # lane -> when its step under way did
        self._first_step: float | None = None  # when it began
        self._last_end = 0.0  # when a step was over last
        self._is_torn = False  # something was begun, and not ended: see `_whole`
        self._put_down()

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return self._scheduler.num_waiting

    @property
    def num_running(self) -> int:
        """Sequences with KV on an R-worker."""
        return self._scheduler.num_running

    @property
    def num_places(self) -> int:
        """Sequences that run or can at once: `max_num_seqs` of them, or fewer while KV or the load limit is short.

        In any thread: who asks decides about more of them while a step goes on.
        """
        return self._scheduler.num_places

    @property
    def lost_workers(self) -> list[str]:
        """Names of R-workers that do not serve now; all of them if no step is possible any more.  In any thread."""
        return self._rpool.lost

    @property
    def totals(self) -> PoolTotals:
        return self._rpool.totals

    @property
    def kv_capacity_tokens(self) -> list[int]:
        """[num_r_workers]; 0 of those that do not serve."""
        return self._scheduler.kv_capacity_tokens

    @property
    def kv_load_limit(self) -> int:
        """W_lim: KV tokens that a step may read, of all R-workers together."""
        return self._scheduler.kv_load_limit

    def has_room(self, params: SamplingParams) -> bool:
        """A request with these would find a place in the queue now."""
        return self._scheduler.has_room(params.n)

    @property
    def wants_more(self) -> bool:
        """False: what is added later serves as well as now; who has many requests can hold them back until then."""
        return self._scheduler.wants_more

    def next_request_id(self) -> str:
        """Ids count up from 0, refused requests included, so that a bad prompt does not shift the others' seeds."""
        self._num_requests += 1
        return str(self._num_requests - 1)

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> None:
        """Raises RequestError for what `add_request` could never take.  May be called in any thread."""
        self._scheduler.check_fits(self._intake.check(prompt_token_ids, params).max_kv_tokens)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        priority: int = 0,
        on_delta: Callable[[Delta], None] | None = None,
    ) -> None:
        """Queues a request under an id of `next_request_id`.  Raises RequestError; then nothing was queued.

        priority: lower goes first, and takes the place of higher if there is none left.  on_delta: told, within a step,
        of every token that it brought.
        """
        with self._whole():
            live = self._intake.take(request_id, prompt_token_ids, params, prompt, priority, on_delta)
            self._scheduler.add(*(continuation.sequence for continuation in live.continuations))
            for continuation in live.continuations:
                self._by_sequence[continuation.sequence.seq_id] = live, continuation
                if continuation.is_watched:
                    self._heard.add(continuation.sequence.seq_id)
            self._live[request_id] = live

    def step(self) -> list[RequestOutput]:
        """A step of one lane: a token for each of its running sequences; returns the requests that are finished now.

        A lost R-worker costs its sequences' KV: they are computed again on the others, from prompt and output, and go
        on with the same tokens.  While none is left and one may come back, a step is a short wait for it.  Raises
        RWorkerError when none is left or comes back, and from then on always.  Broken off by anything else (Ctrl-C, out
        of memory), it ends all requests without an output, and the engine goes on.
        """
        with self._whole():
            return self._step()

    def _step(self) -> list[RequestOutput]:
        self._recover()
        self._begin_lanes()
        passed = self._run()
        if passed is None:
            return self._take_failed()
        step, logits = passed
        with self._timeline.span("sample", step.lane):
            result = self._sample(step, logits)
        self._tell(step)
        with self._timeline.span("commit", step.lane):
            return self._commit(step, result) + self._take_failed()

    def _begin_lanes(self) -> None:
        """Each lane that has no step under way begins its next one."""
        for lane in range(self._scheduler.num_lanes):
            if lane in self._pipeline.under_way or not self._rpool.alive:
                continue
            began = time.monotonic()
            with self._timeline.span("schedule", lane):
                step = self._scheduler.schedule(lane)
            if step is None:
                continue
            self._began[lane] = began
            try:
                self._pipeline.begin(step)
            except RWorkerError as error:
                self._recovery.note(error)
                self._recover()
        self._put_down()

    def _run(self) -> tuple[Step, torch.Tensor] | None:
        """The lane that is through next, and its logits; None if there is none, or an R-worker was lost on the way."""
        if not self._pipeline.under_way:
            return None
        try:
            return self._pipeline.run()
        except RWorkerError as error:
            self._recovery.note(error)
        self._recover()
        return None

    def add_r_worker(self, find: Callable[[int], RWorkerHandle]) -> None:
        """One more, found beside the steps under the number it will have; it is used once it is there."""
        self._rpool.invite(find)

    def heartbeat(self, timeout_s: float) -> None:
        """To be called while nothing runs: every R-worker answers within `timeout_s`, or counts as lost; the last one
        has the time of a step.

        Raises RWorkerError like `step`.
        """
        with self._whole():
            try:
                self._rpool.settle(timeout_s)
            except RWorkerError as error:
                self._recovery.note(error)
            self._recover()

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forgets requests, waiting or running, and frees their KV.  Unknown ids are ignored.

        An R-worker that is lost while it is told so is reported by the next `step`.
        """
        with self._whole():
            self._abort(request_ids)

    def abort_all(self) -> None:
        """Whatever there is: also what somebody who was interrupted could not abort."""
        with self._whole():
            self._abort(list(self._live))

    def _abort(self, request_ids: Iterable[str]) -> None:
        sequences = []
        for request_id in request_ids:
            live = self._live.pop(request_id, None)
            for continuation in live.continuations if live else ():
                if self._forget(continuation.sequence.seq_id):
                    sequences.append(continuation.sequence)
        self._release(sequences)
        if not self._live and self._pipeline.under_way:  # nobody is there whom the steps under way were for
            self._forget_all()

    def _forget(self, seq_id: int) -> bool:
        """Whether it was known."""
        self._heard.discard(seq_id)
        return self._by_sequence.pop(seq_id, None) is not None

    def _release(self, sequences: list[Sequence]) -> None:
        """Gives back what sequences held, unless a step under way has rows of them: then after it.

        An R-worker lost meanwhile is the next step's to deal with.
        """
        released = self._scheduler.remove(sequences)
        self._put_down()
        try:
            if not self._recovery.is_final:
                self._pipeline.release(released)
        except RWorkerError as error:
            self._recovery.note(error, pairs(released))

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Around whatever changes several things that have to agree with one another.

        An exception can come between any two of them (Ctrl-C).  So that something was begun is written first, and
        unless it is ended all sequences are forgotten, here and on the R-workers, whose word for it is a barrier.
        Interrupted in that, too, whoever calls next does it before anything else.
        """
        self._mend()
        self._is_torn = True
        try:
            yield
        except (RequestError, RWorkerError):  # which leave nothing half done
            self._is_torn = False
            raise
        except GeneratorExit:  # interrupted in the `with` itself: nobody is in it, and whoever calls next mends
            raise
        except BaseException:
            self._mend()
            raise
        self._is_torn = False

    def _mend(self) -> None:
        if not self._is_torn:
            return
        self._failed = []
        self._forget_all()
        self._is_torn = False

    def _forget_all(self) -> None:
        """All sequences, here and on the R-workers, and the steps under way."""
        self._live, self._by_sequence, self._heard = {}, {}, set()
        num_blocks = self._rpool.num_blocks
        self._scheduler.begin_anew(num_blocks, set(range(len(num_blocks))).difference(self._rpool.alive))
        self._recovery.rest()
        self._put_down()

    def _put_down(self) -> None:
        """For other threads, after whatever may have changed it: this one goes on with what it is made of."""
        self.standing = Standing(  # in any thread: it is replaced, not changed
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            kv_capacity_tokens=tuple(self.kv_capacity_tokens),
            kv_load_limit=self.kv_load_limit,
            totals=self.totals.copy(),
        )

    def _recover(self) -> None:
        """After losses.  Raises RWorkerError if no R-worker is left."""
        homeless = self._recovery.run()
        self._put_down()
        for sequence, error in homeless:
            self._refuse(sequence, error)

    def _refuse(self, sequence: Sequence, error: RWorkerError) -> None:
        """No R-worker that is left has room for it."""
        told = f"{error}; no other has room for {sequence.max_kv_tokens} tokens of KV"
        self._fail(sequence, RequestError("worker_lost", told))

    def _fail(self, sequence: Sequence, error: RequestError) -> None:
        """Ends its request, with all its samples."""
        live = self._live.get(sequence.request.request_id)
        if live is None:
            return  # another of its continuations came before
        self._failed.append(failed_output(live, error))
        self._abort([live.request.request_id])

    def _take_failed(self) -> list[RequestOutput]:
        taken, self._failed = self._failed, []
        return taken

    def _tell(self, step: Step) -> None:
        self._timeline.count("live KV tokens", sum(self._scheduler.kv_tokens))
        if self._on_step is None:
            return
        began, now = self._began[step.lane], time.monotonic()
        self._first_step = began if self._first_step is None else self._first_step
        elapsed_s, self._last_end = now - max(began, self._last_end), now
        self._on_step(
            make_record(
                step,
                begin_s=began - self._first_step,
                seconds=now - began,
                elapsed_s=elapsed_s,
                num_running=self._scheduler.num_running,
                num_waiting=self._scheduler.num_waiting,
                kv_tokens=self._scheduler.kv_tokens,
                lap=self._rpool.totals.lap(self._rpool.alive),
            )
        )

    def _sample(self, step: Step, logits: torch.Tensor) -> StepResult:
        """logits: [num_sampled + num_scored, vocab]"""
        num_sampled = len(step.sampled)
        to_score = scoring_rows(step.scored, [self._scheduler.running(segment.seq_id) for segment in step.scored])
        with self._sworker.inference():
            return StepResult(
                self._sworker.sample(logits[:num_sampled], sampling_rows(step, self._scheduler.running)),
                self._sworker.score(logits[num_sampled:], to_score.token_ids, to_score.num_logprobs),
            )

    def _commit(self, step: Step, result: StepResult) -> list[RequestOutput]:
        """Hands tokens to sequences, looks for ends, gives back what finished sequences held."""
        now, seq_ids = time.monotonic(), step.sampled
        self._note_prompts(step, result, now)
        failed = self._failures(step, result)
        heard = [(row, seq_id) for row, seq_id in enumerate(seq_ids) if seq_id in self._heard] if self._heard else []
        for row, seq_id in heard:
            _, continuation = self._by_sequence[seq_id]
            try:
                continuation.take(int(result.sampled.token_ids[row]), result.sampled.logprobs[row])
            except RequestError as why:
                failed.append((continuation.sequence, why))
        finished = self._scheduler.commit(step, result.sampled.token_ids)
        for sequence, error in failed:
            self._fail(sequence, error)
        still_heard = [seq_id for _, seq_id in heard if seq_id in self._heard]  # others failed, or samples of theirs
        finished += self._stop_at_strings(still_heard)
        for seq_id in dict.fromkeys([*still_heard, *(sequence.seq_id for sequence in finished)]):
            if seq_id in self._by_sequence:
                self._tell_delta(*self._by_sequence[seq_id])
        finished = [sequence for sequence in finished if sequence.seq_id in self._by_sequence]
        outputs = []
        for sequence in finished:
            live, _ = self._by_sequence[sequence.seq_id]
            self._forget(sequence.seq_id)
            live.num_unfinished -= 1
            if live.num_unfinished == 0:
                del self._live[live.request.request_id]
                outputs.append(finished_output(live, now, self._tokenizer))
        self._release(finished)
        return outputs

    def _note_prompts(self, step: Step, result: StepResult, now: float) -> None:
        """When each was begun and had its first token, and how likely its own tokens are."""
        scores = iter(result.scores)
        for segment in step.prompts:
            known = self._by_sequence.get(segment.seq_id)
            for position in segment.scored if segment.score_to else ():
                score = next(scores)
                if known:
                    known[0].prompt_scores[position + 1] = score
            if known:
                known[0].first_scheduled = known[0].first_scheduled or self._began[step.lane]
                if segment.is_sampled:
                    known[0].first_token = known[0].first_token or now

    def _tell_delta(self, live: LiveRequest, continuation: Continuation) -> None:
        if live.on_delta is None:
            return
        try:
            delta = next_delta(live, continuation, self._tokenizer)
        except RequestError as error:
            self._fail(continuation.sequence, error)
        else:
            live.on_delta(delta)

    def _failures(self, step: Step, result: StepResult) -> list[tuple[Sequence, RequestError]]:
        """Sequences whose logits are no distribution, or leave nothing that their request may take."""
        faults: dict[int, RowFault] = {}
        scores = iter(result.scores)
        for segment in step.scored:
            of_segment = [next(scores)[0].logprob for _ in segment.scored]
            if any(map(math.isnan, of_segment)):
                faults[segment.seq_id] = RowFault.NOT_FINITE
        for row in np.flatnonzero(result.sampled.faults).tolist():
            faults[step.sampled[row]] = RowFault(result.sampled.faults[row])
        known = (
            (self._by_sequence[seq_id][1], fault) for seq_id, fault in faults.items() if seq_id in self._by_sequence
        )
        return [(one.sequence, self._faults.explain(fault, one.sequence, step.number)) for one, fault in known]

    def _stop_at_strings(self, seq_ids: Iterable[int]) -> list[Sequence]:
        """Ends sequences whose text has come to a stop string; returns those that were not ended already."""
        stopped = []
        for seq_id in seq_ids:
            _, continuation = self._by_sequence[seq_id]
            sequence, match = continuation.sequence, continuation.stop_match
            if match is None or sequence.finish_reason == "stop":
                continue
            if len(sequence.output_token_ids) < sequence.request.params.min_tokens:
                continuation.stop_match = None  # too early to count
                continue
            if sequence.finish_reason is None:
                stopped.append(sequence)
            sequence.finish("stop", match.stop)
        return stopped
