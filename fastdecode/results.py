"""From finished sequences to what the caller gets: text, log-probabilities, times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fastdecode.errors import RequestError
from fastdecode.outputs import (
    CompletionOutput,
    Delta,
    Logprob,
    OutputError,
    PromptLogprobs,
    RequestMetrics,
    RequestOutput,
)
from fastdecode.request import Request, Sequence
from fastdecode.text import StopFinder, StopMatch, Tokenizer
from gpu_sworker import TokenLogprob


@dataclass(eq=False)
class Continuation:
    """A sequence and what only the outside wants of it."""

    sequence: Sequence
    stop_finder: StopFinder | None
    stop_match: StopMatch | None = None
    logprobs: list[list[TokenLogprob]] = field(default_factory=list)
    is_begun: bool = False  # in a stream: something of it was told
    told_tokens: int = 0  # of a request that is streamed
    told_text: str = ""

    def take(self, token_id: int, logprobs: list[TokenLogprob]) -> None:
        """Notes a new token, before the scheduler does."""
        if logprobs:
            self.logprobs.append(logprobs)
        if self.stop_finder and self.stop_match is None:
            self.stop_match = self.stop_finder.push(token_id)


@dataclass(eq=False)
class LiveRequest:
    """A request on its way.  Times are seconds of one monotonic clock."""

    request: Request
    prompt: str | None
    continuations: list[Continuation]
    num_unfinished: int
    arrived: float
    on_delta: Callable[[Delta], None] | None = None
    prompt_scores: list[list[TokenLogprob] | None] = field(default_factory=list)  # per token, if asked for; [0] is None
    first_scheduled: float | None = None
    first_token: float | None = None


def finished_output(live: LiveRequest, now: float, tokenizer: Tokenizer | None) -> RequestOutput:
    assert live.first_scheduled is not None, "it was computed"
    return RequestOutput(
        request_id=live.request.request_id,
        prompt=live.prompt,
        prompt_token_ids=list(live.request.prompt_token_ids),
        outputs=[_completion(continuation, tokenizer) for continuation in live.continuations],
        metrics=RequestMetrics(
            queue_s=live.first_scheduled - live.arrived,
            first_token_s=None if live.first_token is None else live.first_token - live.arrived,
            total_s=now - live.arrived,
        ),
        prompt_logprobs=_prompt_logprobs(live, tokenizer),
    )


def next_delta(live: LiveRequest, continuation: Continuation, tokenizer: Tokenizer | None) -> Delta:
    """What was added since the last one.  All texts together are the text of the output."""
    is_first, continuation.is_begun = not continuation.is_begun, True
    sequence, params = continuation.sequence, continuation.sequence.request.params
    if sequence.finish_reason:
        text = _text(continuation, tokenizer)
    else:
        text = _certain_text(continuation.stop_finder.text, params.stop_strings) if continuation.stop_finder else ""
    begin, told = continuation.told_tokens, continuation.told_text
    # A tokenizer that takes back what it has said is not followed: what was sent was sent.
    fresh = text[len(told) :] if text.startswith(told) else ""
    continuation.told_tokens, continuation.told_text = len(sequence.output_token_ids), told + fresh
    return Delta(
        request_id=sequence.request.request_id,
        index=sequence.index,
        text=fresh,
        token_ids=sequence.output_token_ids[begin:],
        logprobs=None if params.logprobs is None else [_logprobs(e, tokenizer) for e in continuation.logprobs[begin:]],
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        prompt_logprobs=_prompt_logprobs(live, tokenizer) if is_first else None,
    )


def _prompt_logprobs(live: LiveRequest, tokenizer: Tokenizer | None) -> PromptLogprobs | None:
    """All of them: whatever is generated comes after the whole prompt, and the first of n sequences ahead of others."""
    if live.request.params.prompt_logprobs is None:
        return None
    first, *others = live.prompt_scores
    assert first is None and all(others), "every token but the first has a score"
    return [None, *(_logprobs(entries, tokenizer) for entries in others if entries)]


def _certain_text(text: str, stops: tuple[str, ...]) -> str:
    """Without an end that the next tokens may make a stop string of."""
    longest = max(map(len, stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return text[:-length]
    return text


def refused_output(
    request_id: str, prompt: str | None, prompt_token_ids: list[int], error: RequestError, num_samples: int
) -> RequestOutput:
    """An error, and as many empty continuations as were asked for, so that loops over outputs need no special case."""
    empty = [CompletionOutput(index, "", [], None, None, "error") for index in range(num_samples)]
    told = OutputError(error.code, str(error), error.param, error.numbers)
    return RequestOutput(request_id, prompt, prompt_token_ids, empty, told)


def _completion(continuation: Continuation, tokenizer: Tokenizer | None) -> CompletionOutput:
    sequence = continuation.sequence
    asked = sequence.request.params.logprobs is not None
    assert sequence.finish_reason is not None, "it is finished"
    return CompletionOutput(
        index=sequence.index,
        text=_text(continuation, tokenizer),
        token_ids=list(sequence.output_token_ids),
        cumulative_logprob=sum(entries[0].logprob for entries in continuation.logprobs) if asked else None,
        logprobs=[_logprobs(entries, tokenizer) for entries in continuation.logprobs] if asked else None,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )


def _text(continuation: Continuation, tokenizer: Tokenizer | None) -> str:
    """Without the token or string that ended it, unless that was asked for."""
    sequence, params = continuation.sequence, continuation.sequence.request.params
    if tokenizer is None or not params.detokenize:
        return ""
    if isinstance(sequence.stop_reason, str) and continuation.stop_match:
        return continuation.stop_match.cut(include_stop=params.include_stop_str_in_output)
    token_ids = sequence.output_token_ids
    if sequence.finish_reason == "stop" and not params.include_stop_str_in_output:
        token_ids = token_ids[:-1]
    prompt = sequence.request.prompt_token_ids
    return tokenizer.decode_continuation(prompt, token_ids, skip_special_tokens=params.skip_special_tokens)


def _logprobs(entries: list[TokenLogprob], tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    return {
        entry.token_id: Logprob(
            entry.logprob, entry.rank, tokenizer.token_text(entry.token_id) if tokenizer else None
        )
        for entry in entries
    }  # fmt: skip
