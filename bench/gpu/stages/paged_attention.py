"""The Triton kernel over the paged store: against the plain definition, and how fast it reads K and V.

Rates count the bytes of K and V that a decode of every sequence reads once, beside a copy within the device's memory
in the same run (its bytes read and written).  `kernel` is a CUDA graph of calls, so that no launch is waited for,
`called` the same calls one by one from Python.  Calls take turns over blocks so many that no cache holds them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import fastdecode  # noqa: F401 (before torch, see there)

# isort: split
import torch

from bench.gpu.report import Report, arguments
from bench.gpu.timing import call_seconds, copy_rate, without_gaps
from gpu_sworker import AttentionSpec
from gpu_sworker.paged_attention import PagedAttention, attend_by_kernel, attend_paged_plainly, paged_kernel

_BLOCK_TOKENS = 64
_SHAPES = ((32, 8, 128), (32, 32, 128))  # query heads, KV heads, head_dim
_CONTEXTS, _BATCHES = (512, 2048, 16384), (16, 64, 256)
_TINY_SHAPES, _TINY_CONTEXTS, _TINY_BATCHES = ((4, 2, 16), (4, 4, 16)), (40, 200), (3,)
_POOL_SHARE = 0.6  # of the free memory, for K and V
_CACHE_TIMES = 4  # so many times its size is read before a block comes again
_MOST_SETS = 32
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # ‖o - reference‖ / ‖reference‖
_POINT_SECONDS = 2.0


def main(args: argparse.Namespace) -> None:
    with Report("paged_attention", args) as report, torch.inference_mode():
        dtype = torch.float32 if report.is_dry else torch.bfloat16
        attend: PagedAttention = attend_by_kernel or attend_paged_plainly  # in a dry run whatever is there
        if not report.is_dry:
            in_use = [paged_kernel(report.device, dtype, _spec(shape)) is not None for shape in _SHAPES]
            report.hold("kernel in use for these heads", float(all(in_use)), "share", at_least=1.0, is_of_speed=False)
            if attend_by_kernel is None:
                raise RuntimeError("there is no Triton here, or one that does not fit: nothing to measure")
        _check(report, attend, dtype)
        copied = copy_rate(report.device)
        shapes, contexts, batches = (
            (_TINY_SHAPES, _TINY_CONTEXTS, _TINY_BATCHES) if report.is_dry else (_SHAPES, _CONTEXTS, _BATCHES)
        )
        for shape in shapes:
            with report.surviving(f"heads {shape}"):
                _measure_heads(report, attend, dtype, shape, list(itertools.product(contexts, batches)), copied)


def _spec(shape: tuple[int, int, int], window: int | None = None, softcap: float | None = None) -> AttentionSpec:
    return AttentionSpec(*shape, shape[2] ** -0.5, window, softcap, None)


def _check(report: Report, attend: PagedAttention, dtype: torch.dtype) -> None:
    """Over sequences of many lengths, an empty one among them, in blocks that lie anywhere."""
    shapes, most, batch = (_TINY_SHAPES, 150, 5) if report.is_dry else (_SHAPES, 3000, 24)
    generator = torch.Generator(report.device).manual_seed(1)
    worst = 0.0
    for shape, (window, softcap) in itertools.product(shapes, ((None, None), (100, None), (None, 20.0))):
        spec = _spec(shape, window, softcap)
        max_blocks = -(-most // _BLOCK_TOKENS)
        with report.device:
            lengths = torch.randint(1, most, (batch,), generator=generator, dtype=torch.int32)
            lengths[:3] = torch.tensor([1, 0, most], dtype=torch.int32)
            tables = torch.randperm(batch * max_blocks, generator=generator).to(torch.int32).view(batch, max_blocks)
            q = torch.randn(batch, shape[0], shape[2], generator=generator).to(dtype)
            data = torch.randn(2, tables.numel(), _BLOCK_TOKENS, *shape[1:], generator=generator).to(dtype)
        got, expected = (way(q, data, tables, lengths, spec) for way in (attend, attend_paged_plainly))
        error = float((got.o.double() - expected.o.double()).norm() / expected.o.double().norm())
        sums = torch.isfinite(expected.lse)
        lse_error = float((got.lse[sums].double() - expected.lse[sums].double()).abs().max())
        assert torch.equal(torch.isfinite(got.lse), sums), "the same queries see no key at all"
        report.add(check=f"heads {shape}, window {window}, softcap {softcap}", error=error, lse_error=lse_error)
        worst = max(worst, error) if error == error else float("inf")
    report.hold(
        "kernel against the plain definition: relative error of o", worst, "", at_most=_TOLERANCE[dtype],
        is_of_speed=False,
    )  # fmt: skip


def _measure_heads(
    report: Report,
    attend: PagedAttention,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    points: list[tuple[int, int]],
    copied: float,
) -> None:
    """points: (context, batch)."""
    device, spec = report.device, _spec(shape)
    token_bytes = 2 * shape[1] * shape[2] * dtype.itemsize
    block_bytes = _BLOCK_TOKENS * token_bytes
    cache_bytes = 0 if report.is_dry else torch.cuda.get_device_properties(device).L2_cache_size

    def num_sets(context: int, batch: int) -> int:
        return max(1, min(_MOST_SETS, -(-_CACHE_TIMES * cache_bytes // (context * batch * token_bytes))))

    def num_blocks(context: int, batch: int) -> int:
        return batch * -(-context // _BLOCK_TOKENS) * num_sets(context, batch)

    free = (1 << 30) if report.is_dry else _free_bytes(device)
    room = int(_POOL_SHARE * free) // block_bytes
    fitting = [point for point in points if num_blocks(*point) <= room]
    report.left_out += [f"heads {shape}, {p}: K and V do not fit the device" for p in points if p not in fitting]
    pool = max(num_blocks(*point) for point in fitting)
    data = torch.empty(2, pool, _BLOCK_TOKENS, *shape[1:], dtype=dtype, device=device)
    for half in data:
        for blocks in half.split(1 << 12):
            blocks.normal_()
    generator = torch.Generator().manual_seed(2)
    shares = {}
    for context, batch in fitting:
        name = f"heads {shape}, context {context}, batch {batch}"
        if not report.has_time(name, 0 if report.is_dry else _POINT_SECONDS):
            continue
        with report.surviving(name):
            sets, in_use = num_sets(context, batch), num_blocks(context, batch)
            tables = torch.randperm(in_use, generator=generator).to(torch.int32).view(sets, batch, -1).to(device)
            lengths = torch.full((batch,), context, dtype=torch.int32, device=device)
            q = torch.randn(batch, shape[0], shape[2], device=device).to(dtype)
            attend_all = partial(_attend_all, attend, q, data, tables, lengths, spec)
            read = sets * batch * context * token_bytes
            called = read / call_seconds(attend_all, device)
            kernel = read / call_seconds(without_gaps(attend_all, device), device)
            report.add(
                heads=list(shape), context=context, batch=batch, sets=sets, called_gb_per_s=called / 1e9,
                kernel_gb_per_s=kernel / 1e9, copy_gb_per_s=copied / 1e9, of_copy=kernel / copied,
                us=1e6 * batch * context * token_bytes / kernel,
            )  # fmt: skip
            shares[context, batch] = kernel / copied
    del data
    if shares:
        (context, batch), share = min(shares.items(), key=lambda item: item[1])
        report.hold(
            f"paged attention, {shape[0]} query and {shape[1]} KV heads: K and V read, over a copy, least", share,
            "of copy", roof=1.0, at_least=0.7, note=f"at context {context}, batch {batch}",
        )  # fmt: skip
        report.hold(
            f"paged attention, {shape[0]} query and {shape[1]} KV heads: largest",
            max(shares.values()),
            "of copy",
            roof=1.0,
        )


def _free_bytes(device: torch.device) -> int:
    """What torch keeps of freed memory counted in."""
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def _attend_all(
    attend: PagedAttention,
    q: torch.Tensor,
    data: torch.Tensor,
    tables: torch.Tensor,  # [sets, num_sequences, max_blocks]
    lengths: torch.Tensor,
    spec: AttentionSpec,
) -> None:
    for table in tables:
        attend(q, data, table, lengths, spec)


if __name__ == "__main__":
    main(arguments(__doc__))
