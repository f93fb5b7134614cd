"""From outputs to a response's body."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdecode.api.outputs import CompletionOutput, Logprob, PromptLogprobs, RequestOutput
from fastdecode.openai_api.echo import Echo
from fastdecode.text.detokenize import bytes_name

_LEAST_LOGPROB = -9999.0  # of a token that cannot be: JSON has no -inf; vLLM's number


def completion_body(
    outputs: Sequence[RequestOutput],
    *,
    is_chat: bool,
    body_id: str,
    model: str,
    created: int,
    num_logprobs: int | None,
    num_prompt_logprobs: int | None = None,
    echoes: Sequence[Echo] | None = None,
) -> dict[str, Any]:
    """A `chat.completion` or a `text_completion`.  outputs: one per prompt, of equally many samples; created: seconds
    since 1970; num_logprobs: as in SamplingParams; num_prompt_logprobs: of vLLM's `prompt_logprobs`; echoes: of each
    prompt.
    """
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    completions = [completion for output in outputs for completion in output.outputs]
    choices: list[dict[str, Any]] = []
    beside: dict[str, Any] = {}  # what vLLM adds: to a chat's answer, or to each choice
    for place, output in enumerate(outputs):
        if num_prompt_logprobs is not None:
            beside = {"prompt_logprobs": _prompt_logprobs(output, num_prompt_logprobs)}
        if is_chat:
            choices += [_chat_choice(completion, num_logprobs) for completion in output.outputs]
            continue
        shown = Shown(echoes[place], output.prompt_logprobs, num_logprobs) if echoes else None
        choices += [_text_choice(completion, num_logprobs, shown) | beside for completion in output.outputs]
    return {
        "id": body_id,
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [{"index": index, **choice} for index, choice in enumerate(choices)],  # prompt * n + sample
        "usage": usage(
            prompt_tokens,
            sum(len(completion.token_ids) for completion in completions),
            sum(output.num_cached_tokens for output in outputs),
        ),
        **(beside if is_chat else {}),
    }


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """cached_tokens: of the prompts'."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
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


class Shown:
    """What stands before what a choice generates: the prompt."""

    def __init__(self, echo: Echo, logprobs: PromptLogprobs | None, num_logprobs: int | None) -> None:
        """num_logprobs: as in SamplingParams."""
        self.text = echo.text
        self.logprobs: dict[str, Any] | None = None
        if num_logprobs is not None and logprobs is not None:
            token_ids = echo.token_ids[1:]
            kept = [_kept(entries, token, num_logprobs) for token, entries in zip(token_ids, logprobs[1:], strict=True)]
            made = text_logprobs(token_ids, kept, echo.text_offsets[1:])
            first = {"tokens": echo.first_token, "token_logprobs": None, "top_logprobs": None, "text_offset": 0}
            self.logprobs = {name: [first[name], *values] for name, values in made.items()}

    def before(self, choice: dict[str, Any]) -> dict[str, Any]:
        """With the prompt before it.  Offsets are those in its own text until then."""
        logprobs = choice["logprobs"]
        if logprobs is not None and self.logprobs is not None:
            moved = logprobs | {"text_offset": [len(self.text) + offset for offset in logprobs["text_offset"]]}
            logprobs = {name: [*self.logprobs[name], *moved[name]] for name in moved}
        return choice | {"text": self.text + choice["text"], "logprobs": logprobs}


def _kept(entries: dict[int, Logprob] | None, token_id: int, num_logprobs: int) -> dict[int, Logprob]:
    """The token itself, and so many of the likeliest."""
    assert entries is not None, "every token but the first has a score"
    likeliest = {other: entry for other, entry in entries.items() if entry.rank <= num_logprobs}
    return {token_id: entries[token_id]} | likeliest


def _prompt_logprobs(output: RequestOutput, num_logprobs: int) -> list[dict[str, Any] | None]:
    """With vLLM's names."""
    assert output.prompt_logprobs is not None, "they were asked for"
    told: list[dict[str, Any] | None] = [None]
    for token_id, entries in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        told.append({
            str(other): {"logprob": _logprob(entry), "rank": entry.rank, "decoded_token": entry.decoded_token}
            for other, entry in _kept(entries, token_id, num_logprobs).items()
        })  # fmt: skip
    return told


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


def _text_choice(completion: CompletionOutput, num_logprobs: int | None, shown: Shown | None) -> dict[str, Any]:
    logprobs = None
    if num_logprobs is not None and completion.logprobs is not None:
        logprobs = text_logprobs(completion.token_ids, completion.logprobs, completion.text_offsets)
    choice = {
        "text": completion.text,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    return shown.before(choice) if shown else choice


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
