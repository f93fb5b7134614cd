"""Does the performance model tell a step's time?  Calibrates on this machine, then runs batches and compares.

    python bench/perf_model.py [--out bench/results/perf_model.json]

A small random Llama, everything in one process, one micro-batch: a step is S-Part plus R-Part.  The runs are not those
that were calibrated on: other batches, prompts that were prefilled, sequences that grow step by step, the scheduler and
the sampler in between.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.end_to_end import make_model
from cpu_attention import available_cores, cpu_name
from fastdecode import LLM, EngineConfig, SamplingParams, __version__, calibrate_model
from fastdecode.observe.step_log import read_step_log
from fastdecode.scheduling.times import LaneWork

WINDOW = 32  # steps whose median is compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[6, 24, 48, 96])
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--out", default="bench/results/perf_model.json")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        make_model(argparse.Namespace(hidden=512, mlp=1408, layers=4, q_heads=8, kv_heads=2, vocab=8000), directory)
        options = {"model": directory, "kv_cache_dtype": "float16", "kv_cache_memory": "256MiB"}
        calibration = calibrate_model(EngineConfig.from_options(options), 128, partial(print, file=sys.stderr))
        model, log = calibration.perf_model, Path(directory) / "steps.jsonl"
        print(f"{'sequences':>10}{'KV tokens':>11}{'measured ms':>13}{'told ms':>10}{'told/measured':>15}")
        for batch in args.batches:
            with LLM(**options, step_log=log, skip_tokenizer_init=True, enable_prefix_caching=False) as llm:
                params = SamplingParams(temperature=0, max_tokens=args.output_len, ignore_eos=True)
                llm.generate([[1 + i] * args.input_len for i in range(batch)], params, use_tqdm=False)
            steps = [record for record in read_step_log(log) if record.num_decodes == batch]
            for begin in (0, len(steps) // 2, len(steps) - WINDOW):
                window = steps[begin : begin + WINDOW]
                load = round(statistics.mean(record.load for record in window))
                measured = statistics.median(record.seconds for record in window)
                told = model.step_seconds([LaneWork(batch, load)], 1)
                print(f"{batch:10}{load:11}{measured * 1e3:13.2f}{told * 1e3:10.2f}{told / measured:15.2f}")
                rows.append({"sequences": batch, "kv_tokens": load, "measured_s": measured, "told_s": told})
    ratios = [row["told_s"] / row["measured_s"] for row in rows]
    print(f"told / measured: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    machine = {"processor": cpu_name(), "cores": len(available_cores())}
    record = {"fastdecode": __version__, "machine": machine, "arguments": vars(args), "results": rows}
    Path(args.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
