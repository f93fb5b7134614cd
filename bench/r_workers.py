"""What the R-workers' attention reaches behind a wire: one process on all cores, one process on each, and no process.

    python bench/r_workers.py [--sequences 64] [--context 1024] [--layers 8] [--json FILE]

In all cases the same sequences and as many threads as cores.  By hand: an R-worker that is called in this process,
nothing else.  As processes: whole engine steps over shared memory, with an S-worker that takes no time and two
micro-batches, so that the R-workers never wait for work; what they lose is wire, scheduling and this machine's cores,
which the S-worker's thread shares.  Rates are KV bytes read per second, of the attention alone as the R-workers time
it, and of the whole step; all in turns, ratios of the same round, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import fastdecode  # before torch, see there

# isort: split
from bench.overlap import run
from bench.schedules import emulated_facts
from bench.step_floor import KV_BYTES, KV_DTYPE, Attention
from cpu_attention import available_cores, cpu_name
from cpu_attention.roofs import Roofs


def by_hand(args: argparse.Namespace) -> tuple[float, float]:
    """Bytes/s of R-worker calls in this process, twice, as there is nothing else."""
    facts = emulated_facts(args.layers, args.kv_heads, args.group, args.head_dim)
    attention = Attention(SimpleNamespace(facts=facts), args.sequences, args.context)  # type: ignore[arg-type]
    seconds = [attention.step() for _ in range(args.steps)]
    attention.close()
    rate = kv_bytes(args) / statistics.median(seconds)
    return rate, rate


def as_processes(args: argparse.Namespace, num_workers: int) -> tuple[float, float]:
    """Bytes/s of whole steps, and of the R-workers' attention alone, as they time it."""
    settings = argparse.Namespace(**vars(args))
    settings.r_workers, settings.threads = num_workers, len(available_cores()) // num_workers
    settings.transport, settings.kv_dtype = "shm", KV_DTYPE
    steps = run(settings, 2, 1e-6)
    return kv_bytes(args) / (steps.step_ms / 1e3), kv_bytes(args) / (steps.r_ms / 1e3)


def kv_bytes(args: argparse.Namespace) -> float:
    """Read in the middle one of the steps."""
    tokens = args.sequences * (args.context + args.steps / 2)
    return float(tokens * args.layers * 2 * args.kv_heads * args.head_dim * KV_BYTES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("sequences", 64), ("context", 1024), ("layers", 8), ("kv-heads", 8), ("group", 1), ("head-dim", 128),
        ("steps", 24), ("repeats", 5),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    cores = len(available_cores())
    variants = {
        "by hand, no process": lambda: by_hand(args),
        f"1 process of {cores} threads": lambda: as_processes(args, 1),
        f"{cores} processes of 1 thread": lambda: as_processes(args, cores),
    }
    roofs = Roofs(cores, available_cores())
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    reads: list[float] = []
    for _ in range(args.repeats):
        reads.append(statistics.median(roofs.read_bandwidth() for _ in range(3)))
        for name, rate in variants.items():
            found[name].append(rate())
    roofs.close()
    read = statistics.median(reads)
    print(f"fastdecode {fastdecode.__version__}, {cpu_name()}, {cores} cores, read at {read / 1e9:.1f} GB/s")
    print(f"{'R-workers':24} {'attention, GB/s':>16} {'of by hand':>11} {'step, GB/s':>11} {'of by hand':>11}")
    first = found["by hand, no process"]
    for name, rates in found.items():
        step, attention = (statistics.median(column) / 1e9 for column in zip(*rates, strict=True))
        of_step, of_attention = (
            statistics.median(rate[i] / base[i] for rate, base in zip(rates, first, strict=True)) for i in (0, 1)
        )
        print(f"{name:24} {attention:16.1f} {of_attention:11.2f} {step:11.1f} {of_step:11.2f}")
    if args.json:
        record = {"machine": cpu_name(), "settings": vars(args), "read": reads, "bytes_per_s": found}
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
