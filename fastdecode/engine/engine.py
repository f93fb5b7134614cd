"""The engine: schedule, run, commit; requests in, outputs out.

add_request ─► Scheduler ─► Step ─► Pipeline ─► logits ─► tokens ─► Scheduler ─► RequestOutput
                   ▲                                                    │
                   └───────────── the lane's next step ◄────────────────┘

Lanes take turns: what is done here for one lies beside the R-workers' work for the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch

from fastdecode.api.outputs import Delta, RequestOutput
from fastdecode.api.sampling_params import SamplingParams
from fastdecode.engine.guard import Guard
from fastdecode.engine.intake import Intake
from fastdecode.engine.pipeline import Pipeline
from fastdecode.engine.recovery import Recovery, pairs
from fastdecode.engine.requests import Failure, LiveRequests
from fastdecode.engine.row_faults import RowFaults
from fastdecode.engine.sampling import StepResult, sampling_rows, scoring_rows
from fastdecode.engine.shortage import Shortage
from fastdecode.engine.step_records import StepRecords
from fastdecode.errors import RWorkerError
from fastdecode.holders.device import DeviceHolder
from fastdecode.holders.rejoin import RWorkerHandle
from fastdecode.holders.rpool import RPool
from fastdecode.observe.step_log import StepRecord
from fastdecode.observe.timeline import NoTimeline, Timeline
from fastdecode.observe.totals import PoolTotals, Standing
from fastdecode.scheduling.plan import Step
from fastdecode.scheduling.request import Sequence
from fastdecode.scheduling.scheduler import Scheduler
from fastdecode.text.tokenizer import Tokenizer
from gpu_sworker import EmulatedSWorker, SWorker, first_line


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
        device: DeviceHolder | None = None,
    ) -> None:
        """on_step: told of every step that was run; timeline: what the rpool was given, too.

        device: what holds KV on the S-worker's device, as much as the scheduler knows of; None: nothing.

        eos_token_ids: that end a sequence; None: the model's own.
        """
        self._sworker, self._rpool, self._scheduler = sworker, rpool, scheduler
        self._timeline = timeline or NoTimeline()
        self._pipeline = Pipeline(sworker, rpool, self._timeline, device)
        self._intake = Intake(
            sworker.facts,
            tokenizer,
            max_model_len,
            seed,
            frozenset(sworker.facts.eos_token_ids) if eos_token_ids is None else eos_token_ids,
        )
        self._requests = LiveRequests(tokenizer)
        self._num_requests = 0
        self._recovery = Recovery(rpool, self._pipeline, scheduler)
        self._shortage = Shortage(scheduler, self._recovery)
        self._faults = RowFaults(sworker.facts.dtype)
        self._guard = Guard()
        self._records = StepRecords(scheduler, rpool, on_step)
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
        cache_salt: str | None = None,
    ) -> None:
        """Queues a request under an id of `next_request_id`.  Raises RequestError; then nothing was queued.

        priority: lower goes first, and takes the place of higher if there is none left.  on_delta: told, within a step,
        of every token that it brought.  cache_salt: it begins with KV of requests with the same one alone.
        """
        with self._whole():
            live = self._intake.take(request_id, prompt_token_ids, params, prompt, priority, on_delta, cache_salt)
            self._scheduler.add(*(continuation.sequence for continuation in live.continuations))
            self._requests.add(live)

    def add_r_worker(self, find: Callable[[int], RWorkerHandle]) -> None:
        """One more, found beside the steps under the number it will have; it is used once it is there."""
        self._rpool.invite(find)

    def reset_prefix_cache(self) -> None:
        """Forgets KV of sequences that have ended; those that run keep theirs, and others may begin with it."""
        with self._whole():
            self._scheduler.forget_prefixes()

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
            self._let_go(self._requests.forget(request_ids))

    def abort_all(self) -> None:
        """Whatever there is: also what somebody who was interrupted could not abort."""
        with self._whole():
            self._let_go(self._requests.forget(self._requests.request_ids))
            if self._pipeline.under_way:
                self._forget_all()

    def step(self) -> list[RequestOutput]:
        """A step of one lane: a token for each of its running sequences; returns the requests that are finished now.

        A lost R-worker costs its sequences' KV: they are computed again on the others, from prompt and output, and go
        on with the same tokens.  While none is left and one may come back, a step is a short wait for it.  Raises
        RWorkerError when none is left or comes back, and from then on always.  What the device has no memory for is
        done again by smaller steps.  Broken off by anything else (Ctrl-C), it ends all requests without an output, and
        the engine goes on.
        """
        with self._whole():
            self._recover()
            try:
                return self._step()
            except torch.OutOfMemoryError as error:
                told = first_line(error)
            failures = self._shortage.note(told)  # behind the error, whose frames hold what took the memory
            self._recover()
            self._fail(failures)
            return self._requests.take_failed()

    def _step(self) -> list[RequestOutput]:
        self._begin_lanes()
        passed = self._run()
        if passed is None:
            return self._requests.take_failed()
        step, logits = passed
        with self._timeline.span("sample", step.lane):
            result = self._sample(step, logits)
        self._timeline.count("live KV tokens", sum(self._scheduler.kv_tokens) + self._scheduler.device_kv_tokens)
        self._records.tell(step)
        self._shortage.passed()
        with self._timeline.span("commit", step.lane):
            return self._commit(step, result) + self._requests.take_failed()

    def _begin_lanes(self) -> None:
        """Each lane that has no step under way begins its next one."""
        for lane in range(self._scheduler.num_lanes):
            if lane in self._pipeline.under_way or not self._rpool.is_able:
                continue
            began = time.monotonic()
            with self._timeline.span("schedule", lane):
                step = self._scheduler.schedule(lane)
            if step is None:
                continue
            self._records.began[lane] = began
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

    def _sample(self, step: Step, logits: torch.Tensor) -> StepResult:
        """logits: [num_sampled + num_scored, vocab]"""
        num_sampled, running = step.num_sampled, self._scheduler.running
        with self._sworker.inference():
            sampled = self._sworker.sample(logits[:num_sampled], sampling_rows(step, running))
            if not step.scored:
                return StepResult(sampled, [])
            to_score = scoring_rows(step.scored, [running(segment.seq_id) for segment in step.scored])
            scores = self._sworker.score(logits[num_sampled:], to_score.token_ids, to_score.num_logprobs)
            return StepResult(sampled, scores)

    def _commit(self, step: Step, result: StepResult) -> list[RequestOutput]:
        """Hands tokens to sequences, looks for ends, gives back what sequences held that are finished or failed."""
        now, requests = time.monotonic(), self._requests
        requests.note_prompts(step.prompts, result.scores, self._records.began[step.lane], now)
        faults = self._faults.failures(step, result, requests.sequence)
        heard = requests.hear(step, result.sampled)
        finished = self._scheduler.commit(step, result.sampled.token_ids)
        self._fail([*faults, *heard.failures])
        finished += requests.stop_at_strings(heard.seq_ids)
        if gone := requests.tell(dict.fromkeys([*heard.seq_ids, *(sequence.seq_id for sequence in finished)])):
            self._let_go(gone)
        finished = [sequence for sequence in finished if requests.sequence(sequence.seq_id)]  # others have failed
        outputs = requests.finish(finished, now)
        self._release(finished)
        return outputs

    def _recover(self) -> None:
        """After losses.  Raises RWorkerError if no R-worker is left."""
        homeless = self._recovery.run()
        self._put_down()
        self._fail(homeless)

    def _fail(self, failures: Iterable[Failure]) -> None:
        """Ends their requests, with all their samples."""
        if gone := self._requests.fail(failures):
            self._let_go(gone)

    def _let_go(self, gone: list[Sequence]) -> None:
        """After requests ended before their sequences were finished."""
        self._release(gone)
        # Nobody is there whom the steps under way were for; but what ended sequences have left is worth their end.
        if not self._requests and self._pipeline.under_way and not self._scheduler.keeps_something:
            self._forget_all()

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

    def _whole(self) -> AbstractContextManager[None]:
        """Around whatever changes requests, schedule and R-workers: broken off, it ends all requests."""
        return self._guard.whole(self._begin_anew)

    def _begin_anew(self) -> None:
        """After an exception between any two lines: the R-workers' word for it is a barrier."""
        self._requests.take_failed()  # whoever would have got them has the exception
        self._forget_all()

    def _forget_all(self) -> None:
        """All sequences, here and on the R-workers, and the steps under way."""
        self._requests.forget_all()
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
            device_kv_capacity_tokens=self._scheduler.device_kv_capacity_tokens,
            kv_load_limit=self.kv_load_limit,
            totals=self.totals.copy(),
            num_prefix_queried=self._scheduler.prefix_counts.num_queried,
            num_prefix_found=self._scheduler.prefix_counts.num_found,
        )
