"""From an output to a response's body."""

from __future__ import annotations

from typing import Any

from fastdecode.outputs import CompletionOutput, Logprob, OutputError, RequestOutput

_STATUS = {"model_not_found": 404, "timeout": 408, "worker_lost": 500}


def status_of(error: OutputError) -> int:
    """HTTP's word for an error's code; what is not listed is the request's fault."""
    return _STATUS.get(error.code, 400)


def error_body(error: OutputError) -> dict[str, Any]:
    status = status_of(error)
    kind = "server_error" if status >= 500 else "timeout_error" if status == 408 else "invalid_request_error"
    return {"error": {"message": error.message, "type": kind, "param": None, "code": error.code}}


def completion_body(
    output: RequestOutput, *, is_chat: bool, body_id: str, model: str, created: int, num_logprobs: int | None
) -> dict[str, Any]:
    """A `chat.completion` or a `text_completion`.  created: seconds since 1970; num_logprobs: as in SamplingParams."""
    make = _chat_choice if is_chat else _text_choice
    prompt_tokens = len(output.prompt_token_ids)
    completion_tokens = sum(len(completion.token_ids) for completion in output.outputs)
    return {
        "id": body_id,
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [make(completion, num_logprobs) for completion in output.outputs],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def _chat_choice(completion: CompletionOutput, num_logprobs: int | None) -> dict[str, Any]:
    logprobs = None
    if num_logprobs is not None and completion.logprobs is not None:
        pairs = zip(completion.token_ids, completion.logprobs, strict=True)
        logprobs = {
            "content": [
                {**_token(entries[token_id]), "top_logprobs": [_token(e) for e in _likeliest(entries, num_logprobs)]}
                for token_id, entries in pairs
            ]
        }
    return {
        "index": completion.index,
        "message": {"role": "assistant", "content": completion.text},
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def _text_choice(completion: CompletionOutput, num_logprobs: int | None) -> dict[str, Any]:
    logprobs = None
    if num_logprobs is not None and completion.logprobs is not None:
        chosen = [entries[token] for token, entries in zip(completion.token_ids, completion.logprobs, strict=True)]
        tokens = [_text(entry) for entry in chosen]
        logprobs = {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in chosen],
            "top_logprobs": [{_text(e): e.logprob for e in entries.values()} for entries in completion.logprobs],
            "text_offset": [sum(map(len, tokens[:i])) for i in range(len(tokens))],
        }
    return {
        "index": completion.index,
        "text": completion.text,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def _likeliest(entries: dict[int, Logprob], count: int) -> list[Logprob]:
    """Without the sampled token, which is always among the entries, if it is none of them."""
    return sorted(entries.values(), key=lambda entry: entry.rank)[:count]


def _token(entry: Logprob) -> dict[str, Any]:
    text = _text(entry)
    return {"token": text, "logprob": entry.logprob, "bytes": list(text.encode(errors="replace"))}


def _text(entry: Logprob) -> str:
    return entry.decoded_token or ""
