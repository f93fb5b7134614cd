"""Every value out of range is refused by name, with its range."""

from __future__ import annotations

import pytest

from fastdecode import SamplingParams


@pytest.mark.parametrize(
    "options, text",
    [
        ({"n": 0}, "n must be from 1 to 1024, got 0"),
        ({"n": 10**6}, "n must be from 1"),
        ({"n": 1.5}, "n must be a whole number"),
        ({"n": True}, "n must be a whole number"),
        ({"temperature": -0.1}, "temperature must be from 0 to 100"),
        ({"temperature": float("nan")}, "temperature must be a number"),
        ({"temperature": "hot"}, "temperature must be a number"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be above 0"),
        ({"top_k": -2}, "top_k must be from 0"),
        ({"min_p": 2}, "min_p must be from 0 to 1"),
        ({"max_tokens": -1}, "max_tokens must be from 0"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be from 0 to 1000"),
        ({"prompt_logprobs": 1001}, "prompt_logprobs must be from 0 to 1000"),
        ({"prompt_logprobs": True}, "prompt_logprobs must be a whole number"),
        ({"min_tokens": -1}, "min_tokens must be from 0"),
        ({"presence_penalty": 3}, "presence_penalty must be from -2 to 2"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty must be from 0.01 to 100"),
        ({"logprobs": -1}, "logprobs must be from 0"),
        ({"seed": 2**64}, "seed must be from"),
        ({"stop": ""}, "stop must hold strings"),
        ({"stop": ["a", 3]}, "stop must hold strings"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be from 0"),
        ({"ignore_eos": "yes"}, "ignore_eos must be True or False"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens \\(9\\) must be at most max_tokens \\(8\\)"),
        ({"stop": "x", "detokenize": False}, "set detokenize=True"),
        ({"stop": ["a"] * 300}, "at most 256"),
    ],
)
def test_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SamplingParams(**options)  # type: ignore[arg-type]


def test_unknown_field() -> None:
    with pytest.raises(TypeError, match="best_of"):
        SamplingParams(best_of=2)  # type: ignore[call-arg]


def test_normalised() -> None:
    params = SamplingParams(stop="END", top_k=-1)
    assert params.stop_strings == ("END",) and params.top_k == 0 and params.max_tokens == 16
    with pytest.raises(AttributeError):
        params.n = 3  # type: ignore[misc]
