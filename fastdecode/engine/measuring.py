"""How long the workers at hand take: T(B), R, the link and the device's reading, for the performance model.

T(B)   the S-Part's seconds of a block: whole forwards of B tokens, every attention answered at once, divided by
       the layers; so with the embedding and the LM head in it
R      an R-worker's seconds per KV token and block: decode steps over sequences that get longer from round to
       round, all R-workers at a time; the slope of their time over the KV they read, the intercept is the wire
row    what a row takes there and back: the same steps with fewer sequences of the same length
device the same two numbers as R's, of attention to KV on the S-worker's device, if it keeps some

He & Zhai 2024, section 4.3; an emulated S-worker says its T(B) itself, and its device's reading.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from fastdecode.engine.runtime import Runtime
from fastdecode.errors import ConfigError
from fastdecode.holders.device import DeviceHolder
from fastdecode.modelling.emulation import PREFIX
from fastdecode.modelling.perf_model import PerfModel
from fastdecode.modelling.simulation.devices import MEMORY
from fastdecode.scheduling.parts import DEVICE
from fastdecode.scheduling.plan import Admission, Segment, Step
from gpu_sworker import AttentionCall, AttentionSpec, EmulatedSWorker, FlatBatch, SWorker

logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_REPEATS = 5
_ROUNDS = 4  # lengths at which the R-Part is measured
_LONGEST = 1024  # tokens
_SEQUENCES = 16  # per R-worker, and on the device
_FEW = 4  # of them
_LONGEST_ON_GPU = 16384  # tokens: less is read within the time of a launch
_ATTEMPTS = 3  # at a slope, which a busy machine may turn round


def measure(
    runtime: Runtime, batches: Sequence[int], on_progress: Callable[[str], None], most_logits: int = 1 << 30
) -> PerfModel:
    """batches: of T(B), rising; on_progress: told a line for every measurement; most_logits: rows that have some, for
    the other tokens of a large batch are prompts'.  Raises ConfigError, RWorkerError.
    """
    num_layers = len(runtime.sworker.facts.layers)
    seconds = []
    for batch in batches:
        seconds.append(s_seconds(runtime.sworker, batch, most_logits))
        on_progress(f"T({batch}) = {seconds[-1] * 1e6:.0f} us a block")
    kv_token_seconds, fixed, row = _again(lambda: r_seconds(runtime, on_progress))
    model = PerfModel.measured(batches, seconds, kv_token_seconds, num_layers, fixed)
    model = replace(model, r_row_seconds=row)
    if runtime.device:
        device = runtime.device
        of_token, of_call = _again(lambda: device_seconds(runtime, device))
        on_progress(f"the device: {of_call * 1e6:.0f} us a block, {of_token * 1e9:.2f} ns per KV token")
        model = replace(model, device_kv_token_seconds=of_token, device_fixed_seconds=of_call)
    runtime.rpool.totals.begin_anew()
    return model


def _again(action: Callable[[], _Result]) -> _Result:
    """A few times, if it has to be.  Raises ConfigError as the last one did."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return action()
        except NoSlope:
            logger.info("more KV took no longer to read: measured again")
    return action()


class NoSlope(ConfigError):
    """Time did not grow with what was read."""

    def __init__(self, who: str) -> None:
        super().__init__(
            f"{who} took no longer for more KV: this machine is too busy to be measured, or all layers of the model "
            "look at few tokens; try again, or set placement=device-first"
        )


def s_seconds(sworker: SWorker | EmulatedSWorker, batch: int, most_logits: int = 1 << 30) -> float:
    """T(batch), the median of some forwards."""
    if isinstance(sworker, EmulatedSWorker):
        return sworker.block_seconds(batch)
    flat = FlatBatch(np.full(batch, 1, np.int64), np.zeros(batch, np.int64), np.arange(min(batch, most_logits)))
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


def r_seconds(runtime: Runtime, on_progress: Callable[[str], None]) -> tuple[float, float, float]:
    """R; the seconds of a block's R-Part that depend neither on the load nor on the rows; and those of a row."""
    num_workers = len(runtime.welcomes)
    longest = _longest(runtime, min(w.num_blocks for w in runtime.welcomes), "kv_cache_memory")
    growth = longest // _ROUNDS - 2 * _REPEATS - 2
    seq_ids = range(_SEQUENCES * num_workers)
    places = {seq_id: seq_id % num_workers for seq_id in seq_ids}
    few = seq_ids[: _FEW * num_workers]
    runtime.rpool.admit([Admission(seq_id, places[seq_id], longest) for seq_id in seq_ids])
    lengths, loads, taken, with_few = dict.fromkeys(seq_ids, 0), [], [], []

    def step(ids: Sequence[int], num_tokens: int, prompt_tokens: int) -> float:
        segments = [Segment(i, places[i], lengths[i], (1,) * num_tokens, prompt_tokens) for i in ids]
        lengths.update({i: lengths[i] + num_tokens for i in ids})
        return _r_step(runtime, segments)

    def median(ids: Sequence[int]) -> float:
        times = [step(ids, 1, 0) for _ in range(_REPEATS + 1)]
        return statistics.median(times[1:]) / len(runtime.sworker.facts.layers)

    try:
        for number in range(_ROUNDS):
            step(seq_ids, growth, longest)
            taken.append(median(seq_ids))
            loads.append(sum(lengths[i] for i in seq_ids) / num_workers)
            with_few.append(median(few))
            on_progress(f"R-Part of {loads[number]:.0f} KV tokens each: {taken[number] * 1e6:.0f} us a block")
    finally:
        for seq_id in seq_ids:
            runtime.rpool.release({places[seq_id]: [seq_id]})
    slope, intercept = np.polyfit(loads, taken, 1)
    if slope <= 0:
        raise NoSlope("the R-Part")
    less_load = [load * (1 - _FEW / _SEQUENCES) for load in loads]
    of_rows = [whole - part - slope * less for whole, part, less in zip(taken, with_few, less_load, strict=True)]
    num_rows = (_SEQUENCES - _FEW) * num_workers
    row = min(max(0.0, statistics.median(of_rows) / num_rows), max(0.0, intercept) / len(seq_ids))
    return float(slope), max(0.0, float(intercept) - row * len(seq_ids)), float(row)


