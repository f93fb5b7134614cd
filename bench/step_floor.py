"""A decode step beside what it consists of, and beside what the machine could do at best.

    python bench/step_floor.py                               64 sequences x 128-token prompts, MHA and GQA, a minute
    python bench/step_floor.py --kv-heads 2 --sequences 256 --input-len 512

    step         of the whole engine, R-worker in the same process, fp32 weights, fp16 KV, one micro-batch
    GEMM         every linear layer of the model once, alone, on as many rows
    attention    every layer's append and attention, alone: an R-worker called by hand
    floor        the step's FLOP at the best GEMM rate of this run + the KV's bytes at the read rate of this run

All in turns, round by round; medians and ratios of one run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fastdecode  # before torch, see there

# isort: split
import numpy as np
import torch

from bench.end_to_end import make_model
from cpu_attention import RWorker, available_cores, cpu_name, pin_thread
from cpu_attention.roofs import Roofs
from fastdecode import LLM, SamplingParams
from fastdecode.observe.step_log import read_step_log
from gpu_sworker import SWorker
from gpu_sworker.linear import PackedLinear
from transport import Admit, Attend, Attended, Hello, LayerSpec, Rows

BLOCK_TOKENS = 64
KV_DTYPE, KV_BYTES = "float16", 2


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Products:
    """The linear layers of a model, each on rows of its own."""

    def __init__(self, directory: str, rows: int) -> None:
        self.sworker = SWorker(directory)
        self._calls = [
            (module, torch.randn(1, rows, module.in_features))
            for module in self.sworker._model.modules()
            if isinstance(module, PackedLinear | torch.nn.Linear)
        ]
        self.flop = sum(2 * rows * module.in_features * module.out_features for module, _ in self._calls)

    def __call__(self) -> None:
        with torch.inference_mode():
            for module, x in self._calls:
                module(x)

    def best_rate(self) -> float:
        """FLOP/s of the fastest product known here: large and square, or packed and of many rows."""
        square = torch.randn(2048, 2048)
        packed = PackedLinear(torch.randn(4096, 1024), None)
        many = torch.randn(1024, 1024)
        with torch.inference_mode():
            rates = [2 * 2048**3 / timed(lambda: square @ square) for _ in range(5)]
            rates += [2 * 1024 * 1024 * 4096 / timed(lambda: packed(many)) for _ in range(10)]
        return max(rates)


class Attention:
    """An R-worker that is called, over sequences of the same lengths as the engine's."""

    def __init__(self, sworker: SWorker, sequences: int, length: int) -> None:
        self._specs = sworker.facts.layers
        self._sequences, self._length, self._step = sequences, length, 0
        cores = available_cores()
        # Called from a thread of its own, like an R-worker, because that one keeps to the first core.
        self._caller = ThreadPoolExecutor(1, initializer=pin_thread, initargs=cores[:1])
        self._worker = RWorker(kv_cache_bytes=8 << 30, num_threads=len(cores), cores=cores)
        layers = tuple(LayerSpec(s.num_q_heads, s.num_kv_heads, s.head_dim, s.scale) for s in self._specs)
        self._worker.handle(1, Hello(layers, KV_DTYPE, BLOCK_TOKENS))
        ids = np.arange(sequences, dtype=np.int64)
        self._worker.handle(1, Admit(ids, np.full(sequences, length + 4096, np.int32)))
        self._ids = ids
        self._run(0, length, 0, self._rows(length, queries=0))

    def step(self) -> float:
        """Seconds of one decode step."""
        rows = self._rows(1, queries=1)
        seconds = self._caller.submit(timed, lambda: self._run(self._length, 1, 1, rows)).result()
        self._length += 1
        return seconds

    def close(self) -> None:
        self._caller.shutdown()
        self._worker.close()

    def kv_bytes(self) -> int:
        return sum(2 * s.num_kv_heads * s.head_dim * KV_BYTES for s in self._specs) * self._sequences * self._length

    def _rows(self, tokens: int, queries: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """q and k (which is v, too) of every layer."""
        return [
            (
                np.ones((self._sequences * queries, spec.num_q_heads, spec.head_dim), np.float32),
                np.ones((self._sequences * tokens, spec.num_kv_heads, spec.head_dim), np.float32),
            )
            for spec in self._specs
        ]

    def _run(self, start: int, tokens: int, queries: int, rows: list[tuple[np.ndarray, np.ndarray]]) -> None:
        def column(value: int) -> np.ndarray:
            return np.full(self._sequences, value, np.int32)

        self._step += 1
        self._worker.handle(1, Rows(self._step, 0, self._ids, column(start), column(tokens), column(queries)))
        for layer, (q, kv) in enumerate(rows):
            answer = self._worker.handle(1, Attend(self._step, 0, layer, q, kv, kv))
            is_due = queries > 0 or layer == len(rows) - 1
            assert isinstance(answer, Attended) if is_due else answer is None, answer


def engine_steps(directory: str, prompts: list[list[int]], new_tokens: int) -> list[float]:
    """Seconds of each decode step."""
    with tempfile.NamedTemporaryFile() as log:
        with LLM(
            directory,
            skip_tokenizer_init=True,
            kv_cache_dtype=KV_DTYPE,
            max_model_len=len(prompts[0]) + new_tokens,
            max_num_seqs=len(prompts),
            start_policy="at-once",
            enable_prefix_caching=False,
            step_log=log.name,
        ) as llm:
            params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
            llm.generate(prompts, params, use_tqdm=False)
        return [r.seconds for r in read_step_log(log.name) if r.num_decodes == len(prompts) and not r.num_prompt_tokens]


def measure(args: argparse.Namespace, kv_heads: int) -> dict[str, float]:
    args.kv_heads = kv_heads
    prompts = np.random.default_rng(0).integers(0, args.vocab, (args.sequences, args.input_len)).tolist()
    with tempfile.TemporaryDirectory() as directory:
        make_model(args, directory)
        products = Products(directory, args.sequences)
        attention = Attention(products.sworker, args.sequences, args.input_len)
        roofs = Roofs(len(available_cores()), available_cores())
        steps, gemm, attend, rates, reads = [], [], [], [], []
        for _ in range(args.repeats):
            steps += engine_steps(directory, prompts, args.output_len)
            for _ in range(args.output_len // args.repeats):
                gemm.append(timed(products))
                attend.append(attention.step())
            rates.append(products.best_rate())
            reads += [roofs.read_bandwidth() for _ in range(5)]
        roofs.close()
        attention.close()
    # Lengths grow by as much while attention is measured as in the engine, so the middles are alike.
    kv_bytes = attention.kv_bytes() * (args.input_len + args.output_len / 2) / attention._length
    if not steps:
        raise SystemExit("no step has all sequences decoding: raise --output-len")
    step, gemm_s, attend_s = map(statistics.median, (steps, gemm, attend))
    rate, read = max(rates), statistics.median(reads)
    floor = products.flop / rate + kv_bytes / read
    return {
        "kv_heads": kv_heads,
        "step_ms": step * 1e3,
        "gemm_ms": gemm_s * 1e3,
        "attention_ms": attend_s * 1e3,
        "floor_ms": floor * 1e3,
        "floor_gemm_ms": products.flop / rate * 1e3,
        "floor_kv_ms": kv_bytes / read * 1e3,
        "gemm_gflops": products.flop / gemm_s / 1e9,
        "best_gflops": rate / 1e9,
        "attention_gb_s": kv_bytes / attend_s / 1e9,
        "read_gb_s": read / 1e9,
        "step_over_parts": step / (gemm_s + attend_s),
        "step_over_floor": step / floor,
        "tokens_per_s": args.sequences / step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"hidden": 1024, "mlp": 2816, "layers": 8, "q-heads": 8, "vocab": 32000}
    for name, default in (shape | {"sequences": 64, "input-len": 128, "output-len": 48, "repeats": 3}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[8, 2])
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    shapes = list(args.kv_heads)
    print(f"fastdecode {fastdecode.__version__}, {cpu_name()}, {len(available_cores())} cores")
    print("KV heads   step   GEMM   attention   floor = FLOP + KV   step/(GEMM+attention)  step/floor  tokens/s")
    results = []
    for kv_heads in shapes:
        found = measure(args, kv_heads)
        results.append(found)
        print(
            f"{kv_heads:8} {found['step_ms']:6.1f} {found['gemm_ms']:6.1f} {found['attention_ms']:11.1f}"
            f" {found['floor_ms']:7.1f} = {found['floor_gemm_ms']:4.1f} + {found['floor_kv_ms']:4.1f}"
            f" {found['step_over_parts']:21.2f} {found['step_over_floor']:12.2f} {found['tokens_per_s']:9.0f}\n"
            f"         GEMM {found['gemm_gflops']:.0f} of {found['best_gflops']:.0f} GFLOP/s, attention "
            f"{found['attention_gb_s']:.1f} of {found['read_gb_s']:.1f} GB/s"
        )
    if args.json:
        record = {"machine": cpu_name(), "settings": vars(args) | {"kv_heads": shapes}, "results": results}
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
