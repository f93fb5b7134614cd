"""When sequences start, on real R-workers: all at once, in a stream (load stabilising), and greedily.

    python bench/schedules.py [--out bench/results/schedules.json] [--plot schedules.png]

Three settings, every policy in turn, the whole round repeated; medians and ratios of one run.

    same batch     B sequences live at most; the peak load of a stream against starting them together
    same memory    KV for B sequences of full length, several times as many wait; an S-Part whose time is flat in the
                   batch up to a knee, as on a GPU: it is slept, while R-workers, wire and pipeline are real
    plain CPU      the same with a small random Llama whose S-Part runs on the same cores
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from bench.end_to_end import make_model
from cpu_attention import KVLayout, LayerShape, available_cores, cpu_name
from fastdecode import LLM, SamplingParams, __version__
from fastdecode.engine.engine import Engine
from fastdecode.engine.runtime import open_session
from fastdecode.holders.launch import start_r_workers
from fastdecode.holders.rpool import RPool
from fastdecode.observe.plots import plot_steps
from fastdecode.observe.step_log import StepRecord, read_step_log
from fastdecode.scheduling.config import SchedulerConfig
from fastdecode.scheduling.scheduler import Scheduler
from gpu_sworker import AttentionSpec, EmulatedSWorker, ModelFacts

BLOCK_TOKENS = 16
POLICIES = {
    "at once": {"start_policy": "at-once"},
    "stream": {"start_policy": "steady"},
    "greedy": {"start_policy": "eager", "kv_policy": "greedy"},
}


@dataclass(frozen=True)
class Figures:
    tokens_per_s: float
    steps: int
    mean_step_ms: float
    largest_step_ms: float
    peak_load: int
    mean_load: float
    live: float  # sequences, in the middle half of the steps
    preempted: int


def figures(steps: list[StepRecord], num_tokens: int) -> Figures:
    """num_tokens: of output.  The drain at the end counts in tokens/s, and not in what is live."""
    seconds = [record.seconds for record in steps]
    middle = steps[len(steps) // 4 : -len(steps) // 4]
    return Figures(
        tokens_per_s=num_tokens / (steps[-1].begin_s + steps[-1].seconds),
        steps=len(steps),
        mean_step_ms=statistics.mean(seconds) * 1e3,
        largest_step_ms=float(np.percentile(seconds, 99)) * 1e3,
        peak_load=max(record.load for record in steps),
        mean_load=statistics.mean(record.load for record in middle),
        live=statistics.mean(record.num_running for record in middle),
        preempted=sum(record.num_preempted for record in steps),
    )


def emulated_facts(num_layers: int, kv_heads: int, group: int, head_dim: int) -> ModelFacts:
    spec = AttentionSpec(kv_heads * group, kv_heads, head_dim, head_dim**-0.5, None, None, None)
    return ModelFacts("emulated", (spec,) * num_layers, 8, None, "", None, (), 0, "float32", "emulated", "plain")


def run_emulated(args: argparse.Namespace, count: int, capacity_tokens: int, **options: object) -> list[StepRecord]:
    """`count` sequences through real R-workers (processes) beside an S-worker that takes a constant time."""
    facts = emulated_facts(args.layers, args.kv_heads, 4, args.head_dim)
    shapes = tuple(LayerShape(spec.num_kv_heads, spec.head_dim) for spec in facts.layers)
    layout = KVLayout(shapes, "float16", BLOCK_TOKENS)
    blocks_each = -(-capacity_tokens // BLOCK_TOKENS // args.r_workers)
    records: list[StepRecord] = []
    with ExitStack() as cleanup:
        workers = start_r_workers(
            transport="shm",
            num_workers=args.r_workers,
            threads_each=1,
            kv_cache_bytes_each=blocks_each * layout.block_bytes,
        )
        cleanup.callback(workers.close)
        rpool = RPool(workers.handles, 60)
        cleanup.callback(rpool.close)
        welcomes = open_session(rpool, facts, layout, kv_cache_bytes=None, timeout_s=60)
        settings: dict[str, object] = dict(
            max_num_seqs=4096,
            max_num_batched_tokens=8192,
            num_lanes=2,
            block_tokens=BLOCK_TOKENS,
            capacity_blocks=tuple(welcome.num_blocks for welcome in welcomes),
        )
        engine = Engine(
            sworker=EmulatedSWorker(facts, lambda tokens: args.s_ms / 1e3 * max(1.0, tokens / args.knee)),
            rpool=rpool,
            tokenizer=None,
            scheduler=Scheduler(SchedulerConfig(**settings | options)),  # type: ignore[arg-type]
            max_model_len=1 << 20,
            seed=0,
            on_step=records.append,
        )
        params = SamplingParams(temperature=0, max_tokens=args.output_len, ignore_eos=True)
        for _ in range(count):
            engine.add_request(engine.next_request_id(), [1] * args.input_len, params)
        while engine.has_work:
            engine.step()
    return records


def run_cpu(
    args: argparse.Namespace, directory: str, count: int, capacity_tokens: int, **options: object
) -> list[StepRecord]:
    """`count` sequences of a small model whose S-Part shares the cores with the R-worker."""
    log = Path(directory) / "steps.jsonl"
    token_bytes = 4 * 2 * 2 * 64 * 2  # layers, K and V, KV heads, head_dim, bytes
    with LLM(
        directory,
        kv_cache_dtype="float16",
        kv_cache_memory=capacity_tokens * token_bytes,
        block_tokens=BLOCK_TOKENS,
        max_num_seqs=4096,
        max_num_batched_tokens=8192,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,  # many prompts are equal
        step_log=log,
        **options,
    ) as llm:
        params = SamplingParams(temperature=0, max_tokens=args.output_len, ignore_eos=True)
        llm.generate([[1 + i % 7] * args.input_len for i in range(count)], params, use_tqdm=False)
    return list(read_step_log(log))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=96, help="sequences that fit at full length")
    parser.add_argument("--input-len", type=int, default=8)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--fillings", type=int, default=12, help="how many times the batch waits")
    parser.add_argument("--cpu-fillings", type=int, default=5, help="the same with the model on the CPU")
    parser.add_argument("--interval", type=int, default=16, help="steps between starts, with the same batch")
    parser.add_argument("--s-ms", type=float, default=4.0, help="of the S-Part, per layer and micro-batch")
    parser.add_argument("--knee", type=int, default=1024, help="tokens of a micro-batch from which on it takes longer")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--r-workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", default="bench/results/schedules.json")
    parser.add_argument("--plot", help="of the steps in the same memory, a .png")
    args = parser.parse_args()

    batch, length = args.batch, args.input_len + args.output_len
    capacity = batch * (length + BLOCK_TOKENS)
    limit = batch * (2 * args.input_len + args.output_len + args.interval) // 2  # (6), with prompts
    stabilised = POLICIES["stream"] | {"max_kv_load": limit, "start_interval": args.interval}
    settings = {
        "same batch": {"at once": POLICIES["at once"], "stream": stabilised},
        "same memory": POLICIES,
        "plain CPU": POLICIES,
    }
    results: dict[str, dict[str, list[Figures]]] = {}
    steps: dict[str, list[StepRecord]] = {}
    with tempfile.TemporaryDirectory() as directory:
        model = argparse.Namespace(hidden=512, mlp=1408, layers=4, q_heads=8, kv_heads=2, vocab=8000)
        make_model(model, directory)
        for repeat in range(args.repeats):
            for setting, policies in settings.items():
                for name, options in policies.items():
                    print(f"round {repeat + 1} of {args.repeats}: {setting}, {name}", file=sys.stderr)
                    if setting == "plain CPU":
                        count = batch * args.cpu_fillings
                        records = run_cpu(args, directory, count, capacity, **options)
                    else:
                        same_batch = setting == "same batch"
                        count = 3 * batch if same_batch else batch * args.fillings
                        count = batch if same_batch and name == "at once" else count
                        records = run_emulated(args, count, 2 * capacity if same_batch else capacity, **options)
                    if setting == "same memory":
                        steps[name] = records
                    found = figures(records, count * args.output_len)
                    results.setdefault(setting, {}).setdefault(name, []).append(found)
    summary = report(results)
    machine = {"processor": cpu_name(), "cores": len(available_cores())}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    record = {"fastdecode": __version__, "machine": machine, "arguments": vars(args), "results": summary}
    Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
    if args.plot:
        plot_steps(
            {name: steps[name] for name in ("at once", "stream", "greedy")}, args.plot, by_time=True,
            title=f"{batch * args.fillings} sequences of {length} tokens, KV for {batch} of them",
        )  # fmt: skip


def report(results: dict[str, dict[str, list[Figures]]]) -> dict[str, object]:
    """Medians over the rounds, and ratios to starting all at once within each round."""
    summary: dict[str, object] = {}
    for setting, policies in results.items():
        print(f"\n{setting:14}{'tokens/s':>10}{'steps':>8}{'step ms':>9}{'p99 ms':>9}{'peak W':>9}{'mean W':>9}"
              f"{'live':>7}{'preempted':>11}   ratio to at once: tokens/s, peak W, live")  # fmt: skip
        summary[setting] = rows = {}
        for name, rounds in policies.items():
            base = policies["at once"]
            median = Figures(
                *(statistics.median(column) for column in zip(*(asdict(f).values() for f in rounds), strict=True))
            )
            ratios = {
                key: [getattr(own, key) / getattr(other, key) for own, other in zip(rounds, base, strict=True)]
                for key in ("tokens_per_s", "peak_load", "live")
            }
            middle = [statistics.median(values) for values in ratios.values()]
            print(f"{name:14}{median.tokens_per_s:10.0f}{median.steps:8.0f}{median.mean_step_ms:9.2f}"
                  f"{median.largest_step_ms:9.2f}{median.peak_load:9.0f}{median.mean_load:9.0f}{median.live:7.0f}"
                  f"{median.preempted:11.0f}   " + ", ".join(f"{value:.2f}" for value in middle))  # fmt: skip
            rows[name] = {"median": asdict(median), "ratios": ratios, "rounds": [asdict(found) for found in rounds]}
    return summary


if __name__ == "__main__":
    main()
