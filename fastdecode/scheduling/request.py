"""A request and the sequences it becomes.  Pure: no text, no torch, no clock.

    state       holds                                         next
    ─────────   ───────────────────────────────────────────   ──────────────────────────────────────────
    waiting     prompt, and output if it was preempted        prefilling, when there is room for its KV
    prefilling  a place on an R-worker, KV of its first       decoding, with its last chunk; waiting, if
                tokens                                        preempted
    decoding    KV of all tokens but the newest               finished: stop, length; waiting, if preempted
    finished    prompt + output, a reason

A sequence can be rebuilt anywhere from `token_ids` and its seed: draws depend on seed and position alone.  So what is
preempted goes through the model again as one prompt, output and all, and continues as if nothing had been.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from fastdecode.api.sampling_params import SamplingParams
from fastdecode.api.token_rules import TokenCounts, TokenRules
from fastdecode.scheduling.parts import Part
from fastdecode.scheduling.predictor import Prediction


@dataclass(frozen=True)
class Request:
    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int  # what params and max_model_len leave; 0: its prompt goes through the model, and that is all
    stop_token_ids: frozenset[int]  # params' own
    eos_token_ids: frozenset[int]  # empty when they are to be ignored
    priority: int = 0  # lower goes first, as with vLLM
    rules: TokenRules | None = None  # None: its logits are taken as they are
    true_output_tokens: int | None = None  # known in simulations and replays only
    cache_salt: str | None = None  # it shares its prompt with requests of the same salt alone

    @property
    def max_kv_tokens(self) -> int:
        """KV a continuation will hold at most: the last token sampled never comes back as input."""
        return len(self.prompt_token_ids) + max(self.max_new_tokens - 1, 0)

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens of which any ends it."""
        return self.eos_token_ids | self.stop_token_ids

    @property
    def length_is_known(self) -> bool:
        """Nothing but its length can end it."""
        return not self.max_new_tokens or not (self.eos_token_ids or self.stop_token_ids or self.params.stop_strings)


@dataclass(eq=False)
class Sequence:
    """One of the n continuations of a request.  Only the scheduler changes it."""

    seq_id: int
    request: Request
    index: int  # which continuation
    seed: int
    parts: tuple[Part, ...] = ()  # where its KV is or will be, mostly one; none: it waits, or has finished
    lane: int = 0  # whose steps it is in, while it runs
    prefill_tokens: int = 0  # how many it began with there: its prompt, and what was output before a preemption
    num_prefilled: int = 0  # of them those whose KV is on the R-worker
    found: dict[int, int] = field(default_factory=dict)  # first token of a part -> how many it has there already
    num_found: int = 0  # tokens that it had there when it began
    is_remote: bool = False  # its prompt attends on the R-worker, which holds the beginning of it
    is_known: bool = False  # to its R-worker; not while it waits for what it is to begin with
    num_scored: int = 0  # positions of its prompt whose logits have been looked at; they outlive a preemption
    num_preemptions: int = 0
    prediction: Prediction | None = None  # of all its output tokens; None: nobody was asked yet
    expected_tokens: int = 0  # of output, as its KV was reserved; it may outlive that
    output_token_ids: list[int] = field(default_factory=list)
    token_counts: TokenCounts | None = None  # of its output, as far as penalties have asked
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def r_worker(self) -> int | None:
        """That has its first token; None: it waits, or has finished."""
        return self.parts[0].r_worker if self.parts else None

    @property
    def is_in_parts(self) -> bool:
        """On several R-workers."""
        return len(self.parts) > 1

    def is_on(self, r_worker: int) -> bool:
        """Any part of it."""
        return any(part.r_worker == r_worker for part in self.parts)

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.output_token_ids)

    @property
    def token_ids(self) -> tuple[int, ...]:
        return (*self.request.prompt_token_ids, *self.output_token_ids)

    @property
    def is_prefilling(self) -> bool:
        return self.num_prefilled < self.prefill_tokens

    @property
    def num_kv_tokens(self) -> int:
        """That its R-worker has, between two steps: all but the one that was sampled last."""
        if self.num_prefilled < self.prefill_tokens:
            return self.num_prefilled
        return max(self.num_tokens - 1, self.prefill_tokens)

    @property
    def max_kv_tokens(self) -> int:
        return self.request.max_kv_tokens

    @property
    def num_to_score(self) -> int:
        """Positions of its prompt whose logits are wanted.  The n sequences of a request have one prompt: once."""
        is_asked = self.index == 0 and self.request.params.prompt_logprobs is not None
        return len(self.request.prompt_token_ids) - 1 if is_asked else 0

    def admit(self, parts: tuple[Part, ...], lane: int) -> None:
        assert not self.parts and not self.finish_reason
        self.parts, self.lane, self.num_prefilled, self.prefill_tokens = parts, lane, 0, self.num_tokens
        self.is_remote = self.is_known = False
        self.found = {}

    def begin_with(self, found: dict[int, int]) -> None:
        """Its R-workers know it, and have some of its prompt's tokens already; then the rest attends there.

        found: first token of a part -> how many
        """
        self.found, self.is_known = found, True
        self.is_remote = any(found.values())
        self.num_found = sum(found.values())
        self.prefilled(0)

    def prefilled(self, end: int) -> None:
        """KV of its tokens up to `end` is there, and perhaps of those behind."""
        while num_tokens := self.found.pop(end, 0):
            end += num_tokens
        self.num_prefilled = end

    def preempt(self) -> None:
        """Back to waiting.  Its KV is gone, or stays as that of one that has ended does."""
        assert self.parts and not self.finish_reason
        self.parts, self.num_prefilled, self.is_known = (), 0, False
        self.num_preemptions += 1

    def append(self, token_id: int) -> None:
        """Takes the next token and finishes the sequence if that ends it."""
        self.output_token_ids.append(token_id)
        self.look_for_end()

    def look_for_end(self) -> None:
        """Finishes the sequence if its last token ends it."""
        token_id = self.output_token_ids[-1]
        if token_id in self.request.eos_token_ids:
            self.finish("stop", None)
        elif token_id in self.request.stop_token_ids:
            self.finish("stop", token_id)
        elif len(self.output_token_ids) >= self.request.max_new_tokens:
            self.finish("length", None)

    def finish(self, reason: str, stop_reason: int | str | None) -> None:
        assert self.finish_reason in (None, "length"), "a sequence finishes once; a stop string outranks the length"
        self.finish_reason, self.stop_reason = reason, stop_reason
