"""From deltas to the chunks of a streamed answer.

chat   role ─► content … ─► finish_reason ─┐
text   text … with the last, finish_reason ┴─► usage, if it was asked for
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastdecode.openai_api.responses import chat_logprobs, text_logprobs, usage
from fastdecode.outputs import Delta


class ChunkWriter:
    """Of one answer."""

    def __init__(
        self,
        *,
        is_chat: bool,
        body_id: str,
        model: str,
        created: int,
        num_logprobs: int | None,
        prompt_tokens: int,
        with_usage: bool,
        with_usage_so_far: bool = False,
    ) -> None:
        """created: seconds since 1970; num_logprobs: as in SamplingParams; with_usage_so_far: in every chunk, as vLLM's
        ``continuous_usage_stats`` has it."""
        self._is_chat, self._num_logprobs = is_chat, num_logprobs
        self._head = {
            "id": body_id,
            "object": "chat.completion.chunk" if is_chat else "text_completion",
            "created": created,
            "model": model,
        }
        self._prompt_tokens, self._with_usage, self._with_usage_so_far = prompt_tokens, with_usage, with_usage_so_far
        self._characters: dict[int, int] = {}  # of the tokens told, by choice; its keys are the choices begun
        self._num_tokens = 0

    def chunks(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """index: of the choice.  None at all if there is nothing to show yet."""
        self._num_tokens += len(delta.token_ids)
        if self._is_chat and index not in self._characters:
            yield self._chat(index, {"role": "assistant", "content": ""})
        self._characters.setdefault(index, 0)
        logprobs = self._logprobs(index, delta)
        is_something = bool(delta.text or logprobs)
        if not self._is_chat:
            if is_something or delta.finish_reason:
                end = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
                yield self._chunk({"index": index, "text": delta.text, "logprobs": logprobs, **end})
            return
        if is_something:
            yield self._chat(index, {"content": delta.text}, logprobs)
        if delta.finish_reason:
            yield self._chat(index, {}, None, delta.finish_reason, delta.stop_reason)

    def usage(self) -> dict[str, Any]:
        """The last chunk of an answer with usage."""
        return {**self._head, "choices": [], "usage": self._usage_so_far()}

    def _usage_so_far(self) -> dict[str, int]:
        return usage(self._prompt_tokens, self._num_tokens)

    def _logprobs(self, index: int, delta: Delta) -> dict[str, Any] | None:
        if self._num_logprobs is None or not delta.logprobs:
            return None
        if self._is_chat:
            return chat_logprobs(delta.token_ids, delta.logprobs, self._num_logprobs)
        made = text_logprobs(delta.token_ids, delta.logprobs, self._characters[index])
        self._characters[index] += sum(map(len, made["tokens"]))
        return made

    def _chat(
        self,
        index: int,
        delta: dict[str, str],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
        stop_reason: int | str | None = None,
    ) -> dict[str, Any]:
        end = {"finish_reason": finish_reason, "stop_reason": stop_reason}
        return self._chunk({"index": index, "delta": delta, "logprobs": logprobs, **end})

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk: dict[str, Any] = {**self._head, "choices": [choice]}
        if self._with_usage:
            chunk["usage"] = self._usage_so_far() if self._with_usage_so_far else None
        return chunk
