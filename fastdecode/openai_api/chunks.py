"""From deltas to the chunks of a streamed answer.

chat   role ─► content … ─► finish_reason ─┐
text   echo, text … with the last, finish_reason ┴─► usage, if it was asked for
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from fastdecode.api.outputs import Delta, Logprob
from fastdecode.openai_api.echo import Echo
from fastdecode.openai_api.responses import Shown, chat_logprobs, text_logprobs, usage


@dataclass(frozen=True)
class _Token:
    token_id: int
    logprobs: dict[int, Logprob]
    offset: int  # where in the text its own begins


@dataclass(eq=False)
class _Told:
    """Of one choice.  A token whose text is held back waits with it: a stop string may cut its place off."""

    num_characters: int = 0
    waiting: list[_Token] = field(default_factory=list)

    def take(self, delta: Delta) -> list[_Token]:
        """The tokens whose places are known now."""
        assert delta.logprobs is not None
        self.num_characters += len(delta.text)
        offsets = delta.text_offsets or [0] * len(delta.token_ids)
        self.waiting += map(_Token, delta.token_ids, delta.logprobs, offsets)
        if delta.finish_reason:
            taken = [replace(token, offset=min(token.offset, self.num_characters)) for token in self.waiting]
        else:
            taken = list(takewhile(lambda token: token.offset <= self.num_characters, self.waiting))
        self.waiting = self.waiting[len(taken) :]
        return taken


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
        echoes: Sequence[Echo] | None = None,
    ) -> None:
        """created: seconds since 1970; num_logprobs: as in SamplingParams; with_usage_so_far: in every chunk, as vLLM's
        ``continuous_usage_stats`` has it; echoes: of each choice's prompt."""
        self._is_chat, self._num_logprobs, self._echoes = is_chat, num_logprobs, echoes
        self._head = {
            "id": body_id,
            "object": "chat.completion.chunk" if is_chat else "text_completion",
            "created": created,
            "model": model,
        }
        self._prompt_tokens, self._with_usage, self._with_usage_so_far = prompt_tokens, with_usage, with_usage_so_far
        self._told: dict[int, _Told] = {}  # by choice, those that have begun
        self._num_tokens = 0
        self._cached_tokens: dict[str, int] = {}  # by request: each prompt's, once something of it is told

    def chunks(self, index: int, delta: Delta) -> Iterator[dict[str, Any]]:
        """index: of the choice.  None at all if there is nothing to show yet."""
        self._num_tokens += len(delta.token_ids)
        self._cached_tokens[delta.request_id] = delta.num_cached_tokens
        if self._is_chat and index not in self._told:
            yield self._chat(index, {"role": "assistant", "content": ""})
        if self._echoes and index not in self._told:
            shown = Shown(self._echoes[index], delta.prompt_logprobs, self._num_logprobs)
            yield self._chunk(
                {
                    "index": index,
                    "text": shown.text,
                    "logprobs": shown.logprobs,
                    "finish_reason": None,
                    "stop_reason": None,
                }
            )
        self._told.setdefault(index, _Told())
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

    def _usage_so_far(self) -> dict[str, Any]:
        return usage(self._prompt_tokens, self._num_tokens, sum(self._cached_tokens.values()))

    def _logprobs(self, index: int, delta: Delta) -> dict[str, Any] | None:
        if self._num_logprobs is None or delta.logprobs is None:
            return None
        if self._is_chat:
            return chat_logprobs(delta.token_ids, delta.logprobs, self._num_logprobs) if delta.logprobs else None
        tokens = self._told[index].take(delta)
        if not tokens:
            return None
        begin = len(self._echoes[index].text) if self._echoes else 0
        offsets = [begin + token.offset for token in tokens]
        return text_logprobs([token.token_id for token in tokens], [token.logprobs for token in tokens], offsets)

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
