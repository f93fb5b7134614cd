"""From outputs to a response's body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdecode.detokenize import bytes_name
from fastdecode.outputs import CompletionOutput, Logprob, RequestOutput

_LEAST_LOGPROB = -9999.0  # of a token that cannot be: JSON has no -inf; vLLM's number


def completion_body(
    outputs: Sequence[RequestOutput],
    *,
    is_chat: bool,
    body_id: str,
    model: str,
    created: int,
    num_logprobs: int | None,
) -> dict[str, Any]:
    """A `chat.completion` or a `text_completion`.  outputs: one per prompt, of equally many samples; created: seconds
    since 1970; num_logprobs: as in SamplingParams.
    """
    make = _chat_choice if is_chat else _text_choice
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    completions = [completion for output in outputs for completion in output.outputs]
    return {
        "id": body_id,
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [
            {"index": index, **make(completion, num_logprobs)}  # prompt * n + sample
            for index, completion in enumerate(completions)
        ],
        "usage": usage(prompt_tokens, sum(len(completion.token_ids) for completion in completions)),
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def chat_logprobs(token_ids: Sequence[int], logprobs: list[dict[int, Logprob]], num_logprobs: int) -> dict[str, Any]:
    pairs = zip(token_ids, logprobs, strict=True)
    return {
        "content": [
            {**_token(entries[token_id]), "top_logprobs": [_token(e) for e in _likeliest(entries, num_logprobs)]}
            for token_id, entries in pairs
        ]
    }


def text_logprobs(
    token_ids: Sequence[int], logprobs: list[dict[int, Logprob]], text_offsets: Sequence[int] | None
) -> dict[str, Any]:
    """text_offsets: per token, where in the text its own begins; None: there is no text."""
    chosen = [entries[token] for token, entries in zip(token_ids, logprobs, strict=True)]
    return {
        "tokens": [_text(entry) for entry in chosen],
        "token_logprobs": [_logprob(entry) for entry in chosen],
        "top_logprobs": [_by_name(entries) for entries in logprobs],
        "text_offset": [0] * len(chosen) if text_offsets is None else list(text_offsets),
    }


def _chat_choice(completion: CompletionOutput, num_logprobs: int | None) -> dict[str, Any]:
    logprobs = None
    if num_logprobs is not None and completion.logprobs is not None:
        logprobs = chat_logprobs(completion.token_ids, completion.logprobs, num_logprobs)
    return {
        "message": {"role": "assistant", "content": completion.text},
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def _text_choice(completion: CompletionOutput, num_logprobs: int | None) -> dict[str, Any]:
    logprobs = None
    if num_logprobs is not None and completion.logprobs is not None:
        logprobs = text_logprobs(completion.token_ids, completion.logprobs, completion.text_offsets)
    return {
        "text": completion.text,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def _likeliest(entries: dict[int, Logprob], count: int) -> list[Logprob]:
    """Without the sampled token, which is always among the entries, if it is none of them."""
    return sorted(entries.values(), key=lambda entry: entry.rank)[:count]


def _by_name(entries: dict[int, Logprob]) -> dict[str, float]:
    """As many as there are: of tokens with the same text the first keeps its name, and the sampled one comes first."""
    named: dict[str, float] = {}
    for token_id, entry in entries.items():
        name = _text(entry)
        if name in named:
            name = bytes_name(entry.token_bytes or name.encode(errors="replace"))
        named[f"token_id:{token_id}" if name in named else name] = _logprob(entry)
    return named


def _token(entry: Logprob) -> dict[str, Any]:
    text = _text(entry)
    data = text.encode(errors="replace") if entry.token_bytes is None else entry.token_bytes
    return {"token": text, "logprob": _logprob(entry), "bytes": list(data)}


def _text(entry: Logprob) -> str:
    return entry.decoded_token or ""


def _logprob(entry: Logprob) -> float:
    return max(_LEAST_LOGPROB, entry.logprob)
