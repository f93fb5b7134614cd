"""The requests on their way: what each has heard of its tokens, and what it hands out at its end.

    add ─► live ─► hear ─► stop_at_strings ─► tell ─► finish ─► RequestOutput
            │       a step's tokens, of those who want theirs as they come
            ├────► fail ───► one of its sequences cannot go on: a RequestOutput with the error, by `take_failed`
            └────► forget ─► nobody wants it any more: nothing

What is forgotten here may have KV still: whoever has it forgotten gets the sequences, and gives back what they hold.
This file knows no queue, no lanes and no R-workers.
"""

from __future__ import annotations

from collections import abc
from typing import NamedTuple

from fastdecode.api.outputs import RequestOutput
from fastdecode.engine.results import Continuation, LiveRequest, failed_output, finished_output, next_delta
from fastdecode.errors import RequestError
from fastdecode.scheduling.plan import Segment, Step
from fastdecode.scheduling.request import Sequence
from fastdecode.text.tokenizer import Tokenizer
from gpu_sworker import Sampled, TokenLogprobs


class Failure(NamedTuple):
    """A sequence that cannot go on; its request ends with it, and all its samples."""

    sequence: Sequence
    error: RequestError


class Heard(NamedTuple):
    seq_ids: list[int]  # whose new token was looked at
    failures: list[Failure]  # of them those whose text nobody can tell


class LiveRequests:
    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._live: dict[str, LiveRequest] = {}
        self._by_sequence: dict[int, tuple[LiveRequest, Continuation]] = {}  # of those that are not finished
        self._watched: set[int] = set()  # sequences whose every token somebody wants to see when it comes
        self._failed: list[RequestOutput] = []  # requests that ended with an error, and are not handed out yet

    def __len__(self) -> int:
        return len(self._live)

    @property
    def request_ids(self) -> list[str]:
        return list(self._live)

    @property
    def sequences(self) -> list[Sequence]:
        """Those that are not finished."""
        return [continuation.sequence for _, continuation in self._by_sequence.values()]

    def sequence(self, seq_id: int) -> Sequence | None:
        """None: finished, or its request is forgotten."""
        known = self._by_sequence.get(seq_id)
        return known[1].sequence if known else None

    def add(self, live: LiveRequest) -> None:
        for continuation in live.continuations:
            self._by_sequence[continuation.sequence.seq_id] = live, continuation
            if continuation.is_watched:
                self._watched.add(continuation.sequence.seq_id)
        self._live[live.request.request_id] = live

    def forget(self, request_ids: abc.Iterable[str]) -> list[Sequence]:
        """Returns their sequences that were not finished.  Unknown ids are ignored."""
        gone = []
        for request_id in request_ids:
            live = self._live.pop(request_id, None)
            for continuation in live.continuations if live else ():
                if self._forget_sequence(continuation.sequence.seq_id):
                    gone.append(continuation.sequence)
        return gone

    def forget_all(self) -> None:
        """But for those that have failed."""
        self._live, self._by_sequence, self._watched = {}, {}, set()

    def fail(self, failures: abc.Iterable[Failure]) -> list[Sequence]:
        """Ends their requests with the first error of each; returns those sequences that were not finished."""
        gone = []
        for sequence, error in failures:
            request_id = sequence.request.request_id
            if request_id in self._live:  # or another of its sequences came before
                self._failed.append(failed_output(self._live[request_id], error))
                gone += self.forget([request_id])
        return gone

    def take_failed(self) -> list[RequestOutput]:
        """Those that have failed since the last time."""
        taken, self._failed = self._failed, []
        return taken

    def note_prompts(
        self, prompts: abc.Iterable[Segment], scores: abc.Iterable[TokenLogprobs], began: float, now: float
    ) -> None:
        """When each was begun, and what of it was found; when it had its first token, and how likely its own are.

        scores: per scored position; began, now: of the step that the prompts were in, of the clock of `LiveRequest`.
        """
        next_scores = iter(scores)
        for segment in prompts:
            known = self._by_sequence.get(segment.seq_id)
            for position in segment.scored if segment.score_to else ():
                score = next(next_scores)
                if known:
                    known[0].prompt_scores[position + 1] = score
            if known:
                if known[0].first_scheduled is None:
                    known[0].first_scheduled, known[0].num_cached_tokens = began, known[1].sequence.num_found
                if segment.is_sampled:
                    known[0].first_token = known[0].first_token or now

    def hear(self, step: Step, sampled: Sampled) -> Heard:
        """Its new tokens, of which those that are watched take note.  To be called before sequences have it."""
        heard = Heard([], [])
        if not self._watched:
            return heard
        for row, seq_id in enumerate(step.sampled):
            if seq_id not in self._watched:
                continue
            heard.seq_ids.append(seq_id)
            _, continuation = self._by_sequence[seq_id]
            try:
                continuation.take(int(sampled.token_ids[row]), sampled.logprobs[row])
            except RequestError as why:
                heard.failures.append(Failure(continuation.sequence, why))
        return heard

    def stop_at_strings(self, seq_ids: abc.Iterable[int]) -> list[Sequence]:
        """Ends sequences whose text has come to a stop string; returns those that were not ended already.

        Unknown ids are ignored: they failed, or samples of theirs.
        """
        stopped = []
        for seq_id in seq_ids:
            if seq_id not in self._by_sequence:
                continue
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

    def tell(self, seq_ids: abc.Iterable[int]) -> list[Sequence]:
        """Whoever streams a request gets what its sequences have new.

        Unknown ids are ignored.  Returns sequences that are gone, because their requests failed at it.
        """
        gone = []
        for seq_id in seq_ids:
            if seq_id not in self._by_sequence:
                continue
            live, continuation = self._by_sequence[seq_id]
            if live.on_delta is None:
                continue
            try:
                delta = next_delta(live, continuation, self._tokenizer)
            except RequestError as error:
                gone += self.fail([Failure(continuation.sequence, error)])
            else:
                live.on_delta(delta)
        return gone

    def finish(self, sequences: abc.Iterable[Sequence], now: float) -> list[RequestOutput]:
        """Forgets finished sequences; returns the outputs of requests of which they were the last ones."""
        outputs = []
        for sequence in sequences:
            live, _ = self._by_sequence[sequence.seq_id]
            self._forget_sequence(sequence.seq_id)
            live.num_unfinished -= 1
            if live.num_unfinished == 0:
                del self._live[live.request.request_id]
                outputs.append(finished_output(live, now, self._tokenizer))
        return outputs

    def check_integrity(self) -> None:
        """Raises AssertionError unless requests and their sequences agree about what there is."""
        num_unfinished = dict.fromkeys(self._live, 0)
        for seq_id, (live, continuation) in self._by_sequence.items():
            assert seq_id == continuation.sequence.seq_id and continuation in live.continuations
            assert self._live.get(live.request.request_id) is live, f"sequence {seq_id} has no request"
            num_unfinished[live.request.request_id] += 1
        assert num_unfinished == {request_id: live.num_unfinished for request_id, live in self._live.items()}
        assert all(num_unfinished.values()), "a request ends with its last sequence"
        watched = {seq_id for seq_id, (_, continuation) in self._by_sequence.items() if continuation.is_watched}
        assert self._watched == watched

    def _forget_sequence(self, seq_id: int) -> bool:
        """Whether it was known."""
        self._watched.discard(seq_id)
        return self._by_sequence.pop(seq_id, None) is not None
