"""Prompts that attend on the S-worker's device: out of its paged store, beside torch's attention over plain tensors.

    python bench/device_attention.py [--device cuda] [--dtype bfloat16] [--memory]

torch's is `scaled_dot_product_attention`, for a chunk with `causal_lower_right`, for a window with a mask of booleans.
"in one piece": the blocks are consecutive, so K and V are views; "scattered": every other block is another sequence's,
so they are gathered.  Medians of runs in turn, of one layer; on a processor its time of one thread, which other work on
the machine does not lengthen, on a GPU wall time.  The store's time is with writing the chunk's K and V.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from gpu_sworker import AttentionSpec, DeviceKV, DeviceRows
from gpu_sworker.device_kv import token_bytes

_BLOCK_TOKENS = 64
_SHAPES = ((16, 16), (64, 64), (512, 512), (2048, 2048), (4096, 4096), (64, 16), (512, 64), (512, 256), (2048, 256),
           (4096, 64), (4096, 512), (16384, 512))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--heads", type=int, nargs=3, default=(16, 4, 64), metavar=("QUERY", "KV", "DIM"))
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 128, 1024], help="0: all keys")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="instead: most memory of a chunk of 4096 over 32,768")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    with torch.inference_mode():
        for window in args.windows:
            spec = AttentionSpec(*args.heads, args.heads[2] ** -0.5, window or None, None, None)
            if args.memory:
                print(f"window {window or 'none'}: {_most_memory(spec, dtype, device) / 2**20:.0f} MiB", flush=True)
                continue
            for num_tokens, num_queries in _SHAPES:
                if not window or window < num_tokens:
                    _compare(spec, num_tokens, num_queries, dtype, device, args.repeats)


def _compare(
    spec: AttentionSpec, num_tokens: int, num_queries: int, dtype: torch.dtype, device: torch.device, repeats: int
) -> None:
    q, k, v = _tokens(spec, num_tokens, num_queries, dtype, device)
    new = slice(num_tokens - num_queries, num_tokens)
    ways: list[Callable[[], torch.Tensor]] = [lambda: _torchs_own(q, k, v, spec)]
    for is_scattered in (False, True):
        store, rows = _filled(spec, k, v, num_queries, is_scattered)
        ways.append(partial(_write_and_attend, store, rows, q, k[new], v[new]))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for way in ways[1:]:
        torch.testing.assert_close(way(), ways[0](), atol=tolerance, rtol=tolerance)
    own, piece, scattered = _medians(ways, device, repeats)
    print(
        f"window {spec.window or 'none'}, {num_queries} queries over {num_tokens}: torch {own * 1e6:.0f} us, in one "
        f"piece x {piece / own:.2f}, scattered x {scattered / own:.2f}",
        flush=True,
    )


def _write_and_attend(
    store: DeviceKV, rows: DeviceRows, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    store.write(0, rows, k, v)
    return store.attend(0, rows, q).o


def _torchs_own(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    start, is_whole = len(k) - len(q), len(q) == len(k)
    mask = None if is_whole else causal_lower_right(len(q), len(k))
    if spec.window:
        distance = torch.arange(start, len(k), device=q.device)[:, None] - torch.arange(len(k), device=q.device)
        mask = (distance >= 0) & (distance < spec.window)
    out = F.scaled_dot_product_attention(
        *(t.transpose(0, 1)[None] for t in (q, k, v)),
        attn_mask=mask,
        is_causal=mask is None,
        scale=spec.scale,
        enable_gqa=spec.num_q_heads != spec.num_kv_heads,
    )
    return out[0].transpose(0, 1)


def _filled(
    spec: AttentionSpec, k: torch.Tensor, v: torch.Tensor, num_queries: int, is_scattered: bool
) -> tuple[DeviceKV, DeviceRows]:
    num_tokens = len(k)
    budget = (2 * num_tokens + 4 * _BLOCK_TOKENS) * token_bytes([spec], k.dtype)
    store = DeviceKV([spec], dtype=k.dtype, device=k.device, budget_bytes=budget, block_tokens=_BLOCK_TOKENS)
    for seq_id in (0, 1):
        store.admit(seq_id, num_tokens)
    if is_scattered:
        for begin in range(0, num_tokens, _BLOCK_TOKENS):
            count = min(_BLOCK_TOKENS, num_tokens - begin)
            store.extend({0: count})
            store.extend({1: count})
    else:
        store.extend({0: num_tokens})
    store.write(0, store.rows([0], [num_tokens], [0]), k, v)
    return store, store.rows([0], [num_queries], [num_queries])


def _tokens(
    spec: AttentionSpec, num_tokens: int, num_queries: int, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (num_queries, spec.num_q_heads), (num_tokens, spec.num_kv_heads), (num_tokens, spec.num_kv_heads)
    return [torch.randn(*size, spec.head_dim, generator=generator).to(device, dtype) for size in sizes]


def _medians(ways: list[Callable[[], torch.Tensor]], device: torch.device, repeats: int) -> list[float]:
    """Seconds per call of each."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def run(way: Callable[[], torch.Tensor], count: int) -> float:
        begin = clock()
        for _ in range(count):
            way()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (clock() - begin) / count

    counts = [max(1, int(0.05 / run(way, 1))) for way in ways]
    seconds = [[run(way, count) for way, count in zip(ways, counts, strict=True)] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*seconds, strict=True)]


def _most_memory(spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes beyond q, k, v and the store, at most at a time."""
    q, k, v = _tokens(spec, 32768, 4096, dtype, device)
    store, rows = _filled(spec, k, v, 4096, is_scattered=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        store.attend(0, rows, q)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        store.attend(0, rows, q)
    held = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


if __name__ == "__main__":
    main()
