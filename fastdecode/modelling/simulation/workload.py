"""Requests for a simulation: how long, and when they come.  Pure but for its seeded generator.

lengths    "512"  "128,256,512"  "uniform:1:1024"  "normal:2600:0.3:4000"  "lognormal:200:1.0:2048"
           one of those given; low:high; mean:spread relative to it:cap; median:sigma:cap
arrivals   "offline"  "poisson:4.0"  "closed:16"
           all at the start; requests per second; clients that each send the next when they have an answer
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fastdecode.errors import ConfigError

_MOST, _LEAST_RATE = 1e9, 1e-9


@dataclass(frozen=True)
class Job:
    prompt_tokens: int
    output_tokens: int
    max_tokens: int  # what its request allows
    is_known: bool = True  # nothing but max_tokens ends it, and the scheduler knows; else an end of sequence may


@dataclass(frozen=True)
class Arrivals:
    times: tuple[float, ...] | None  # seconds, rising, one for each job; None: closed loop
    num_clients: int = 0


def parse_lengths(text: str, generator: np.random.Generator, count: int) -> np.ndarray:
    """[count] int64, 1 and more.  Raises ConfigError."""
    name, *fields = text.split(":")
    try:
        numbers = [float(field) for field in fields]
        if not all(map(math.isfinite, numbers)) or any(number > _MOST for number in numbers):
            raise ValueError("out of range")
        if name == "uniform":
            low, high = numbers
            drawn = generator.integers(int(low), int(high) + 1, count)
        elif name == "normal":
            mean, spread, cap = numbers
            drawn = np.minimum(generator.normal(mean, spread * mean, count), cap)
        elif name == "lognormal":
            median, sigma, cap = numbers
            drawn = np.minimum(generator.lognormal(np.log(median), sigma, count), cap)
        elif not fields:
            drawn = generator.choice([int(part) for part in name.split(",")], count)
        else:
            raise ValueError("unknown")
    except ValueError as error:
        raise ConfigError(
            f"{text!r} are no lengths; write like 512, 128,256,512, uniform:LOW:HIGH, normal:MEAN:RELATIVE_SPREAD:CAP "
            "or lognormal:MEDIAN:SIGMA:CAP"
        ) from error
    return np.maximum(np.asarray(drawn, np.int64), 1)


def parse_arrivals(text: str, generator: np.random.Generator, count: int) -> Arrivals:
    """Raises ConfigError."""
    name, _, field = text.partition(":")
    try:
        if name == "offline" and not field:
            return Arrivals((0.0,) * count)
        if name == "poisson" and _LEAST_RATE <= float(field) <= _MOST:
            return Arrivals(tuple(np.cumsum(generator.exponential(1 / float(field), count)).tolist()))
        if name == "closed" and int(field) > 0:
            return Arrivals(None, int(field))
    except ValueError:
        pass
    raise ConfigError(f"{text!r} are no arrivals; write offline, poisson:REQUESTS_PER_SECOND or closed:CLIENTS")


def make_jobs(
    count: int, prompts: str, outputs: str, max_tokens: int | None, generator: np.random.Generator
) -> list[Job]:
    """max_tokens: what requests ask for; None: the length they come to.  Raises ConfigError."""
    prompt_tokens = parse_lengths(prompts, generator, count).tolist()
    output_tokens = parse_lengths(outputs, generator, count).tolist()
    return [
        Job(prompt, output, output) if max_tokens is None else Job(prompt, min(output, max_tokens), max_tokens, False)
        for prompt, output in zip(prompt_tokens, output_tokens, strict=True)
    ]
