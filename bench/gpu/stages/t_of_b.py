"""T(B): seconds of the S-Part for B tokens, as the S-worker runs it, between two floors of the same run.

    T(B)         a forward of `SWorker`, every attention answered at once; forwards behind one another
    products     its linear layers alone on as many rows, as one CUDA graph
    bandwidth    the bytes of their weights over the rate of a copy within the device's memory

The model has a few layers; a layer's time is that from attention to attention, and T(B) of all layers of the whole
model is scaled from it: T + (32 - measured layers) x layer.  The larger floor is scaled likewise.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import fastdecode  # noqa: F401 (before torch, see there)

# isort: split
import torch
import torch.nn.functional as F
from torch import nn

from bench.gpu import stack
from bench.gpu.report import Report, arguments
from bench.gpu.timing import REPEATS, call_seconds, copy_rate, product_rate, synchronise, without_gaps
from gpu_sworker import AttentionCall, FlatBatch, SWorker

_BATCHES, _TINY_BATCHES = (1024, 1, 64, 256, 16, 512, 4), (8, 1)  # the goal's first
_GOAL_BATCH = 1024
_POINT_SECONDS = 2.0


def main(args: argparse.Namespace) -> None:
    with Report("t_of_b", args) as report:
        copied = copy_rate(report.device)
        dtype = torch.float32 if report.is_dry else torch.bfloat16
        report.add(copy_gb_per_s=copied / 1e9, product_tflop_per_s=product_rate(report.device, dtype) / 1e12)
        for name in stack.NAMES:
            with report.surviving(name):
                _measure_model(report, name, copied)


def _measure_model(report: Report, name: str, copied: float) -> None:
    sworker = stack.load(name, report.args.work, report.is_dry)
    layers, heads = stack.linears(sworker)
    num_layers = len(sworker.facts.layers)
    more = stack.WHOLE_LAYERS - num_layers
    layer_bytes = sum(linear.weight.nbytes for linear in layers) / num_layers
    head_bytes = sum(linear.weight.nbytes for linear in heads)
    for batch in _TINY_BATCHES if report.is_dry else _BATCHES:
        if not report.has_time(f"{name}, B = {batch}", 0 if report.is_dry else _POINT_SECONDS):
            continue
        with report.surviving(f"{name}, B = {batch}"), sworker.inference():
            whole, layer = _forward_seconds(sworker, batch)
            of_layers, of_heads = (_product_seconds(some, batch, report.device) for some in (layers, heads))
            products, scaled_products = of_layers + of_heads, of_layers * stack.WHOLE_LAYERS / num_layers + of_heads
            bandwidth = (num_layers * layer_bytes + head_bytes) / copied
            scaled_bandwidth = (stack.WHOLE_LAYERS * layer_bytes + head_bytes) / copied
            scaled, scaled_floor = whole + more * layer, max(scaled_products, scaled_bandwidth)
            report.add(
                model=name, batch=batch, seconds=whole, layer_seconds=layer, products_seconds=products,
                bandwidth_seconds=bandwidth, over_floor=whole / max(products, bandwidth), scaled_seconds=scaled,
                scaled_floor_seconds=scaled_floor, scaled_over_floor=scaled / scaled_floor,
            )  # fmt: skip
            if batch in (_GOAL_BATCH, _TINY_BATCHES[0]):
                report.hold(
                    f"{name}: T({batch}) of {stack.WHOLE_LAYERS} layers, scaled from {num_layers}, over its floor",
                    scaled / scaled_floor, "", roof=1.0, at_most=1.3,
                    note=f"{1e3 * scaled:.2f} ms, floor {1e3 * scaled_floor:.2f} ms: products "
                    f"{1e3 * scaled_products:.2f}, bandwidth {1e3 * scaled_bandwidth:.2f}",
                )  # fmt: skip


def _forward_seconds(sworker: SWorker, batch: int) -> tuple[float, float]:
    """Of a forward, and of one of its layers."""
    o, tokens = stack.made_up_o(sworker, batch), stack.decode_batch(batch)
    whole = call_seconds(lambda: stack.run_forward(sworker, tokens, lambda call: o), sworker.device)
    return whole, statistics.median(_layer_seconds(sworker, tokens, o) for _ in range(REPEATS))


def _layer_seconds(sworker: SWorker, tokens: FlatBatch, o: torch.Tensor) -> float:
    """From the first attention to the last one, by the number of layers between."""
    if sworker.device.type == "cuda":
        events: list[torch.cuda.Event] = []

        def answer(call: AttentionCall) -> torch.Tensor:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()
            return o

        stack.run_forward(sworker, tokens, answer)
        synchronise(sworker.device)
        return events[0].elapsed_time(events[-1]) / 1e3 / (len(events) - 1)
    times: list[float] = []

    def note(call: AttentionCall) -> torch.Tensor:
        times.append(time.perf_counter())
        return o

    stack.run_forward(sworker, tokens, note)
    return (times[-1] - times[0]) / (len(times) - 1)


def _product_seconds(linears: list[nn.Linear], batch: int, device: torch.device) -> float:
    """Of all of them once, on rows of random numbers."""
    weight = linears[0].weight
    widths = {linear.in_features for linear in linears}
    rows = {width: torch.randn(batch, width, device=device).to(weight.dtype) for width in widths}

    def multiply() -> None:
        for linear in linears:
            F.linear(rows[linear.in_features], linear.weight, linear.bias)

    return call_seconds(without_gaps(multiply, device), device)


if __name__ == "__main__":
    main(arguments(__doc__))
