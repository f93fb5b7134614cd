"""The engine: schedule, run, commit; requests in, outputs out.

add_request ─► Scheduler ─► Step ─► Pipeline ─► tokens ─► Scheduler ─► RequestOutput
                   ▲                                          │
                   └──────────────── next step ◄──────────────┘
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from fastdecode.errors import RequestError, RWorkerError
from fastdecode.outputs import CompletionOutput, Logprob, OutputError, RequestMetrics, RequestOutput
from fastdecode.pipeline import Pipeline
from fastdecode.plan import MicroBatch, Step
from fastdecode.request import Request, Sequence
from fastdecode.rpool import RPool
from fastdecode.sampling import sampling_rows
from fastdecode.sampling_params import SamplingParams
from fastdecode.scheduler import Scheduler
from fastdecode.text import StopFinder, StopMatch, Tokenizer
from gpu_sworker import Sampled, SWorker, TokenLogprob, derive_seed

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Continuation:
    """A sequence and what only the outside wants of it."""

    sequence: Sequence
    stop_finder: StopFinder | None
    stop_match: StopMatch | None = None
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)


@dataclass(eq=False)
class _LiveRequest:
    request: Request
    prompt: str | None
    continuations: list[_Continuation]
    num_unfinished: int
    arrived: float  # time.monotonic()
    first_scheduled: float | None = None
    first_token: float | None = None


class Engine:
    def __init__(
        self,
        *,
        sworker: SWorker,
        rpool: RPool,
        scheduler: Scheduler,
        tokenizer: Tokenizer | None,
        max_model_len: int,
        seed: int,
    ) -> None:
        self._sworker, self._rpool, self._scheduler, self._tokenizer = sworker, rpool, scheduler, tokenizer
        self._pipeline = Pipeline(sworker, rpool)
        self._max_model_len, self._seed = max_model_len, seed
        self._live: dict[str, _LiveRequest] = {}
        self._by_sequence: dict[int, tuple[_LiveRequest, _Continuation]] = {}
        self._num_requests = self._num_sequences = 0
        self._broken: RWorkerError | None = None

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    def add_request(self, prompt_token_ids: list[int], params: SamplingParams, *, prompt: str | None = None) -> str:
        """Queues a request and returns its id.  Raises RequestError; then nothing was queued."""
        request_id = str(self._num_requests)
        self._num_requests += 1  # refused ones count, so that a bad prompt does not shift the others' seeds
        request = self._make_request(request_id, prompt_token_ids, params)
        seed = params.seed if params.seed is not None else derive_seed(self._seed, int(request_id))
        continuations = []
        for index in range(params.n):
            sequence = Sequence(self._num_sequences, request, index, derive_seed(seed, index))
            self._num_sequences += 1
            continuations.append(_Continuation(sequence, self._stop_finder(params)))
        live = _LiveRequest(request, prompt, continuations, params.n, time.monotonic())
        for continuation in continuations:  # they need the same KV: the first one is refused or none
            self._scheduler.add(continuation.sequence)
            self._by_sequence[continuation.sequence.seq_id] = live, continuation
        self._live[request_id] = live
        return request_id

    def step(self) -> list[RequestOutput]:
        """One token for every running sequence; returns the requests that are finished now.

        Raises RWorkerError, and from then on always: what was running is lost with the KV.
        """
        if self._broken:
            raise self._broken
        step = self._scheduler.schedule()
        if step is None:
            return []
        started = time.monotonic()
        sampled = self._run(step)
        return self._commit(step, sampled, started)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forgets requests, waiting or running, and frees their KV.  Unknown ids are ignored."""
        sequences = []
        for request_id in request_ids:
            live = self._live.pop(request_id, None)
            for continuation in live.continuations if live else ():
                if self._by_sequence.pop(continuation.sequence.seq_id, None):
                    sequences.append(continuation.sequence)
        released = self._scheduler.remove(sequences)
        if not self._broken:
            self._rpool.release(released)

    def _run(self, step: Step) -> list[Sampled]:
        try:
            return self._pipeline.run(step, self._sample)
        except RWorkerError as error:
            self._broken = error
            raise
        except BaseException:
            # Interrupted in the middle (Ctrl-C, out of memory): what R-workers hold of these sequences is not
            # what the scheduler thinks, so they end here; the engine itself can go on.
            try:
                self._rpool.drain()
                self.abort(list(self._live))
            except RWorkerError as error:
                self._broken = error
            raise

    def _sample(self, micro_batch: MicroBatch, logits: object) -> Sampled:
        sequences = [self._scheduler.running(segment.seq_id) for segment in micro_batch.segments]
        return self._sworker.sample(logits, sampling_rows(sequences, self._sworker.facts.vocab_size))  # type: ignore[arg-type]

    def _commit(self, step: Step, sampled: list[Sampled], started: float) -> list[RequestOutput]:
        """Hands tokens to sequences, looks for ends, gives back what finished sequences held."""
        tokens: dict[int, int] = {}
        now = time.monotonic()
        for micro_batch, results in zip(step.micro_batches, sampled, strict=True):
            for row, segment in enumerate(micro_batch.segments):
                live, continuation = self._by_sequence[segment.seq_id]
                token = tokens[segment.seq_id] = int(results.token_ids[row])
                if live.first_scheduled is None or live.first_token is None:
                    live.first_scheduled, live.first_token = live.first_scheduled or started, now
                if results.logprobs[row]:
                    continuation.logprobs.append(results.logprobs[row])
                if continuation.stop_finder:
                    continuation.stop_match = continuation.stop_finder.push(token)
        finished = self._scheduler.commit(step, tokens)
        for seq_id in tokens:
            _, continuation = self._by_sequence[seq_id]
            sequence, match = continuation.sequence, continuation.stop_match
            if match and sequence.finish_reason != "stop" and self._past_minimum(sequence):
                if sequence.finish_reason is None:
                    finished.append(sequence)
                sequence.finish("stop", match.stop)
        self._rpool.release(self._scheduler.remove(finished))
        outputs = []
        for sequence in finished:
            live, _ = self._by_sequence.pop(sequence.seq_id)
            live.num_unfinished -= 1
            if live.num_unfinished == 0:
                del self._live[live.request.request_id]
                outputs.append(self._output(live, now))
        return outputs

    @staticmethod
    def _past_minimum(sequence: Sequence) -> bool:
        return len(sequence.output_token_ids) >= sequence.request.params.min_tokens

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

    def _stop_finder(self, params: SamplingParams) -> StopFinder | None:
        if not params.stop_strings:
            return None
        if self._tokenizer is None:
            raise RequestError("invalid_request", "stop strings need a tokenizer, which skip_tokenizer_init left out")
        return self._tokenizer.stop_finder(params.stop_strings, skip_special_tokens=params.skip_special_tokens)

    def _output(self, live: _LiveRequest, now: float) -> RequestOutput:
        assert live.first_scheduled is not None and live.first_token is not None
        return RequestOutput(
            request_id=live.request.request_id,
            prompt=live.prompt,
            prompt_token_ids=list(live.request.prompt_token_ids),
            outputs=[self._completion(continuation) for continuation in live.continuations],
            metrics=RequestMetrics(
                queue_s=live.first_scheduled - live.arrived,
                first_token_s=live.first_token - live.arrived,
                total_s=now - live.arrived,
            ),
        )

    def _completion(self, continuation: _Continuation) -> CompletionOutput:
        sequence, asked = continuation.sequence, continuation.sequence.request.params.logprobs is not None
        assert sequence.finish_reason is not None
        return CompletionOutput(
            index=sequence.index,
            text=self._text(continuation),
            token_ids=list(sequence.output_token_ids),
            cumulative_logprob=sum(entries[0].logprob for entries in continuation.logprobs) if asked else None,
            logprobs=[self._logprobs(entries) for entries in continuation.logprobs] if asked else None,
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )

    def _text(self, continuation: _Continuation) -> str:
        sequence, params = continuation.sequence, continuation.sequence.request.params
        if self._tokenizer is None or not params.detokenize:
            return ""
        if isinstance(sequence.stop_reason, str) and continuation.stop_match:
            return continuation.stop_match.cut(include_stop=params.include_stop_str_in_output)
        token_ids = sequence.output_token_ids
        if sequence.finish_reason == "stop" and not params.include_stop_str_in_output:
            token_ids = token_ids[:-1]
        return self._tokenizer.decode(token_ids, skip_special_tokens=params.skip_special_tokens)

    def _logprobs(self, entries: list[TokenLogprob]) -> dict[int, Logprob]:
        def text(token_id: int) -> str | None:
            return self._tokenizer.token_text(token_id) if self._tokenizer else None

        return {entry.token_id: Logprob(entry.logprob, entry.rank, text(entry.token_id)) for entry in entries}


def failed_output(
    request_id: str, prompt: str | None, prompt_token_ids: list[int], error: RequestError, num_samples: int
) -> RequestOutput:
    """The output of a request that was refused: an error, and n empty continuations that say so."""
    empty = [CompletionOutput(index, "", [], None, None, "error") for index in range(num_samples)]
    return RequestOutput(request_id, prompt, prompt_token_ids, empty, OutputError(error.code, str(error)))
