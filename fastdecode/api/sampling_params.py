"""What a caller may ask of one request; vLLM's names and meanings.  Checked once, then immutable."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

MAX_SAMPLES = 1024
MAX_LOGPROBS = 1000
MAX_STOPS = 256
MAX_BAD_WORDS = 1024
_INT_MAX = 2**31 - 1
# vLLM's: below the first a temperature means the likeliest token, and none divides by less than the second.
_GREEDY_BELOW, _LEAST_TEMPERATURE = 1e-5, 1e-2


class Draw(NamedTuple):
    """How a token is drawn: equal for requests between which a sampler sees no difference."""

    temperature: float  # 0: the most likely token, whatever the next three say
    top_k: int
    top_p: float
    min_p: float
    num_logprobs: int  # -1: none


NUM_DRAW_FIELDS = len(Draw._fields)
LIKELIEST = Draw(0.0, 0, 1.0, 0.0, -1)  # the most likely token, and no log-probabilities


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Every field has a range; a value outside it raises ValueError naming field, value and range.

    n: continuations per prompt; of temperature 0, too (vLLM refuses that), where all of them are equal.
    temperature: 0 takes the most likely token; otherwise logits are divided by it, or by 0.01 if that is more.
    top_p, top_k, min_p: keep the likeliest tokens with this mass / this many (0: all) / at least this
        fraction of the likeliest one's probability.
    seed: of this request's draws; None takes one from the engine's seed and the request's number.
    stop: strings that end a continuation;  stop_token_ids: tokens that do.
    ignore_eos: go on after the model's end-of-sequence token.
    max_tokens: at most this many new tokens; None: up to max_model_len.  0 (which vLLM refuses): the prompt goes
        through the model, for `prompt_logprobs`, and nothing is generated.
    min_tokens: no end-of-sequence or stop token before this many.
    presence_penalty, frequency_penalty, repetition_penalty: 0, 0 and 1 change nothing.
    logit_bias: token id -> what is added to its logit before anything else, -100 to 100.
    allowed_token_ids: the only tokens that may come; None: all.
    bad_words: strings that must not come, in the tokens that the tokenizer makes of each, with and without a space
        before it: the last of them is not taken where the others came before it.  Other tokens may spell it, too.
    logprobs: log-probabilities of the sampled token and of this many likeliest ones; None: none.
    prompt_logprobs: the same of every token of the prompt but the first; penalties do not touch them.
    detokenize: False leaves `text` empty;  skip_special_tokens: leave special tokens out of it.
    include_stop_str_in_output: keep the stop string or token in the text.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, _plain(getattr(self, each.name)))
        for name in ("stop", "stop_token_ids"):
            given = getattr(self, name)
            given = [given] if isinstance(given, str) else [] if given is None else given
            if not isinstance(given, Iterable):
                raise ValueError(f"{name} must be a list, got {given!r}")
            object.__setattr__(self, name, tuple(given))
        if self.top_k == -1:  # vLLM's older word for "all"
            object.__setattr__(self, "top_k", 0)
        _check_int("n", self.n, 1, MAX_SAMPLES)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, above_low=True)
        _check_int("top_k", self.top_k, 0, _INT_MAX)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_int("min_tokens", self.min_tokens, 0, _INT_MAX)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 0, _INT_MAX)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._check_stops()
        self._check_tokens()
        self._check_contradictions()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return self.stop  # type: ignore[return-value]  # made a tuple above

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self.stop_token_ids  # type: ignore[return-value]

    @property
    def allowed_ids(self) -> tuple[int, ...]:
        """Empty: all."""
        return self.allowed_token_ids or ()  # type: ignore[return-value]

    @cached_property
    def draw(self) -> Draw:
        num_logprobs = LIKELIEST.num_logprobs if self.logprobs is None else self.logprobs
        if self.temperature < _GREEDY_BELOW:
            return LIKELIEST if self.logprobs is None else LIKELIEST._replace(num_logprobs=num_logprobs)
        temperature = max(self.temperature, _LEAST_TEMPERATURE)
        return Draw(temperature, self.top_k, self.top_p, self.min_p, num_logprobs)

    @property
    def has_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1.0)

    def _check_stops(self) -> None:
        if len(self.stop_strings) > MAX_STOPS or len(self.stop_ids) > MAX_STOPS:
            raise ValueError(f"stop and stop_token_ids take at most {MAX_STOPS} entries each")
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop must hold strings that are not empty, got {text!r}")
        for token_id in self.stop_ids:
            _check_int("stop_token_ids", token_id, 0, _INT_MAX)

    def _check_tokens(self) -> None:
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise ValueError(f"logit_bias must map token ids to numbers from -100 to 100, got {self.logit_bias!r}")
            biases = {_token_id("logit_bias", key): value for key, value in self.logit_bias.items()}
            for token_id, bias in biases.items():
                if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
                    raise ValueError(f"logit_bias of token {token_id} must be a number from -100 to 100, got {bias!r}")
            object.__setattr__(self, "logit_bias", {key: float(bias) for key, bias in biases.items()} or None)
        if self.allowed_token_ids is not None:
            ids = tuple(
                _token_id("allowed_token_ids", each) for each in _listed("allowed_token_ids", self.allowed_token_ids)
            )
            if not ids:
                raise ValueError("allowed_token_ids must hold at least one token id; leave it out to allow all")
            object.__setattr__(self, "allowed_token_ids", tuple(dict.fromkeys(ids)))
        if self.bad_words is not None:
            words = _listed("bad_words", self.bad_words)
            if len(words) > MAX_BAD_WORDS:
                raise ValueError(f"bad_words takes at most {MAX_BAD_WORDS} entries, got {len(words)}")
            for word in words:
                if not isinstance(word, str) or not word:
                    raise ValueError(f"bad_words must hold strings that are not empty, got {word!r}")
            object.__setattr__(self, "bad_words", tuple(dict.fromkeys(words)) or None)

    def _check_contradictions(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) must be at most max_tokens ({self.max_tokens})")
        if self.stop_strings and not self.detokenize:
            raise ValueError("stop strings are looked for in the text: set detokenize=True, or use stop_token_ids")


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy or torch as Python's, also within a list or a mapping."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _listed(name: str, values: object) -> list[object]:
    if not isinstance(values, list):
        raise ValueError(f"{name} must be a list, got {values!r}")
    return values


def _token_id(name: str, value: object) -> int:
    """Also as a string, as JSON's keys are."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value[:20])
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _INT_MAX:
        raise ValueError(f"{name} must hold token ids, whole numbers from 0 to the vocabulary's size; got {value!r}")
    return value


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")


def _check_float(name: str, value: object, low: float, high: float, *, above_low: bool = False) -> None:
    bounds = f"{'above' if above_low else 'from'} {low:g} {'and at most' if above_low else 'to'} {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(f"{name} must be a number {bounds}, got {value!r}")
    if value < low or value > high or (above_low and value == low):
        raise ValueError(f"{name} must be {bounds}, got {value}")
