"""Tokens per second of several engines over the same requests, in turns, so that a machine's drift meets all."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from cpu_attention import available_cores, cpu_name
from fastdecode import __version__
from fastdecode.benchmark.engines import BenchEngine, Run
from fastdecode.benchmark.workload import BenchRequest


def measure_throughput(
    engines: Sequence[BenchEngine],
    requests: Sequence[BenchRequest],
    *,
    repeats: int,
    workload: dict[str, Any],
    on_progress: Callable[[str], None],
) -> list[dict[str, Any]]:
    """A record per engine: what ran where, and what came out.  A round before the first warms everything up."""
    runs: dict[str, list[Run]] = {engine.name: [] for engine in engines}
    for number in range(repeats + 1):
        for engine in engines:
            run = engine.run(requests)
            if number:
                runs[engine.name].append(run)
            label = f"round {number} of {repeats}" if number else "warm-up"
            on_progress(f"{label}: {engine.name}: {run.seconds:.2f} s, of it prefill {run.prefill_seconds:.2f} s")
    on_progress(f"the same tokens from all engines that tell theirs: {_same_tokens([r[-1] for r in runs.values()])}")
    return [make_record(engine, runs[engine.name], requests, workload) for engine in engines]


def make_record(
    engine: BenchEngine, runs: Sequence[Run], requests: Sequence[BenchRequest], workload: dict[str, Any]
) -> dict[str, Any]:
    """Rates are those of the medians.  decode: what a run takes beyond its prefill, which gives one token each."""
    seconds = statistics.median(run.seconds for run in runs)
    prefill_seconds = statistics.median(run.prefill_seconds for run in runs)
    input_tokens = sum(len(request.prompt_token_ids) for request in requests)
    output_tokens = sum(request.output_len for request in requests)
    decoded, decode_seconds = output_tokens - len(requests), seconds - prefill_seconds
    return {
        "kind": "throughput",
        "backend": engine.name,
        "settings": engine.settings,
        "workload": {**workload, "input_tokens": input_tokens, "output_tokens": output_tokens},
        "requests_per_s": len(requests) / seconds,
        "total_tokens_per_s": (input_tokens + output_tokens) / seconds,
        "output_tokens_per_s": output_tokens / seconds,
        "prefill_tokens_per_s": input_tokens / prefill_seconds,
        "decode_tokens_per_s": decoded / decode_seconds if decoded and decode_seconds > 0 else None,
        "seconds": [run.seconds for run in runs],
        "prefill_seconds": [run.prefill_seconds for run in runs],
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cores": len(available_cores()),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "fastdecode": __version__,
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "load_average": round(os.getloadavg()[0], 2),
    }


def format_table(records: Sequence[dict[str, Any]]) -> str:
    """Rates of each engine, in tokens/s; in brackets how many times that the first one reaches."""
    columns = ("prefill_tokens_per_s", "decode_tokens_per_s", "output_tokens_per_s")
    lines = [" ".join([f"{'tokens/s':14}", *(f"{name.split('_')[0]:>16}" for name in columns)])]
    for record in records:
        cells = [f"{record['backend']:14}"]
        for name in columns:
            rate, first = record[name], records[0][name]
            cells.append(f"{rate:8.0f} ({first / rate:4.2f}x)" if rate and first else f"{'-':>16}")
        lines.append(" ".join(cells))
    return "\n".join(lines)


def latency_record(
    engine: BenchEngine, runs: Sequence[Run], output_len: int, workload: dict[str, Any]
) -> dict[str, Any]:
    """Of one batch, served again and again: seconds to its end, and what a token takes after the first."""
    seconds = sorted(run.seconds for run in runs)
    per_token = [(run.seconds - run.prefill_seconds) / max(1, output_len - 1) for run in runs]
    percentiles = {str(p): seconds[min(len(seconds) - 1, len(seconds) * p // 100)] for p in (10, 50, 90, 99)}
    return {
        "kind": "latency",
        "backend": engine.name,
        "settings": engine.settings,
        "workload": workload,
        "mean_s": statistics.mean(seconds),
        "percentiles_s": percentiles,
        "first_token_s": statistics.median(run.prefill_seconds for run in runs),
        "per_token_s": statistics.median(per_token),
        "machine": machine(),
    }


def format_latency(record: dict[str, Any]) -> str:
    lines = [f"mean latency {record['mean_s']:.4f} s"]
    lines += [f"{percentile:>3} % of batches within {s:.4f} s" for percentile, s in record["percentiles_s"].items()]
    first_ms, next_ms = record["first_token_s"] * 1e3, record["per_token_s"] * 1e3
    lines.append(f"first token {first_ms:.1f} ms, then {next_ms:.2f} ms a token")
    return "\n".join(lines)


def _same_tokens(runs: Sequence[Run]) -> str:
    told = [run.token_ids for run in runs if run.token_ids is not None]
    if len(told) < 2:
        return "fewer than two tell"
    same = sum(all(tokens == lines[0] for tokens in lines) for lines in zip(*told, strict=True))
    return f"{same} of {len(told[0])} requests"
