"""Garbage, near misses and lies, by the million: what the wire's two sides do about them.

    python bench/fuzz.py [--frames 1000000] [--target guided codec shm ipc tcp] [--seed 0] [--json FILE]

    guided       the codec in this process, inputs found by coverage (by libFuzzer; left out without atheris)
    codec        the codec in this process, valid messages of every kind, damaged: bits, lengths, shapes, tags, order
    shm ipc tcp  a live R-worker process, over its own wire: conversations that nearly make sense, damaged frames, bare
                 bytes below them. It may answer with a Failure; it may not die, hang, answer wrongly, or take more
                 memory than its KV budget and what `fuzz_worker.py` allows beside it

Exit code 1 if anything else happened. A failure says how to repeat it: its seed, and the batch it came in.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.fuzz_codec import IS_GUIDED, guided, mutate
from bench.fuzz_worker import attack
from cpu_attention import cpu_name

TARGETS = ("guided", "codec", "shm", "ipc", "tcp")


def strike(target: str, num_frames: int, seed: int, first_batch: int) -> dict[str, Any]:
    """A record; `failure` is in it if there was one."""
    if target == "guided":
        return guided(num_frames, seed)
    if target == "codec":
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        record = mutate(num_frames, seed, first_batch)
        return record | {"memory_over_start_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}
    return attack(target, num_frames, seed, first_batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1_000_000, help="for the codec; the wires share as many")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-batch", type=int, default=0, help="begin there, to repeat a failure")
    parser.add_argument("--json", metavar="FILE", help="also write the records there")
    args = parser.parse_args()
    records: dict[str, Any] = {}
    num_wires = len({"shm", "ipc", "tcp"}.intersection(args.target))
    print(f"{cpu_name()}, seed {args.seed}")
    print(f"{'target':8} {'frames':>10} {'frames/s':>9} {'crashes':>8} {'peak over the start':>20}")
    for target in args.target:
        if target == "guided" and not IS_GUIDED:
            print(f"{target:8} left out: pip install atheris (x86-64 Linux)")
            continue
        num_frames = args.frames if target in ("guided", "codec") else -(-args.frames // num_wires)
        record = records[target] = strike(target, num_frames, args.seed, args.first_batch)
        memory = record["memory_over_start_mib"]
        print(
            f"{target:8} {record['frames']:10} {record['frames'] / record['seconds']:9.0f} {'failure' in record:8} "
            f"{'unknown' if memory is None else f'{memory:.0f} MiB':>20}",
            flush=True,
        )
    if args.json:
        facts = {"machine": cpu_name(), "seed": args.seed, "targets": records}
        Path(args.json).write_text(json.dumps(facts, indent=1) + "\n")
    failures = {target: record["failure"] for target, record in records.items() if "failure" in record}
    for target, failure in failures.items():
        print(f"{target}: {failure}", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
