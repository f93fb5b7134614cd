"""What `--trace` costs: the same generation with and without it, in turns; the ratio of a step's medians.

python bench/tracing.py [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import fastdecode  # before torch, see there

# isort: split
import numpy as np

from bench.end_to_end import make_model
from cpu_attention import cpu_name
from fastdecode import LLM, SamplingParams
from fastdecode.observe.step_log import read_step_log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"hidden": 1024, "mlp": 2816, "layers": 8, "q-heads": 8, "kv-heads": 8, "vocab": 32000}
    for name, default in (shape | {"sequences": 64, "input-len": 16, "output-len": 48, "repeats": 7}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    prompts = np.random.default_rng(0).integers(0, args.vocab, (args.sequences, args.input_len)).tolist()
    params = SamplingParams(temperature=0, max_tokens=args.output_len, ignore_eos=True)
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    with tempfile.TemporaryDirectory() as directory:
        make_model(args, directory)
        options: dict[str, Any] = {
            "skip_tokenizer_init": True, "max_num_seqs": args.sequences, "start_policy": "at-once",
            "enable_prefix_caching": False,  # the same prompts in every round
        }  # fmt: skip
        logs = {name: Path(directory) / f"{name}.jsonl" for name in seconds}
        seen = dict.fromkeys(seconds, 0)
        with (
            LLM(directory, **options, step_log=logs["without"]) as plain,
            LLM(directory, **options, step_log=logs["with"], trace=Path(directory) / "trace.json") as traced,
        ):
            for number in range(args.repeats + 1):
                for name, llm in (("without", plain), ("with", traced)):
                    llm.generate(prompts, params, use_tqdm=False)
                    records = read_step_log(logs[name])
                    steps = [r.seconds for r in records if r.num_decodes == args.sequences and not r.num_prompt_tokens]
                    if number:  # the first round warms up
                        seconds[name].append(statistics.median(steps[seen[name] :]))
                    seen[name] = len(steps)
    ratio = statistics.median(w / o for w, o in zip(seconds["with"], seconds["without"], strict=True))
    print(
        f"fastdecode {fastdecode.__version__}, {cpu_name()}, {args.sequences} sequences, {args.output_len} tokens each"
    )
    for name, taken in seconds.items():
        in_ms = [1e3 * step for step in (statistics.median(taken), min(taken), max(taken))]
        print(f"{name:8} a trace: {in_ms[0]:.2f} ms a step ({in_ms[1]:.2f} to {in_ms[2]:.2f})")
    print(f"cost: {100 * (ratio - 1):+.1f} % (median of {args.repeats} pairs)")


if __name__ == "__main__":
    main()