def device_seconds(runtime: Runtime, device: DeviceHolder) -> tuple[float, float]:
    """Of attention to KV on the S-worker's device: a token's, and of a call, whatever it reads."""
    facts = runtime.sworker.facts
    if facts.device.startswith(PREFIX):
        memory = MEMORY[facts.device.removeprefix(PREFIX)]
        of_call = memory.attention_seconds(0)
        token_bytes = runtime.layout.token_bytes / len(facts.layers)
        return memory.attention_seconds(token_bytes) - of_call, of_call
    most = _LONGEST if facts.device == "cpu" else _LONGEST_ON_GPU
    longest = _longest(runtime, device.num_blocks, "device_kv_memory", most)
    growth = longest // _ROUNDS - _REPEATS - 1
    length, loads, taken = 0, [], []
    device.admit([Admission(seq_id, DEVICE, longest) for seq_id in range(_SEQUENCES)])
    try:
        for _ in range(_ROUNDS):
            whole = [Segment(i, DEVICE, length, (1,) * growth, longest) for i in range(_SEQUENCES)]
            _device_step(runtime, device, whole)
            length += growth
            times = []
            for _ in range(_REPEATS + 1):
                rows = [Segment(i, DEVICE, length, (1,), 0) for i in range(_SEQUENCES)]
                times.append(_device_step(runtime, device, rows))
                length += 1
            loads.append(_SEQUENCES * length)
            taken.append(statistics.median(times[1:]) / len(facts.layers))
    finally:
        device.forget_all()
    slope, intercept = np.polyfit(loads, taken, 1)
    if slope <= 0:
        raise NoSlope("the device")
    return float(slope), max(0.0, float(intercept))


def _longest(runtime: Runtime, num_blocks: int, option: str, most: int = _LONGEST) -> int:
    """Of the sequences to measure with, on a holder of so many blocks.  Raises ConfigError."""
    longest = min(most, num_blocks // _SEQUENCES * runtime.layout.block_tokens)
    least = _ROUNDS * (2 * _REPEATS + 10)
    if longest < least:
        raise ConfigError(
            f"too little KV to measure with: each holder needs room for {_SEQUENCES} sequences of {least} tokens; "
            f"raise {option}"
        )
    return longest


def _r_step(runtime: Runtime, segments: list[Segment]) -> float:
    """Seconds of the R-Part of all layers."""
    rpool, step = runtime.rpool, Step.of(segments)
    arrays = [_made_up(spec, len(step.decodes), step.num_tokens) for spec in runtime.sworker.facts.layers]
    began = time.perf_counter()
    ticket = rpool.begin(step)
    for q, kv in arrays:
        rpool.submit(ticket, q, kv, kv)
        rpool.collect(ticket, lambda _, o: None)
    return time.perf_counter() - began


def _device_step(runtime: Runtime, device: DeviceHolder, segments: list[Segment]) -> float:
    """Seconds of the device's attention in all layers."""
    sworker, step = runtime.sworker, Step.of(segments)
    assert isinstance(sworker, SWorker)
    made: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # the same numbers in layers alike
    calls = []
    for layer, spec in enumerate(sworker.facts.layers):
        shape = spec.num_q_heads, spec.num_kv_heads, spec.head_dim
        if shape not in made:
            rows = partial(torch.randn, dtype=sworker.dtype, device=sworker.device)
            made[shape] = (
                rows(step.num_tokens, spec.num_q_heads, spec.head_dim),
                rows(step.num_tokens, spec.num_kv_heads, spec.head_dim),
            )
        q, kv = made[shape]
        calls.append(AttentionCall(layer, q, kv, kv, spec.scale, spec.softcap, None, spec.window, None, True, ()))
    if sworker.device.type != "cpu":
        torch.cuda.synchronize(sworker.device)
    began = time.perf_counter()
    held = device.begin(step)
    for call in calls:
        for _, o in device.attend(held, call):
            last = o
    if step.decodes.seq_ids.size:
        last[:1].cpu()  # waits for a GPU
    return time.perf_counter() - began


def _made_up(spec: AttentionSpec, num_queries: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """q, and k and v."""
    generator = np.random.default_rng(0)
    q = generator.standard_normal((num_queries, spec.num_q_heads, spec.head_dim), np.float32)
    return q, generator.standard_normal((num_tokens, spec.num_kv_heads, spec.head_dim), np.float32)
