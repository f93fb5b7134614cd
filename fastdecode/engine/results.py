"""From finished sequences to what the caller gets: text, log-probabilities, times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fastdecode.api.outputs import (
    CompletionOutput,
    Delta,
    Logprob,
    OutputError,
    PromptLogprobs,
    RequestMetrics,
    RequestOutput,
)
from fastdecode.api.sampling_params import SamplingParams
from fastdecode.errors import RequestError
from fastdecode.scheduling.request import Request, Sequence
from fastdecode.text.detokenize import OutputText, StopMatch
from fastdecode.text.tokenizer import Tokenizer
from gpu_sworker import TokenLogprob, TokenLogprobs


@dataclass(eq=False)
class Continuation:
    """A sequence and what only the outside wants of it."""

    sequence: Sequence
    text: OutputText | None  # None: nobody wants any
    is_watched: bool  # its text is wanted while it grows: for a stream, stop strings, or the places of its tokens
    stop_match: StopMatch | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    is_begun: bool = False  # in a stream: something of it was told
    num_told_tokens: int = 0  # of a request that is streamed

    def take(self, token_id: int, logprobs: TokenLogprobs) -> None:
        """Notes a new token, before the scheduler does."""
        if logprobs:
            self.logprobs.append(logprobs)
        if self.text is None or not self.is_watched:
            return
        if self._is_hidden(token_id):
            self.text.push_hidden()
            return
        match = self.text.push(token_id)
        if self.sequence.request.max_new_tokens == len(self.sequence.output_token_ids) + 1:
            match = match or self.text.finish()
        self.stop_match = self.stop_match or match

    def finished_text(self) -> str:
        """The whole, when the sequence is finished: without the token or string that ended it, unless that was asked
        for.
        """
        if self.text is None:
            return ""
        if not (self.is_watched or self.text.is_finished):
            token_ids = self.sequence.output_token_ids
            self.text.push_all([t for t in token_ids if not self._is_hidden(t)])
        self.text.finish()
        return self.text.whole(self._end())

    def next_text(self) -> str:
        """What is certain and was not told yet."""
        if self.text is None:
            return ""
        if not self.sequence.finish_reason:
            return self.text.take_certain()
        self.text.finish()
        return self.text.take(self._end())

    def _end(self) -> int:
        """Where the text ends, now that the sequence is finished."""
        assert self.text is not None
        if self.stop_match is None or not isinstance(self.sequence.stop_reason, str):
            return self.text.num_characters
        is_included = self.sequence.request.params.include_stop_str_in_output
        return self.stop_match.end if is_included else self.stop_match.position

    def _is_hidden(self, token_id: int) -> bool:
        """It ends the sequence and is not to be in its text."""
        request = self.sequence.request
        is_end = token_id in request.eos_token_ids or token_id in request.stop_token_ids
        return is_end and not request.params.include_stop_str_in_output


@dataclass(eq=False)
class LiveRequest:
    """A request on its way.  Times are seconds of one monotonic clock."""

    request: Request
    prompt: str | None
    continuations: list[Continuation]
    num_unfinished: int
    arrived: float
    on_delta: Callable[[Delta], None] | None = None
    prompt_scores: list[TokenLogprobs | None] = field(default_factory=list)  # per token, if asked for; [0] is None
    prompt_logprobs: PromptLogprobs | None = None  # the same with names, once somebody is told
    first_scheduled: float | None = None
    first_token: float | None = None
    num_cached_tokens: int = 0  # of the prompt, that its first sequence found when it started


def finished_output(live: LiveRequest, now: float, tokenizer: Tokenizer | None) -> RequestOutput:
    """With an error if the tokenizer cannot say what was generated."""
    assert live.first_scheduled is not None, "it was computed"
    try:
        outputs = [_completion(continuation, tokenizer) for continuation in live.continuations]
        prompt_logprobs = _prompt_logprobs(live, tokenizer)
    except RequestError as error:
        return failed_output(live, error)
    return RequestOutput(
        request_id=live.request.request_id,
        prompt=live.prompt,
        prompt_token_ids=list(live.request.prompt_token_ids),
        outputs=outputs,
        metrics=RequestMetrics(
            queue_s=live.first_scheduled - live.arrived,
            first_token_s=None if live.first_token is None else live.first_token - live.arrived,
            total_s=now - live.arrived,
        ),
        prompt_logprobs=prompt_logprobs,
        num_cached_tokens=live.num_cached_tokens,
    )


def failed_output(live: LiveRequest, error: RequestError) -> RequestOutput:
    request = live.request
    return refused_output(request.request_id, live.prompt, list(request.prompt_token_ids), error, request.params.n)


def next_delta(live: LiveRequest, continuation: Continuation, tokenizer: Tokenizer | None) -> Delta:
    """What was added since the last one.  All texts together are the text of the output."""
    is_first, continuation.is_begun = not continuation.is_begun, True
    sequence = continuation.sequence
    begin, continuation.num_told_tokens = continuation.num_told_tokens, len(sequence.output_token_ids)
    params = sequence.request.params
    is_asked = params.logprobs is not None
    return Delta(
        request_id=sequence.request.request_id,
        index=sequence.index,
        text=continuation.next_text(),
        token_ids=sequence.output_token_ids[begin:],
        logprobs=[_named(e, tokenizer, params) for e in continuation.logprobs[begin:]] if is_asked else None,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        text_offsets=continuation.text.offsets[begin:] if is_asked and continuation.text else None,
        prompt_logprobs=_prompt_logprobs(live, tokenizer) if is_first else None,
        num_cached_tokens=live.num_cached_tokens,
    )


def _prompt_logprobs(live: LiveRequest, tokenizer: Tokenizer | None) -> PromptLogprobs | None:
    """All of them: whatever is generated comes after the whole prompt, and the first of n sequences ahead of others."""
    params = live.request.params
    if params.prompt_logprobs is None:
        return None
    if live.prompt_logprobs is None:
        first, *others = live.prompt_scores
        assert first is None and all(others), "every token but the first has a score"
        live.prompt_logprobs = [None, *(_named(entries, tokenizer, params) for entries in others if entries)]
    return live.prompt_logprobs


def refused_output(
    request_id: str, prompt: str | None, prompt_token_ids: list[int], error: RequestError, num_samples: int
) -> RequestOutput:
    """An error, and as many empty continuations as were asked for, so that loops over outputs need no special case."""
    empty = [CompletionOutput(index, "", [], None, None, "error") for index in range(num_samples)]
    told = OutputError(error.code, str(error), error.param, error.numbers)
    return RequestOutput(request_id, prompt, prompt_token_ids, empty, told)


def _completion(continuation: Continuation, tokenizer: Tokenizer | None) -> CompletionOutput:
    sequence = continuation.sequence
    params = sequence.request.params
    is_asked = params.logprobs is not None
    assert sequence.finish_reason is not None, "it is finished"
    text = continuation.finished_text()
    offsets = continuation.text.offsets if continuation.text else []
    return CompletionOutput(
        index=sequence.index,
        text=text,
        token_ids=list(sequence.output_token_ids),
        cumulative_logprob=sum(entries[0].logprob for entries in continuation.logprobs) if is_asked else None,
        logprobs=[_named(e, tokenizer, params) for e in continuation.logprobs] if is_asked else None,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        text_offsets=[min(offset, len(text)) for offset in offsets] if is_asked and continuation.text else None,
    )


def _named(entries: TokenLogprobs, tokenizer: Tokenizer | None, params: SamplingParams) -> dict[int, Logprob]:
    """Of one place, by token id."""
    return {entry.token_id: _named_entry(entry, tokenizer, params) for entry in entries}


def _named_entry(entry: TokenLogprob, tokenizer: Tokenizer | None, params: SamplingParams) -> Logprob:
    if tokenizer is None:
        return Logprob(entry.logprob, entry.rank)
    piece = tokenizer.piece(entry.token_id)
    data = b"" if piece.is_special and params.skip_special_tokens else piece.data
    return Logprob(entry.logprob, entry.rank, piece.name, data)
