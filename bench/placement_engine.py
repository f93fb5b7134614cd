"""GPU-only, full offload and both on the real engine: an emulated GPU, real R-workers, real times.

    python bench/placement_engine.py [--layers 8] [--device-kv 8MiB] [--rounds 3] [--out FILE]

The S-worker takes an A10's time and its memory's; R-workers, wire, pipeline and scheduler are real, and R is measured
at the start.  Each of the three in turn, the whole round repeated; medians of tokens per second, and their ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from fastdecode import LLM, SamplingParams, __version__  # isort: skip  # before torch, which it tells how to wait

from transformers import LlamaConfig

from cpu_attention import available_cores, cpu_name


def tokens_per_s(directory: Path, args: argparse.Namespace, options: dict[str, Any]) -> tuple[float, int]:
    """And how many sequences ran at once, at most."""
    running = []
    with LLM(
        directory, device=args.device, skip_tokenizer_init=True, max_num_seqs=args.sequences, block_tokens=16, **options
    ) as llm:
        engine = llm._engine
        step = engine.step
        engine.step = lambda: (running.append(engine.num_running), step())[1]  # type: ignore[method-assign, func-returns-value]
        prompts = [[1 + i % 7] * args.prompt_tokens for i in range(args.requests)]
        began = time.perf_counter()
        params = SamplingParams(temperature=0, max_tokens=args.output_tokens, ignore_eos=True)
        llm.generate(prompts, params, use_tqdm=False)
        return args.requests * args.output_tokens / (time.perf_counter() - began), max(running)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="emulated:a10")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--device-kv", default="8MiB", help="of the device's memory, for KV")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="JSON")
    args = parser.parse_args()
    modes: dict[str, dict[str, Any]] = {
        "GPU-only": {"num_r_workers": 0, "device_kv_memory": args.device_kv, "micro_batches": 1},
        "full offload": {"device_kv_memory": 0},
        "both": {"device_kv_memory": args.device_kv, "placement": "planned"},
    }
    figures: dict[str, list[float]] = {name: [] for name in modes}
    with tempfile.TemporaryDirectory() as directory:
        LlamaConfig(
            vocab_size=1000, hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4,
            num_hidden_layers=args.layers, num_attention_heads=args.hidden // 64,
            num_key_value_heads=args.hidden // 256,
        ).save_pretrained(directory)  # fmt: skip
        for number in range(args.rounds):
            for name, options in modes.items():
                rate, most = tokens_per_s(Path(directory), args, options)
                figures[name].append(rate)
                print(f"round {number}: {name:13} {rate:8.0f} tokens/s, up to {most} sequences", file=sys.stderr)
    medians = {name: statistics.median(rates) for name, rates in figures.items()}
    for name, median in medians.items():
        ratios = [both / other for both, other in zip(figures["both"], figures[name], strict=True)]
        print(f"{name:13} {median:8.0f} tokens/s; both over it {statistics.median(ratios):.2f}")
    if args.out:
        content = {
            "version": __version__, "machine": f"{len(available_cores())} threads of {cpu_name()}",
            "options": vars(args), "tokens_per_s": figures,
        }  # fmt: skip
        Path(args.out).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
