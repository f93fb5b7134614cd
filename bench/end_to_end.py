"""Decode tokens/s of the whole path beside transformers' ``generate``, on the same weights, prompts and lengths.

    python bench/end_to_end.py                                  a small random Llama, a minute on two cores
    python bench/end_to_end.py --hidden 1024 --layers 8 --mlp 2816 --vocab 32000 --sequences 64

One process, every variant in turn, the whole round repeated; medians and ratios of one run, because machines
differ and drift.  A variant is (transport, R-workers, micro-batches).  Prefill is measured by a run with one
new token and subtracted, so the figures are decode steps alone.  Tokens are compared, too.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fastdecode  # noqa: F401 (before torch, see there)

# isort: split
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cpu_attention import available_cores, cpu_name
from fastdecode import LLM, SamplingParams, __version__

VARIANTS = [("inproc", 1, 1), ("inproc", 1, 2), ("inproc", 2, 2), ("shm", 1, 1), ("shm", 1, 2), ("shm", 2, 2)]


@dataclass
class Measured:
    seconds: list[float]
    tokens: list[list[int]]


def make_model(args: argparse.Namespace, directory: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.mlp, num_hidden_layers=args.layers,
        num_attention_heads=args.q_heads, num_key_value_heads=args.kv_heads, head_dim=args.hidden // args.q_heads,
        max_position_embeddings=4096, tie_word_embeddings=True, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)


def run_fastdecode(llm: LLM, prompts: list[list[int]], new_tokens: int) -> Measured:
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return Measured([time.perf_counter() - started], [output.outputs[0].token_ids for output in outputs])


def run_transformers(model: LlamaForCausalLM, prompts: list[list[int]], new_tokens: int) -> Measured:
    ids = torch.tensor(prompts)
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=0
        )
    return Measured([time.perf_counter() - started], out[:, ids.shape[1] :].tolist())


def decode_rate(long: list[float], short: list[float], num_sequences: int, steps: int) -> float:
    return num_sequences * steps / (statistics.median(long) - statistics.median(short))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"hidden": 512, "mlp": 1408, "layers": 4, "q-heads": 8, "kv-heads": 2, "vocab": 8000}
    for name, default in shape.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--kv-cache-dtype", default="float16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()

    generator = np.random.default_rng(0)
    prompts = generator.integers(0, args.vocab, (args.sequences, args.input_len)).tolist()
    steps = args.output_len - 1
    results: dict[str, dict[int, Measured]] = {}
    with tempfile.TemporaryDirectory() as directory:
        make_model(args, directory)
        reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        for repeat in range(args.repeats + 1):  # the first round warms up and is dropped
            print(f"round {repeat} of {args.repeats}", file=sys.stderr)
            for length in (args.output_len, 1):
                keep(results, repeat, "transformers generate", length, run_transformers(reference, prompts, length))
            for transport, workers, micro_batches in VARIANTS:
                with LLM(
                    directory, transport=transport, num_r_workers=workers, micro_batches=micro_batches,
                    kv_cache_dtype=args.kv_cache_dtype, skip_tokenizer_init=True, max_num_batched_tokens=1 << 20,
                    enable_prefix_caching=False,  # the same prompts twice
                ) as llm:  # fmt: skip
                    for length in (args.output_len, 1):
                        name = f"{transport}, {workers} R-workers, {micro_batches} micro-batches"
                        keep(results, repeat, name, length, run_fastdecode(llm, prompts, length))
    base = results["transformers generate"]
    base_rate = decode_rate(base[args.output_len].seconds, base[1].seconds, args.sequences, steps)
    rows = []
    print(f"{'':40} {'tokens/s':>9} {'ratio':>6}  same tokens")
    for name, measured in results.items():
        rate = decode_rate(measured[args.output_len].seconds, measured[1].seconds, args.sequences, steps)
        same = sum(a == b for a, b in zip(measured[args.output_len].tokens, base[args.output_len].tokens, strict=True))
        print(f"{name:40} {rate:9.1f} {rate / base_rate:6.2f}  {same} of {args.sequences} sequences")
        rows.append({"variant": name, "decode_tokens_per_s": rate, "ratio": rate / base_rate, "same_sequences": same})
    if args.json:
        machine = {"processor": cpu_name(), "cores": len(available_cores()), "host": platform.machine()}
        record = {"fastdecode": __version__, "machine": machine, "arguments": vars(args), "results": rows}
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(json.dumps(record, indent=2) + "\n")


def keep(results: dict[str, dict[int, Measured]], repeat: int, name: str, new_tokens: int, measured: Measured) -> None:
    if repeat == 0:
        results.setdefault(name, {})[new_tokens] = Measured([], measured.tokens)
    else:
        results[name][new_tokens].seconds += measured.seconds


if __name__ == "__main__":
    main()
