"""How well S- and R-Part overlap: an S-worker emulated so that it takes as long as the R-worker, which is real.

    python bench/overlap.py [--transport shm] [--sequences 64] [--context 512] [--json FILE]

First R: the R-worker's attention for a micro-batch, beside an S-worker that takes no time.  Then S-blocks that take
exactly that long, with 1, 2 and 3 lanes in turns.  With one, a step is S + R and the wire; with two it should be
max(S, R) and nothing else, for what lies between two steps of a lane lies beside the R-workers' work for the other.
What the S-worker did while its device was idle is printed, in shares of 100 %.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import fastdecode  # before torch, see there

# isort: split
from bench.schedules import emulated_facts
from cpu_attention import KVLayout, LayerShape, cpu_name
from fastdecode import SamplingParams
from fastdecode.engine.engine import Engine
from fastdecode.engine.runtime import open_session
from fastdecode.holders.launch import start_r_workers
from fastdecode.holders.rpool import RPool
from fastdecode.observe.timeline import S_DEVICE, Timeline
from fastdecode.scheduling.config import SchedulerConfig
from fastdecode.scheduling.scheduler import Scheduler
from gpu_sworker import EmulatedSWorker

BLOCK_TOKENS = 64


@dataclass(frozen=True)
class Steps:
    """Medians over the decode steps of a run."""

    s_ms: float  # of all S-blocks of a step
    r_ms: float  # of all attention of a step, of the busiest R-worker
    step_ms: float
    shares: dict[str, float]  # of the S-worker's time

    @property
    def over_floor(self) -> float:
        """Times max(S, R)."""
        return self.step_ms / max(self.s_ms, self.r_ms)


def run(args: argparse.Namespace, num_lanes: int, block_seconds: float) -> Steps:
    """Decodes `args.steps` tokens of every sequence; block_seconds: T, of every S-block."""
    facts = emulated_facts(args.layers, args.kv_heads, args.group, args.head_dim)
    layout = KVLayout(tuple(LayerShape(s.num_kv_heads, s.head_dim) for s in facts.layers), args.kv_dtype, BLOCK_TOKENS)
    blocks = (args.sequences + 8) * layout.num_blocks(args.context + args.steps + 1)  # with some to spare
    timeline = Timeline()
    with ExitStack() as cleanup:
        workers = start_r_workers(
            transport=args.transport,
            num_workers=args.r_workers,
            threads_each=args.threads,
            kv_cache_bytes_each=blocks * layout.block_bytes,
        )
        cleanup.callback(workers.close)
        rpool = RPool(workers.handles, 60, timeline)
        cleanup.callback(rpool.close)
        welcomes = open_session(rpool, facts, layout, kv_cache_bytes=None, timeout_s=60)
        engine = Engine(
            sworker=EmulatedSWorker(facts, lambda tokens: block_seconds),
            rpool=rpool,
            tokenizer=None,
            scheduler=Scheduler(
                SchedulerConfig(
                    max_num_seqs=args.sequences,
                    max_num_batched_tokens=args.sequences * args.context * 2,
                    num_lanes=num_lanes,
                    block_tokens=BLOCK_TOKENS,
                    capacity_blocks=tuple(welcome.num_blocks for welcome in welcomes),
                    start_policy="at-once",
                )
            ),
            max_model_len=1 << 20,
            seed=0,
            timeline=timeline,
        )
        params = SamplingParams(temperature=0, max_tokens=args.steps + 1, ignore_eos=True)
        for _ in range(args.sequences):
            engine.add_request(engine.next_request_id(), [1] * args.context, params)
        while engine.has_work:
            engine.step()
    return decode_steps(timeline)


def decode_steps(timeline: Timeline, s_track: str = S_DEVICE) -> Steps:
    """s_track: where S-blocks are, the S-worker's own if its device does not work by itself."""
    prefill_end = max(span.end_ns for span in timeline.spans if span.name == "prompt attention")
    # From one step of the first lane to its next all lanes have one.
    schedules = [span for span in timeline.spans if span.name == "schedule" and span.micro_batch == 0]
    starts = [span.begin_ns for span in schedules if span.begin_ns > prefill_end][2:]  # the first ones still settle
    steps = list(itertools.pairwise(starts))

    def per_step(track: str, name: str) -> float:
        spans = [(s.begin_ns, s.end_ns) for s in timeline.spans if s.track == track and s.name == name]
        return statistics.median(sum(e - b for b, e in spans if begin <= b < end) for begin, end in steps) / 1e6

    r_tracks = {span.track for span in timeline.spans if span.name == "attention"}
    kept = [span for span in timeline.spans if starts[0] <= span.begin_ns and span.end_ns <= starts[-1]]
    timeline.spans.clear()
    timeline.spans.extend(kept)
    return Steps(
        s_ms=per_step(s_track, "S-block"),
        r_ms=max(per_step(track, "attention") for track in r_tracks),
        step_ms=statistics.median(end - begin for begin, end in steps) / 1e6,
        shares=timeline.shares(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (
        ("sequences", 64), ("context", 512), ("layers", 32), ("kv-heads", 8), ("group", 1), ("head-dim", 128),
        ("steps", 24), ("r-workers", 1), ("threads", 1), ("repeats", 3),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kv-dtype", default="float16")
    parser.add_argument("--transport", default="shm", choices=("inproc", "shm", "ipc", "tcp"))
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()

    alone = run(args, 2, 1e-6)
    block_seconds = alone.r_ms / 1e3 / (2 * args.layers)  # of half the batch
    print(f"fastdecode {fastdecode.__version__}, {cpu_name()}, {args.transport}; R alone: {alone.r_ms:.1f} ms a step")
    found: dict[int, list[Steps]] = {1: [], 2: [], 3: []}
    for _ in range(args.repeats):
        for num_lanes, runs in found.items():
            runs.append(run(args, num_lanes, block_seconds * 2 / num_lanes))
    print(
        "lanes               S ms     R ms  step ms  step / max(S, R)   the device, then the thread while it idled, %"
    )
    for num_lanes, runs in found.items():
        middle = sorted(runs, key=lambda steps: steps.over_floor)[len(runs) // 2]
        shares = ", ".join(f"{name} {100 * share:.1f}" for name, share in middle.shares.items())
        print(
            f"{num_lanes:13} {middle.s_ms:10.1f} {middle.r_ms:8.1f} {middle.step_ms:8.1f} {middle.over_floor:17.2f}"
            f"   {shares} = {100 * sum(middle.shares.values()):.1f}"
        )
    if args.json:
        record = {
            "machine": cpu_name(),
            "settings": vars(args),
            "r_alone_ms": alone.r_ms,
            "runs": {
                str(m): [asdict(steps) | {"over_floor": steps.over_floor} for steps in r] for m, r in found.items()
            },
        }
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
