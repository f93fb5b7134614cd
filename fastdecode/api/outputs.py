"""What a caller gets back; vLLM's names and meanings."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Logprob:
    logprob: float
    rank: int  # 1: the most likely token
    decoded_token: str | None = None  # by itself, with its space; `bytes:\\xe2\\x82` if that is no text
    token_bytes: bytes | None = None  # what it adds to a text: nothing, if it is special and these are skipped


# Per token of a prompt: itself and the likeliest ones there; None for the first, which nothing comes before.
PromptLogprobs = list[dict[int, Logprob] | None]


@dataclass(frozen=True)
class CompletionOutput:
    index: int  # which of the n samples
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None  # None unless logprobs were asked for
    logprobs: list[dict[int, Logprob]] | None  # per token: the sampled one and the likeliest ones
    finish_reason: str  # "stop", "length" or "error"
    stop_reason: int | str | None = None  # the stop token or string; None for the end-of-sequence token
    # Per token: where in the text its own begins.  None unless logprobs were asked for.
    text_offsets: list[int] | None = None


@dataclass(frozen=True)
class Delta:
    """What a step added to one continuation of a request that is streamed."""

    request_id: str
    index: int  # which of the n samples
    text: str  # may be empty: half a character, or what may become a stop string
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None  # of those tokens; None unless asked for
    finish_reason: str | None = None  # with the last one
    stop_reason: int | str | None = None
    # Of those tokens: where in the whole text their own begin; beyond its end, if a stop string cuts that off.
    text_offsets: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None  # with the first one, if asked for
    num_cached_tokens: int = 0  # of the request, as in its RequestOutput


@dataclass(frozen=True)
class OutputError:
    """Why a request has no output."""

    code: str  # this and the rest: see errors.RequestError
    message: str
    param: str | None = None
    numbers: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RequestMetrics:
    """Seconds, measured in the process of the S-worker."""

    queue_s: float  # from arrival to the first step that carried its prompt
    first_token_s: float | None  # from arrival to its first new token; None: it was to have none
    total_s: float  # from arrival to its end


@dataclass(frozen=True)
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]  # n of them, by index
    error: OutputError | None = None
    metrics: RequestMetrics | None = None
    prompt_logprobs: PromptLogprobs | None = None  # None unless asked for
    num_cached_tokens: int = 0  # of the prompt those that were found, and did not go through the model
    finished: bool = True
