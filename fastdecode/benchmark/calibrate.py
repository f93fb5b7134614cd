"""Measures T(B) and R of a model on the workers at hand, for the performance model (the paper's section 4.3).

T(B)   the S-Part's seconds of a block: whole forwards of B tokens, every attention answered at once, divided by
       the layers; so with the embedding and the LM head in it
R      an R-worker's seconds per KV token and block: decode steps over sequences that get longer from round to
       round, all R-workers at a time; the slope of their time over the KV they read, the intercept is the wire
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from cpu_attention import cpu_name
from fastdecode.engine.config import EngineConfig
from fastdecode.engine.runtime import Runtime, open_runtime
from fastdecode.errors import ConfigError
from fastdecode.modelling.calibration import Calibration
from fastdecode.modelling.perf_model import PerfModel
from fastdecode.scheduling.plan import Admission, Segment, Step
from gpu_sworker import EmulatedSWorker, FlatBatch, SWorker

_REPEATS = 5
_ROUNDS = 4  # lengths at which the R-Part is measured
_LONGEST = 1024  # tokens
_SEQUENCES = 16  # per R-worker


def calibrate_model(config: EngineConfig, largest_batch: int, on_progress: Callable[[str], None]) -> Calibration:
    """largest_batch: of a micro-batch, tokens; on_progress: told a line for every measurement.

    Raises ConfigError (options, too little KV), ModelError, RWorkerError.
    """
    if not config.num_r_workers:
        raise ConfigError("a calibration is of S- and R-Part; with num_r_workers=0 there is no R-Part to measure")
    runtime = open_runtime(config)
    try:
        return _calibrate(runtime, largest_batch, on_progress)
    finally:
        runtime.close()


def _calibrate(runtime: Runtime, largest_batch: int, on_progress: Callable[[str], None]) -> Calibration:
    batches = [1 << i for i in range(largest_batch.bit_length())]
    if batches[-1] != largest_batch:
        batches.append(largest_batch)
    seconds = []
    for batch in batches:
        seconds.append(s_seconds(runtime.sworker, batch))
        on_progress(f"T({batch}) = {seconds[-1] * 1e6:.0f} us a block")
    kv_token_seconds, fixed = r_seconds(runtime, on_progress)
    facts = runtime.sworker.facts
    return Calibration(
        model=facts.model_type,
        device=torch.cuda.get_device_name() if facts.device.startswith("cuda") else cpu_name(),
        dtype=facts.dtype,
        kv_dtype=runtime.layout.dtype,
        host=platform.node(),
        num_r_workers=len(runtime.welcomes),
        r_worker_threads=runtime.welcomes[0].num_threads,
        date=time.strftime("%Y-%m-%d"),
        perf_model=PerfModel.measured(batches, seconds, kv_token_seconds, len(facts.layers), fixed),
    )


def s_seconds(sworker: SWorker | EmulatedSWorker, batch: int) -> float:
    """T(batch), the median of some forwards."""
    flat = FlatBatch(np.full(batch, 1, np.int64), np.zeros(batch, np.int64), np.arange(batch, dtype=np.int64))
    taken = []
    with sworker.inference():
        for _ in range(_REPEATS + 1):
            forward = sworker.forward(flat)
            began = time.perf_counter()
            try:
                call = next(forward)
                while True:
                    call = forward.send(torch.zeros_like(call.q))
            except StopIteration as end:
                end.value.cpu()  # waits for a GPU
            taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:]) / len(sworker.facts.layers)


def r_seconds(runtime: Runtime, on_progress: Callable[[str], None]) -> tuple[float, float]:
    """R, and the seconds of a block's R-Part that do not depend on the load."""
    longest = min(_LONGEST, min(w.num_blocks for w in runtime.welcomes) // _SEQUENCES * runtime.layout.block_tokens)
    growth = longest // _ROUNDS - _REPEATS - 1
    if growth < 8:
        raise ConfigError(
            f"too little KV to calibrate with: every R-worker needs room for {_SEQUENCES} sequences of "
            f"{_ROUNDS * (_REPEATS + 9)} tokens; raise kv_cache_memory"
        )
    seq_ids = range(_SEQUENCES * len(runtime.welcomes))
    places = {seq_id: seq_id % len(runtime.welcomes) for seq_id in seq_ids}
    runtime.rpool.admit([Admission(seq_id, places[seq_id], longest) for seq_id in seq_ids])
    length, loads, taken = 0, [], []
    try:
        for number in range(_ROUNDS):
            run_step(runtime, [Segment(i, places[i], length, (1,) * growth, longest) for i in seq_ids])
            length += growth
            times = []
            for _ in range(_REPEATS + 1):
                times.append(run_step(runtime, [Segment(i, places[i], length, (1,), 0) for i in seq_ids]))
                length += 1
            loads.append(_SEQUENCES * length)
            taken.append(statistics.median(times[1:]) / len(runtime.sworker.facts.layers))
            on_progress(f"R-Part of {loads[number]} KV tokens each: {taken[number] * 1e6:.0f} us a block")
    finally:
        for seq_id in seq_ids:
            runtime.rpool.release({places[seq_id]: [seq_id]})
    slope, intercept = np.polyfit(loads, taken, 1)
    if slope <= 0:
        raise ConfigError("the R-Part took no longer for more KV: this machine is too busy to be measured; try again")
    return float(slope), max(0.0, float(intercept))


def run_step(runtime: Runtime, segments: list[Segment]) -> float:
    """Seconds of the R-Part of all layers."""
    rpool, facts = runtime.rpool, runtime.sworker.facts
    step = Step.of(segments)
    generator = np.random.default_rng(0)
    arrays = [
        tuple(
            generator.standard_normal((rows, heads, spec.head_dim), np.float32)
            for rows, heads in ((len(step.decodes), spec.num_q_heads), (step.num_tokens, spec.num_kv_heads))
        )
        for spec in facts.layers
    ]
    began = time.perf_counter()
    ticket = rpool.begin(step)
    for q, kv in arrays:
        rpool.submit(ticket, q, kv, kv)
        rpool.collect(ticket, lambda _, o: None)
    return time.perf_counter() - began
