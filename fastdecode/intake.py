"""What a request has to be before anything is queued for it: a prompt of known tokens that leaves room for output."""

from __future__ import annotations

import time
from collections.abc import Callable

from fastdecode.errors import RequestError
from fastdecode.outputs import Delta
from fastdecode.request import Request, Sequence
from fastdecode.results import Continuation, LiveRequest
from fastdecode.sampling_params import SamplingParams
from fastdecode.text import StopFinder, Tokenizer
from gpu_sworker import ModelFacts, derive_seed


class Intake:
    def __init__(self, facts: ModelFacts, tokenizer: Tokenizer | None, max_model_len: int, seed: int) -> None:
        self._facts, self._tokenizer, self._max_model_len, self._seed = facts, tokenizer, max_model_len, seed
        self._num_sequences = 0

    def take(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        prompt: str | None,
        priority: int,
        on_delta: Callable[[Delta], None] | None,
    ) -> LiveRequest:
        """The request with its n sequences, each with a seed of its own.  Raises RequestError."""
        request = self._make_request(request_id, prompt_token_ids, params, priority)
        seed = params.seed if params.seed is not None else derive_seed(self._seed, int(request_id))
        continuations = []
        for index in range(params.n):
            sequence = Sequence(self._num_sequences, request, index, derive_seed(seed, index))
            self._num_sequences += 1
            continuations.append(Continuation(sequence, self._stop_finder(request, is_streamed=on_delta is not None)))
        live = LiveRequest(request, prompt, continuations, params.n, time.monotonic(), on_delta)
        if params.prompt_logprobs is not None:
            live.prompt_scores = [None] * len(prompt_token_ids)
        return live

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> Request:
        """The request that `take` would make.  Raises RequestError as it would; changes nothing, in any thread."""
        request = self._make_request("", prompt_token_ids, params, 0)
        self._stop_finder(request, is_streamed=False)
        return request

    def _make_request(
        self, request_id: str, prompt_token_ids: list[int], params: SamplingParams, priority: int
    ) -> Request:
        facts = self._facts
        if not prompt_token_ids:
            raise RequestError("invalid_request", "the prompt is empty: it has no tokens; give at least one")
        left = self._max_model_len - len(prompt_token_ids)
        if left < (0 if params.max_tokens == 0 else 1):
            with_output = "" if params.max_tokens == 0 else " with one of output"
            raise RequestError(
                "context_length_exceeded",
                f"the prompt has {len(prompt_token_ids)} tokens;{with_output} the limit is max_model_len = "
                f"{self._max_model_len}: shorten it, or raise max_model_len if the model and the KV budget allow",
                numbers={"n_prompt_tokens": len(prompt_token_ids), "n_ctx": self._max_model_len},
            )
        # After the length, which is cheaper to see: steps wait meanwhile.
        bad = next((t for t in prompt_token_ids if type(t) is not int or not 0 <= t < facts.vocab_size), None)
        if bad is not None:
            raise RequestError(
                "invalid_request",
                f"token id {bad!r} is not in the vocabulary; ids are whole numbers from 0 to {facts.vocab_size - 1}",
            )
        return Request(
            request_id=request_id,
            prompt_token_ids=tuple(prompt_token_ids),
            params=params,
            max_new_tokens=left if params.max_tokens is None else min(left, params.max_tokens),
            stop_token_ids=frozenset(params.stop_ids),
            eos_token_ids=frozenset() if params.ignore_eos else frozenset(facts.eos_token_ids),
            priority=priority,
        )

    def _stop_finder(self, request: Request, *, is_streamed: bool) -> StopFinder | None:
        params = request.params
        if not params.stop_strings and not (is_streamed and self._tokenizer and params.detokenize):
            return None
        if self._tokenizer is None:
            raise RequestError("invalid_request", "stop strings need a tokenizer, which skip_tokenizer_init left out")
        return self._tokenizer.stop_finder(
            request.prompt_token_ids, params.stop_strings, skip_special_tokens=params.skip_special_tokens
        )
