"""Peak memory of `run-batch` over the length of its file: it should not depend on it.

    python bench/batch_memory.py [--lines 10000 100000]

A process for each length; a model of a few kilobytes, so that what grows would show; short prompts, one token each.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import fastdecode  # before torch, see there

# isort: split
from bench.end_to_end import make_model
from fastdecode import LLM
from fastdecode.batch.journal import Journal
from fastdecode.batch.runner import run_batch
from fastdecode.batch.survey import survey

SHAPE = SimpleNamespace(hidden=32, mlp=64, layers=1, q_heads=2, kv_heads=1, vocab=256)


def serve(num_lines: int) -> None:
    """Prints peak memory and seconds as JSON."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make_model(SHAPE, str(directory / "model"))
        body = {"prompt": [1, 2, 3, 4], "max_tokens": 1, "temperature": 0}
        with (directory / "in.jsonl").open("w") as file:
            for number in range(num_lines):
                line = {"custom_id": f"request-{number}", "method": "POST", "url": "/v1/completions", "body": body}
                file.write(json.dumps(line) + "\n")
        began = time.perf_counter()
        found = survey(directory / "in.jsonl")
        with (
            LLM(
                directory / "model", skip_tokenizer_init=True, kv_cache_memory="16MiB", max_num_seqs=512,
                max_num_waiting=1024,
            ) as llm,
            Journal(directory / "out.jsonl", found, {}, resume=False, retry_errors=False) as journal,
        ):  # fmt: skip
            result = run_batch(llm, found, journal, model_names=["model"], seed=0)
        assert result.is_complete and not result.num_errors
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"peak_mib": peak, "seconds": time.perf_counter() - began}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    print(f"fastdecode {fastdecode.__version__}\n{'lines':>8} {'peak MiB':>9} {'of the first':>13} {'lines/s':>8}")
    first = None
    for num_lines in args.lines:
        command = [sys.executable, __file__, "--serve", str(num_lines)]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        record = json.loads(out.splitlines()[-1])
        first = first or record["peak_mib"]
        rate = num_lines / record["seconds"]
        print(f"{num_lines:8} {record['peak_mib']:9.0f} {record['peak_mib'] / first:13.3f} {rate:8.0f}")
    return None


if __name__ == "__main__":
    main()
