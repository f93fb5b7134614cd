"""The engine: schedule, run, commit; requests in, outputs out.

add_request ─► Scheduler ─► Step ─► Pipeline ─► tokens ─► Scheduler ─► RequestOutput
                   ▲                                          │
                   └──────────────── next step ◄──────────────┘
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable

from fastdecode.errors import RequestError, RWorkerError
from fastdecode.outputs import RequestOutput
from fastdecode.pipeline import Pipeline
from fastdecode.plan import MicroBatch, Step
from fastdecode.recovery import Recovery, pairs
from fastdecode.rejoin import RWorkerHandle
from fastdecode.request import Request, Sequence
from fastdecode.results import Continuation, LiveRequest, finished_output, refused_output
from fastdecode.rpool import RPool
from fastdecode.sampling import sampling_rows
from fastdecode.sampling_params import SamplingParams
from fastdecode.scheduling.scheduler import Scheduler
from fastdecode.step_log import StepRecord, make_record
from fastdecode.text import StopFinder, Tokenizer
from fastdecode.timeline import NoTimeline, Timeline
from gpu_sworker import EmulatedSWorker, Sampled, SWorker, derive_seed

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
        on_step: Callable[[StepRecord], None] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        """on_step: told of every step that was run; timeline: what the rpool was given, too."""
        self._sworker, self._rpool, self._scheduler, self._tokenizer = sworker, rpool, scheduler, tokenizer
        self._timeline = timeline or NoTimeline()
        self._pipeline = Pipeline(sworker, rpool, self._timeline)
        self._max_model_len, self._seed = max_model_len, seed
        self._live: dict[str, LiveRequest] = {}
        self._by_sequence: dict[int, tuple[LiveRequest, Continuation]] = {}
        self._num_requests = self._num_sequences = 0
        self._recovery = Recovery(rpool, self._pipeline, scheduler)
        self._homeless: list[RequestOutput] = []  # requests that fit nowhere since an R-worker was lost
        self._on_step = on_step
        self._first_step: float | None = None  # when it began

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    def has_room(self, params: SamplingParams) -> bool:
        """A request with these would find a place in the queue now."""
        return self._scheduler.has_room(params.n)

    def next_request_id(self) -> str:
        """Ids count up from 0, refused requests included, so that a bad prompt does not shift the others' seeds."""
        self._num_requests += 1
        return str(self._num_requests - 1)

    def add_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, *, prompt: str | None = None
    ) -> None:
        """Queues a request under an id of `next_request_id`.  Raises RequestError; then nothing was queued."""
        request = self._make_request(request_id, prompt_token_ids, params)
        seed = params.seed if params.seed is not None else derive_seed(self._seed, int(request_id))
        continuations = []
        for index in range(params.n):
            sequence = Sequence(self._num_sequences, request, index, derive_seed(seed, index))
            self._num_sequences += 1
            continuations.append(Continuation(sequence, self._stop_finder(request)))
        live = LiveRequest(request, prompt, continuations, params.n, time.monotonic())
        self._scheduler.add(*(continuation.sequence for continuation in continuations))
        for continuation in continuations:
            self._by_sequence[continuation.sequence.seq_id] = live, continuation
        self._live[request_id] = live

    def step(self) -> list[RequestOutput]:
        """One token for every running sequence; returns the requests that are finished now.

        A lost R-worker costs its sequences' KV: they are computed again on the others, from prompt and output, and go
        on with the same tokens.  Raises RWorkerError when none is left, and from then on always.
        """
        self._recover(None)
        self._recovery.join()
        with self._timeline.span("schedule"):
            step = self._scheduler.schedule()
        if step is None:
            return self._take_homeless()
        started = time.monotonic()
        sampled = self._run(step)
        if sampled is None:
            return self._take_homeless()
        self._tell(step, started)
        with self._timeline.span("commit"):
            return self._commit(step, sampled, started) + self._take_homeless()

    def add_r_worker(self, find: Callable[[int], RWorkerHandle]) -> None:
        """One more, found beside the steps under the number it will have; it is used once it is there."""
        self._rpool.invite(find)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forgets requests, waiting or running, and frees their KV.  Unknown ids are ignored.

        An R-worker that is lost while it is told so is reported by the next `step`.
        """
        sequences = []
        for request_id in request_ids:
            live = self._live.pop(request_id, None)
            for continuation in live.continuations if live else ():
                if self._by_sequence.pop(continuation.sequence.seq_id, None):
                    sequences.append(continuation.sequence)
        self._release(sequences)

    def _release(self, sequences: list[Sequence]) -> None:
        """Gives back what sequences held; an R-worker lost meanwhile is the next step's to deal with."""
        released = self._scheduler.remove(sequences)
        try:
            if not self._recovery.is_final:
                self._pipeline.release(released)
        except RWorkerError as error:
            self._recovery.note(error, pairs(released))
        except BaseException:
            self._settle(pairs(released))
            raise

    def _settle(self, sequences: Iterable[tuple[int, int]]) -> None:
        """After an interrupt: see `Pipeline.settle`."""
        sequences = list(sequences)
        try:
            if not self._recovery.is_final:
                self._pipeline.settle(sequences)
        except RWorkerError as error:
            self._recovery.note(error, sequences)

    def _recover(self, step: Step | None) -> None:
        """After losses, in the middle of `step` or before the next one.  Raises RWorkerError if no R-worker is left."""
        try:
            homeless = self._recovery.run(step)
        except RWorkerError:
            raise
        except BaseException:
            self.abort(list(self._live))
            raise
        for sequence, error in homeless:
            self._refuse(sequence, error)

    def _refuse(self, sequence: Sequence, error: RWorkerError) -> None:
        """Its request: no R-worker that is left has room for it."""
        live = self._live.get(sequence.request.request_id)
        if live is None:
            return  # another of its continuations came before
        told = RequestError("worker_lost", f"{error}; no other has room for {sequence.max_kv_tokens} tokens of KV")
        request = live.request
        prompt_ids = list(request.prompt_token_ids)
        self._homeless.append(refused_output(request.request_id, live.prompt, prompt_ids, told, request.params.n))
        self.abort([request.request_id])

    def _take_homeless(self) -> list[RequestOutput]:
        taken, self._homeless = self._homeless, []
        return taken

    def _run(self, step: Step) -> list[Sampled] | None:
        """What was sampled; None if an R-worker was lost and the step did not happen."""
        try:
            return self._pipeline.run(step, self._sample)
        except RWorkerError as error:
            self._recovery.note(error)
        except BaseException:
            # Interrupted in the middle (Ctrl-C, out of memory): what R-workers hold of these sequences is not
            # what the scheduler thinks, so they end here; the engine itself can go on.
            self.abort(list(self._live))
            self._settle(
                {(segment.r_worker, segment.seq_id) for batch in step.micro_batches for segment in batch.segments}
                | {(worker, seq_id) for worker, seq_ids in step.preempted.items() for seq_id in seq_ids}
            )
            raise
        self._recover(step)
        return None

    def _tell(self, step: Step, started: float) -> None:
        self._timeline.count("live KV tokens", sum(self._scheduler.kv_tokens))
        if self._on_step is None:
            return
        self._first_step = started if self._first_step is None else self._first_step
        self._on_step(
            make_record(
                step,
                begin_s=started - self._first_step,
                seconds=time.monotonic() - started,
                num_running=self._scheduler.num_running,
                num_waiting=self._scheduler.num_waiting,
                kv_tokens=self._scheduler.kv_tokens,
            )
        )

    def _sample(self, micro_batch: MicroBatch, logits: object) -> Sampled:
        sequences = [self._scheduler.running(segment.seq_id) for segment in micro_batch.sampled]
        return self._sworker.sample(logits, sampling_rows(sequences, self._sworker.facts.vocab_size))  # type: ignore[arg-type]

    def _commit(self, step: Step, sampled: list[Sampled], started: float) -> list[RequestOutput]:
        """Hands tokens to sequences, looks for ends, gives back what finished sequences held."""
        tokens: dict[int, int] = {}
        now = time.monotonic()
        for micro_batch, results in zip(step.micro_batches, sampled, strict=True):
            for segment in micro_batch.segments:
                live, _ = self._by_sequence[segment.seq_id]
                live.first_scheduled = live.first_scheduled or started
            for row, segment in enumerate(micro_batch.sampled):
                live, continuation = self._by_sequence[segment.seq_id]
                tokens[segment.seq_id] = token = int(results.token_ids[row])
                continuation.take(token, results.logprobs[row])
                live.first_token = live.first_token or now
        finished = self._scheduler.commit(step, tokens)
        finished += self._stop_at_strings(tokens)
        outputs = []
        for sequence in finished:
            live, _ = self._by_sequence.pop(sequence.seq_id)
            live.num_unfinished -= 1
            if live.num_unfinished == 0:
                del self._live[live.request.request_id]
                outputs.append(finished_output(live, now, self._tokenizer))
        self._release(finished)
        return outputs

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

    def _make_request(self, request_id: str, prompt_token_ids: list[int], params: SamplingParams) -> Request:
        facts = self._sworker.facts
        if not prompt_token_ids:
            raise RequestError("invalid_request", "the prompt is empty: it has no tokens; give at least one")
        bad = next((t for t in prompt_token_ids if type(t) is not int or not 0 <= t < facts.vocab_size), None)
        if bad is not None:
            raise RequestError(
                "invalid_request",
                f"token id {bad!r} is not in the vocabulary; ids are whole numbers from 0 to {facts.vocab_size - 1}",
            )
        left = self._max_model_len - len(prompt_token_ids)
        if left < 1:
            raise RequestError(
                "context_length_exceeded",
                f"the prompt has {len(prompt_token_ids)} tokens; with one of output the limit is max_model_len = "
                f"{self._max_model_len}: shorten it, or raise max_model_len if the model and the KV budget allow",
            )
        return Request(
            request_id=request_id,
            prompt_token_ids=tuple(prompt_token_ids),
            params=params,
            max_new_tokens=left if params.max_tokens is None else min(left, params.max_tokens),
            stop_token_ids=frozenset(params.stop_ids),
            eos_token_ids=frozenset() if params.ignore_eos else frozenset(facts.eos_token_ids),
        )

    def _stop_finder(self, request: Request) -> StopFinder | None:
        params = request.params
        if not params.stop_strings:
            return None
        if self._tokenizer is None:
            raise RequestError("invalid_request", "stop strings need a tokenizer, which skip_tokenizer_init left out")
        return self._tokenizer.stop_finder(
            request.prompt_token_ids, params.stop_strings, skip_special_tokens=params.skip_special_tokens
        )
