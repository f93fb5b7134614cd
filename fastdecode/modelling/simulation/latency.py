"""Times of served requests in the field's terms.  Pure.

    TTFT   arrival to first token                    ITL    from one token to the next, of all requests
    TPOT   mean ITL of a request                     E2E    arrival to last token

Seconds throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from fastdecode.modelling.simulation.simulator import Served, Simulation

_EMA_SPAN = 16  # of FastGen's benchmark: alpha = 2 / (span + 1), adjusted at the beginning
_PROMPT_TOKENS_PER_S = 512  # of FastGen's: the first token is due after prompt_tokens / this


@dataclass(frozen=True)
class Spread:
    """None throughout if there was nothing to measure."""

    mean: float | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Spread:
        if not len(values):
            return cls(None, None, None, None, None)
        return cls(float(np.mean(values)), *(float(q) for q in np.percentile(values, [50, 90, 95, 99])))


def inter_token_gaps(served: Sequence[Served]) -> np.ndarray:
    """Of all requests behind one another."""
    return np.concatenate([np.diff(one.tokens) for one in served] or [np.zeros(0)])


def keeps_rate(one: Served, tokens_per_s: float) -> bool:
    """FastGen's service level: the first token in time for its prompt, and from then on the moving average of the gaps
    never above 1 / tokens_per_s."""
    if one.refused or one.tokens[0] - one.arrived > one.job.prompt_tokens / _PROMPT_TOKENS_PER_S:
        return False
    decay, top, bottom = 1 - 2 / (_EMA_SPAN + 1), 0.0, 0.0
    for gap in np.diff(one.tokens):
        top, bottom = decay * top + gap, decay * bottom + 1
        if top / bottom > 1 / tokens_per_s:
            return False
    return True


def effective_throughput(simulation: Simulation, tokens_per_s: float) -> float:
    """Requests per second that keep the service level."""
    kept = sum(keeps_rate(one, tokens_per_s) for one in simulation.served)
    return kept / simulation.seconds if kept else 0.0


def summary(simulation: Simulation, max_kv_load: int | None = None) -> dict[str, object]:
    """Plain numbers for JSON.  Raises ValueError if no job was served."""
    done = [one for one in simulation.served if not one.refused]
    if not done:
        raise ValueError("no job was served")
    steps = simulation.steps
    seconds = np.array([record.seconds for record in steps])
    loads = np.array([record.load for record in steps])
    running = np.array([record.num_running for record in steps])
    kv = np.array([record.kv_tokens for record in steps], float)
    output = sum(one.job.output_tokens for one in done)
    result: dict[str, object] = {
        "requests": len(done),
        "refused": len(simulation.served) - len(done),
        "seconds": simulation.seconds,
        "steps": len(steps),
        "output_tokens_per_s": output / simulation.seconds,
        "requests_per_s": len(done) / simulation.seconds,
        "peak_load": int(loads.max()),
        "peak_device_kv": max(record.device_kv_tokens for record in steps),
        "mean_load": float((loads * seconds).sum() / seconds.sum()),
        "mean_running": float((running * seconds).sum() / seconds.sum()),
        "preemptions": sum(one.num_preemptions for one in done),
        "r_worker_imbalance": float(kv.max(1).sum() * kv.shape[1] / kv.sum()) if kv.sum() else 1.0,
        "step_s": asdict(Spread.of(seconds)),
        "ttft_s": asdict(Spread.of([one.tokens[0] - one.arrived for one in done])),
        "tpot_s": asdict(Spread.of([float(np.diff(one.tokens).mean()) for one in done if len(one.tokens) > 1])),
        "itl_s": asdict(Spread.of(inter_token_gaps(done))),
        "e2e_s": asdict(Spread.of([one.tokens[-1] - one.arrived for one in done])),
    }
    if max_kv_load is not None:
        result["steps_over_limit"] = int((loads > max_kv_load).sum())
    return result
