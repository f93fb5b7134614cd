"""A request and the sequences it becomes.  Pure: no text, no torch, no clock.

    state      holds                                         next
    ────────   ───────────────────────────────────────────   ─────────────────────────
    waiting    the prompt                                    running, when KV is promised
    running    prompt + output, a place on an R-worker       finished: stop, length, abort
    finished   prompt + output, a reason

A sequence can be rebuilt anywhere from `token_ids` and its seed: draws depend on seed and position alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fastdecode.sampling_params import SamplingParams


@dataclass(frozen=True)
class Request:
    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int  # what params and max_model_len leave
    stop_token_ids: frozenset[int]  # params' own
    eos_token_ids: frozenset[int]  # empty when they are to be ignored


@dataclass(eq=False)
class Sequence:
    """One of the n continuations of a request.  Only the scheduler changes it."""

    seq_id: int
    request: Request
    index: int  # which continuation
    seed: int
    r_worker: int | None = None  # None: waiting, or finished
    output_token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def max_kv_tokens(self) -> int:
        """KV it will hold at most: the last token sampled never comes back as input."""
        return len(self.request.prompt_token_ids) + self.request.max_new_tokens - 1

    def append(self, token_id: int) -> None:
        """Takes the next token and finishes the sequence if that ends it."""
        self.output_token_ids.append(token_id)
        if token_id in self.request.eos_token_ids:
            self.finish("stop", None)
        elif token_id in self.request.stop_token_ids:
            self.finish("stop", token_id)
        elif len(self.output_token_ids) >= self.request.max_new_tokens:
            self.finish("length", None)

    def finish(self, reason: str, stop_reason: int | str | None) -> None:
        assert self.finish_reason in (None, "length"), "a sequence finishes once; a stop string outranks the length"
        self.finish_reason, self.stop_reason = reason, stop_reason
