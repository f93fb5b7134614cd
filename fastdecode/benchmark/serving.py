"""A server under load: what is asked, when, and what of the times is reported.  Pure; `http_client` has the wire.

    TTFT   sent to first token                          ITL    from chunk to chunk, of all requests
    TPOT   mean time of a request's tokens after it     E2EL   sent to last chunk

The names, the block and the keys of the record are those of vLLM's ``bench serve``; times in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastdecode.benchmark.workload import BenchRequest
from fastdecode.errors import ConfigError

_METRICS = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
}
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
ENDPOINTS = ("/v1/completions", "/v1/chat/completions")
_WIDTH = 50


@dataclass(frozen=True)
class Call:
    """What is sent."""

    body: dict[str, Any]
    prompt_tokens: int


@dataclass
class Outcome:
    """What came of one call; seconds.  Times are from its first byte sent."""

    prompt_tokens: int
    began_s: float = 0.0  # since the benchmark began
    first_s: float | None = None  # to the first token
    gaps_s: list[float] = field(default_factory=list)  # from chunk to chunk
    whole_s: float = 0.0  # to the last chunk
    output_tokens: int = 0
    error: str | None = None
    cached_tokens: int = 0  # of the prompt, if the server tells

    @property
    def per_token_s(self) -> float | None:
        """Of those after the first one; None if there are none."""
        if self.first_s is None or self.output_tokens < 2:
            return None
        return (self.whole_s - self.first_s) / (self.output_tokens - 1)


def make_calls(
    requests: Sequence[BenchRequest],
    *,
    endpoint: str,
    model: str,
    decode: Callable[[Sequence[int]], str] | None,
    fields: Mapping[str, Any],
) -> list[Call]:
    """Prompts go as token ids, to a chat as text.  fields: further ones of every body."""
    assert decode or endpoint == ENDPOINTS[0], "a chat is text"
    calls = []
    for request in requests:
        body: dict[str, Any] = {"model": model, "max_tokens": request.output_len, "stream": True, **fields}
        if decode:
            body["messages"] = [{"role": "user", "content": decode(request.prompt_token_ids)}]
        else:
            body["prompt"] = list(request.prompt_token_ids)
        calls.append(Call({**body, "stream_options": {"include_usage": True}}, len(request.prompt_token_ids)))
    return calls


def due_times(num_requests: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the beginning.  rate: requests/s, inf: all at once.

    Gaps are gamma-distributed with this shape: 1 is Poisson, less comes in bursts, more is even.
    """
    if rate == float("inf"):
        return [0.0] * num_requests
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), num_requests)
    return [0.0, *np.cumsum(gaps)[:-1].tolist()]


def read_goodput(words: Sequence[str]) -> dict[str, float]:
    """``["ttft:200", "tpot:50"]`` -> milliseconds by metric.  Raises ConfigError."""
    limits: dict[str, float] = {}
    for word in words:
        name, _, text = word.partition(":")
        try:
            limits[name] = float(text)
        except ValueError:
            limits[name] = 0.0
        if name not in GOODPUT_METRICS or not limits[name] > 0:
            raise ConfigError(
                f"--goodput wants NAME:MILLISECONDS with a name of {', '.join(GOODPUT_METRICS)}: {word!r}"
            )
    return limits


def serving_record(
    outcomes: Sequence[Outcome], seconds: float, goodput: Mapping[str, float], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """seconds: from the first request to the last answer.  settings: what to say of the run, first in the record."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    prompt_tokens, new_tokens = sum(o.prompt_tokens for o in good), sum(o.output_tokens for o in good)
    times = {
        "ttft": [o.first_s for o in good],
        "tpot": [o.per_token_s for o in good if o.per_token_s is not None],
        "itl": [gap for o in good for gap in o.gaps_s],
        "e2el": [o.whole_s for o in good],
    }
    record = {
        **settings,
        "duration": seconds,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": new_tokens,
        "total_cached_tokens": sum(o.cached_tokens for o in good),
        "request_throughput": len(good) / seconds,
        "request_goodput": sum(_keeps(o, goodput) for o in good) / seconds if goodput else None,
        "output_throughput": new_tokens / seconds,
        "total_token_throughput": (prompt_tokens + new_tokens) / seconds,
        "max_concurrent_requests": _most_at_once(good),
    }
    for name, values in times.items():
        record |= _spread(name, 1e3 * np.array(values, float))
    record["errors"] = sorted({o.error for o in outcomes if o.error})
    return record


def format_serving(record: Mapping[str, Any]) -> str:
    """vLLM's block."""
    lines = [f"{' Serving Benchmark Result ':=^{_WIDTH}}"]
    rows: list[tuple[str, Any]] = [
        ("Successful requests:", record["completed"]),
        ("Failed requests:", record["failed"]),
    ]
    if record["max_concurrency"] is not None:
        rows.append(("Maximum request concurrency:", record["max_concurrency"]))
    if record["request_rate"] != "inf":
        rows.append(("Request rate configured (RPS):", record["request_rate"]))
    rows += [
        ("Benchmark duration (s):", record["duration"]),
        ("Total input tokens:", record["total_input_tokens"]),
        *([("Cached input tokens:", cached)] if (cached := record["total_cached_tokens"]) else []),
        ("Total generated tokens:", record["total_output_tokens"]),
        ("Request throughput (req/s):", record["request_throughput"]),
    ]
    if record["request_goodput"] is not None:
        rows.append(("Request goodput (req/s):", record["request_goodput"]))
    rows += [
        ("Output token throughput (tok/s):", record["output_throughput"]),
        ("Total Token throughput (tok/s):", record["total_token_throughput"]),
        ("Peak concurrent requests:", record["max_concurrent_requests"]),
    ]
    lines += map(_row, rows)
    for name, (short, title) in _METRICS.items():
        lines.append(f"{title:-^{_WIDTH}}")
        for which, key in (("Mean", "mean"), ("Median", "median"), ("P99", "p99")):
            lines.append(_row((f"{which} {short} (ms):", record[f"{key}_{name}_ms"])))
    return "\n".join([*lines, "=" * _WIDTH])


def _row(row: tuple[str, Any]) -> str:
    label, value = row
    text = "-" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label:<40} {text:<9}".rstrip()


def _spread(name: str, values: np.ndarray) -> dict[str, float | None]:
    """None throughout if there was nothing to measure."""
    numbers: list[float | None] = [None] * 4
    if len(values):
        numbers = [
            float(values.mean()),
            float(np.median(values)),
            float(values.std()),
            float(np.percentile(values, 99)),
        ]
    return {f"{key}_{name}_ms": number for key, number in zip(("mean", "median", "std", "p99"), numbers, strict=True)}


def _keeps(outcome: Outcome, limits: Mapping[str, float]) -> bool:
    """A request of one token has no time per token, and keeps any."""
    times = {"ttft": outcome.first_s, "tpot": outcome.per_token_s, "e2el": outcome.whole_s}
    return all(1e3 * (times[name] or 0.0) <= limit for name, limit in limits.items())


def _most_at_once(outcomes: Sequence[Outcome]) -> int:
    edges = sorted([(o.began_s, 1) for o in outcomes] + [(o.began_s + o.whole_s, -1) for o in outcomes])
    now = most = 0
    for _, change in edges:
        now += change
        most = max(most, now)
    return most
