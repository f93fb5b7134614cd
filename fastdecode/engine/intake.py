"""What a request has to be before anything is queued for it: a prompt of known tokens that leaves room for output."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np

from fastdecode.api.outputs import Delta
from fastdecode.api.sampling_params import SamplingParams
from fastdecode.api.token_rules import TokenRules
from fastdecode.engine.results import Continuation, LiveRequest
from fastdecode.errors import RequestError
from fastdecode.scheduling.request import Request, Sequence
from fastdecode.text.detokenize import OutputText, StopStrings
from fastdecode.text.tokenizer import Tokenizer
from gpu_sworker import ModelFacts, derive_seed


class Intake:
    def __init__(
        self,
        facts: ModelFacts,
        tokenizer: Tokenizer | None,
        max_model_len: int,
        seed: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._eos_token_ids = eos_token_ids
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
        cache_salt: str | None = None,
    ) -> LiveRequest:
        """The request with its n sequences, each with a seed of its own.  Raises RequestError."""
        request = self._make_request(request_id, prompt_token_ids, params, priority, cache_salt)
        seed = params.seed if params.seed is not None else derive_seed(self._seed, int(request_id))
        self._check_stops(params)
        stops = StopStrings(params.stop_strings) if params.stop_strings else None
        is_watched = on_delta is not None or stops is not None or params.logprobs is not None
        continuations = []
        for index in range(params.n):
            sequence = Sequence(self._num_sequences, request, index, derive_seed(seed, index))
            self._num_sequences += 1
            continuations.append(Continuation(sequence, self._text(request, stops), is_watched))
        live = LiveRequest(request, prompt, continuations, params.n, time.monotonic(), on_delta)
        if params.prompt_logprobs is not None:
            live.prompt_scores = [None] * len(prompt_token_ids)
        return live

    def check(self, prompt_token_ids: list[int], params: SamplingParams) -> Request:
        """The request that `take` would make.  Raises RequestError as it would; changes nothing, in any thread."""
        self._check_stops(params)
        return self._make_request("", prompt_token_ids, params, 0)

    def _make_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        priority: int,
        cache_salt: str | None = None,
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
        bad = [t for t in prompt_token_ids if type(t) is not int or not 0 <= t < facts.vocab_size]
        if bad:
            raise RequestError(
                "invalid_request",
                f"token id {bad[0]!r} is not in the vocabulary; ids are whole numbers from 0 to {facts.vocab_size - 1}",
            )
        stops = frozenset(params.stop_ids)
        ends = frozenset() if params.ignore_eos else self._eos_token_ids
        return Request(
            request_id=request_id,
            prompt_token_ids=tuple(prompt_token_ids),
            params=params,
            max_new_tokens=left if params.max_tokens is None else min(left, params.max_tokens),
            stop_token_ids=stops,
            eos_token_ids=ends,
            priority=priority,
            rules=self._token_rules(params, prompt_token_ids, stops | ends),
            cache_salt=cache_salt,
        )

    def _token_rules(self, params: SamplingParams, prompt: list[int], ends: frozenset[int]) -> TokenRules | None:
        """Raises RequestError.  Costs nothing of a request that has none."""
        biases = params.logit_bias or {}
        has_words = bool(params.allowed_ids or params.bad_words or biases)
        if not (has_words or params.has_penalties or params.min_tokens):
            return None
        self._check_vocabulary("logit_bias", biases)
        self._check_vocabulary("allowed_token_ids", params.allowed_ids)
        rules = TokenRules(
            allowed=np.array(params.allowed_ids, np.int64) if params.allowed_ids else None,
            bad_words=self._bad_words(params.bad_words or ()),
            bias_ids=np.array(list(biases), np.int64),
            bias_values=np.array(list(biases.values()), np.float32),
            ends=np.array(sorted(t for t in ends if t < self._facts.vocab_size), np.int64),
            min_tokens=params.min_tokens,
            prompt_ids=np.unique(prompt) if params.repetition_penalty != 1 else np.empty(0, np.int64),
        )
        if rules.is_certain_to_fail():
            also = [name for name in ("bad_words", "min_tokens") if getattr(params, name)]
            raise RequestError(
                "invalid_request",
                f"allowed_token_ids: {' and '.join(also)} leave none of {_cut(list(params.allowed_ids))} to take "
                "(min_tokens bans what ends the text); allow others as well",
                "allowed_token_ids",
            )
        return rules

    def _check_vocabulary(self, name: str, token_ids: Iterable[int]) -> None:
        size = self._facts.vocab_size
        beyond = next((token_id for token_id in token_ids if token_id >= size), None)
        if beyond is not None:
            raise RequestError(
                "invalid_request",
                f"{name}: token id {beyond} is not in the vocabulary; ids are whole numbers from 0 to {size - 1}",
                name,
            )

    def _bad_words(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """The tokens of each at the beginning of a text, after a space, and where no word begins."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            if self._tokenizer is None:
                raise _wrong_words("need a tokenizer, which skip_tokenizer_init left out")
            try:
                of_word = self._tokenizer.encode_anywhere(word)
            except RequestError as error:
                raise _wrong_words(f"{word!r} cannot be encoded: {error}") from error
            if not of_word:
                raise _wrong_words(f"the tokenizer makes no tokens of {word!r}")
            for ids in of_word:
                self._check_vocabulary("bad_words", ids)
                found[ids] = None
        return tuple(found)

    def _check_stops(self, params: SamplingParams) -> None:
        if params.stop_strings and self._tokenizer is None:
            raise RequestError("invalid_request", "stop strings need a tokenizer, which skip_tokenizer_init left out")

    def _text(self, request: Request, stops: StopStrings | None) -> OutputText | None:
        params = request.params
        if self._tokenizer is None or not params.detokenize:
            return None
        return self._tokenizer.output_text(
            request.prompt_token_ids, stops, skip_special_tokens=params.skip_special_tokens
        )


def _wrong_words(why: str) -> RequestError:
    return RequestError("invalid_request", f"bad_words: {why}", "bad_words")


def _cut(values: list[int]) -> str:
    return repr(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:8]))}, ...]"
