"""Peak memory of `run-batch` and its R-workers over the length of the file: it should not depend on it.

    python bench/batch_memory.py [--lines 10000 100000] [--transport ipc] [--r-workers 2] [--json FILE]

A process for each length; a model of a few kilobytes, so that what grows would show; short prompts, one token each.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import fastdecode  # before torch, see there

# isort: split
import psutil

from bench.end_to_end import make_model
from cpu_attention import cpu_name
from fastdecode import LLM
from fastdecode.batch.journal import Journal
from fastdecode.batch.runner import run_batch
from fastdecode.batch.survey import survey

SHAPE = SimpleNamespace(hidden=32, mlp=64, layers=1, q_heads=2, kv_heads=1, vocab=256)


def serve(num_lines: int, transport: str, num_r_workers: int) -> None:
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
                max_num_waiting=1024, transport=transport, num_r_workers=num_r_workers,
            ) as llm,
            Journal(directory / "out.jsonl", found, {}, resume=False, retry_errors=False) as journal,
        ):  # fmt: skip
            result = run_batch(llm, found, journal, model_names=["model"], seed=0)
            workers = [p for p in psutil.Process().children(recursive=True) if "cpu_attention" in p.cmdline()]
            assert len(workers) == (0 if transport == "inproc" else num_r_workers)
            r_workers_mib = [peak_mib(worker.pid) for worker in workers]
        assert result.is_complete and not result.num_errors
        seconds = time.perf_counter() - began
        print(json.dumps({"peak_mib": peak_mib("self"), "r_workers_peak_mib": r_workers_mib, "seconds": seconds}))


def peak_mib(pid: int | str) -> float:
    """What the process has held at most."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--transport", default="ipc", choices=("inproc", "shm", "ipc", "tcp"))
    parser.add_argument("--r-workers", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.transport, args.r_workers)
    print(f"fastdecode {fastdecode.__version__}, {args.transport}, {args.r_workers} R-workers; peak MiB, to the first")
    print(f"{'lines':>8} {'run-batch':>20} {'largest R-worker':>20} {'lines/s':>8}")
    records: list[dict[str, Any]] = []
    for num_lines in args.lines:
        command = [
            sys.executable, __file__, "--serve", str(num_lines), "--transport", args.transport,
            "--r-workers", str(args.r_workers),
        ]  # fmt: skip
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        records.append({"lines": num_lines, **json.loads(out.splitlines()[-1])})
        own, first = records[-1], records[0]
        cells = []
        for now, then in (
            (own["peak_mib"], first["peak_mib"]),
            (max(own["r_workers_peak_mib"], default=0), max(first["r_workers_peak_mib"], default=0)),
        ):
            cells.append(f"{now:.0f} ({now / then:.3f})" if then else "")
        print(f"{num_lines:8} {cells[0]:>20} {cells[1]:>20} {num_lines / own['seconds']:8.0f}", flush=True)
    if args.json:
        facts = {"machine": cpu_name(), "transport": args.transport, "runs": records}
        Path(args.json).write_text(json.dumps(facts, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
