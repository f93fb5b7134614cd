"""What a step costs the host besides the model: by part, in a steady stream of sequences that start and end.

    python bench/step_cost.py [--sequences 64 1024 4096] [--kinds greedy sampled logprobs penalties]
    python bench/step_cost.py --label after --out bench/results/step_cost.json

    schedule   which tokens, on which lane and R-worker            begin    the R-workers are told of their rows
    flatten    the tokens of each lane behind one another          sample   logits [rows, 1000] to tokens, on one core
    commit     tokens to sequences, ends, releases                 a start  all that is asked before one starts

The scheduler, the R-worker pool (its channels drop what is sent), the sampler and the engine's commit are real; the
model is left out: logits are random, and sequences end where a length drawn beforehand says.  Starts are part of
`schedule`, too.  Medians over the steps; wall time, and in parentheses the processor's time of this thread, which other
work on the machine lengthens less.  What was measured before, under other labels, stands beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import fastdecode  # before torch, see there

# isort: split
import numpy as np
import torch

from bench.schedules import emulated_facts
from cpu_attention import cpu_name
from fastdecode import SamplingParams
from fastdecode.engine.engine import Engine
from fastdecode.engine.pipeline import flatten
from fastdecode.holders.rejoin import RWorkerHandle
from fastdecode.holders.rpool import RPool
from fastdecode.scheduling.config import SchedulerConfig
from fastdecode.scheduling.load_control import LoadControl
from fastdecode.scheduling.plan import Step
from fastdecode.scheduling.prospects import Prospects
from fastdecode.scheduling.scheduler import Scheduler
from gpu_sworker import EmulatedSWorker, Sampled, SamplingRows, SWorker
from transport import Message

VOCAB, END = 1000, 1
BLOCK_TOKENS = 64
PROMPT_TOKENS = 64
OUTPUT_TOKENS = 64, 192  # from, to, evenly
KV_TOKENS_EACH = 200  # memory per seat: less than all predicted ends together, so that ends in between count
GOALS_MS = {1024: 3.0, 4096: 10.0}
GOAL_START_MS = 0.2
PARTS = ("schedule", "flatten", "begin", "sample", "commit")
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.9},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.2},
}

_Result = TypeVar("_Result")


@dataclass
class Spent:
    """Seconds of one part, per step."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @contextmanager
    def measured(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.wall.append(time.perf_counter() - wall)
            self.cpu.append(time.thread_time() - cpu)


class DeafChannel:
    """Drops what is sent."""

    def send(self, message: Message, *, timeout_s: float) -> None:
        pass

    def close(self) -> None:
        pass


class NoModel(EmulatedSWorker):
    """Made-up logits through the real sampler."""

    def __init__(self) -> None:
        super().__init__(replace(emulated_facts(1, 1, 1, 16), vocab_size=VOCAB), lambda _: 0.0)
        self.is_sampling = False  # while the machine is only filled

    def sample(self, logits: torch.Tensor, rows: SamplingRows) -> Sampled:
        if not self.is_sampling:
            return super().sample(logits, rows)
        return SWorker.sample(self, logits, rows)  # type: ignore[arg-type]  # which uses nothing of itself


class Rig:
    """An engine with everything but a model, kept full of sequences."""

    def __init__(self, sequences: int, lanes: int, r_workers: int, params: dict[str, Any]) -> None:
        self._params, self._sequences = params, sequences
        self._random = np.random.default_rng(0)
        self._true_tokens: dict[str, int] = {}  # by request
        self._rpool = RPool([RWorkerHandle(f"R-worker {i}", DeafChannel()) for i in range(r_workers)], 60.0)  # type: ignore[arg-type]
        self.sworker = NoModel()
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=sequences,
                max_num_batched_tokens=sequences + max(512, sequences),
                num_lanes=lanes,
                block_tokens=BLOCK_TOKENS,
                capacity_blocks=(sequences * (KV_TOKENS_EACH + BLOCK_TOKENS) // BLOCK_TOKENS // r_workers,) * r_workers,
            )
        )
        self._engine = Engine(
            sworker=self.sworker,
            rpool=self._rpool,
            scheduler=self._scheduler,
            tokenizer=None,
            max_model_len=4096,
            seed=0,
            eos_token_ids=frozenset({END}),
        )
        self.num_running = 0
        self.num_starts: list[int] = []  # per step
        self.parts = {part: Spent() for part in PARTS}
        self.starts = Spent()

    def fill(self) -> None:
        """So that as many wait as could start in a step."""
        while self._engine.num_waiting < self._sequences // 4 + 16:
            request_id = self._engine.next_request_id()
            length = int(self._random.integers(*OUTPUT_TOKENS))
            if int(request_id) < self._sequences:  # the first ones end as if they had run for some time
                length = int(self._random.integers(1, length + 1))
            self._true_tokens[request_id] = length
            prompt = self._random.integers(2, VOCAB, PROMPT_TOKENS).tolist()
            params = SamplingParams(**self._params, max_tokens=512)
            self._engine.add_request(request_id, prompt, params)

    def step(self) -> None:
        """The parts of `Engine.step` for a step of each lane, without the layers between them."""
        self.fill()
        with self._starts_measured(), self._measured("schedule"):
            steps = [step for lane in range(self._scheduler.num_lanes) if (step := self._scheduler.schedule(lane))]
        assert steps, "it is kept full"
        self.num_starts.append(sum(len(step.admissions) for step in steps))
        self.num_running = self._engine.num_running
        with self._measured("flatten"):
            batches = [flatten(step) for step in steps]
        with self._measured("begin"):
            for step in steps:
                self._rpool.admit(step.admissions)
                self._rpool.begin(step)
        results = self._sample(steps, [len(batch.logits_rows) for batch in batches])
        with self._measured("commit"):
            for step, result in zip(steps, results, strict=True):
                self._engine._records.began[step.lane] = 0.0
                self._engine._commit(step, result)

    def _sample(self, steps: list[Step], num_rows: list[int]) -> list[Any]:
        logits = [torch.from_numpy(self._random.standard_normal((rows, VOCAB), np.float32)) for rows in num_rows]
        with self._measured("sample"):
            results = [self._engine._sample(*pair) for pair in zip(steps, logits, strict=True)]
        for step, result in zip(steps, results, strict=True):
            result.sampled.token_ids[:] = self._random.integers(2, VOCAB, len(result.sampled.token_ids))
            for row, seq_id in enumerate(step.sampled):
                sequence = self._scheduler.running(seq_id)
                if len(sequence.output_token_ids) + 1 >= self._true_tokens[sequence.request.request_id]:
                    result.sampled.token_ids[row] = END
        return results

    def _measured(self, part: str) -> Any:
        return self.parts[part].measured()

    @contextmanager
    def _starts_measured(self) -> Iterator[None]:
        """What is asked and written for whoever may start, as long as it takes in all."""
        wall = cpu = 0.0
        depth = 0

        def counted(function: Callable[..., _Result]) -> Callable[..., _Result]:
            def call(*args: Any, **options: Any) -> _Result:
                nonlocal wall, cpu, depth
                depth += 1
                began_wall, began_cpu = time.perf_counter(), time.thread_time()
                try:
                    return function(*args, **options)
                finally:
                    depth -= 1
                    if not depth:
                        wall += time.perf_counter() - began_wall
                        cpu += time.thread_time() - began_cpu

            return call

        with ExitStack() as patches:
            for owner, name in (
                (Prospects, "of"),
                (Prospects, "expected_tokens"),
                (LoadControl, "place"),
                (LoadControl, "start"),
            ):
                patches.enter_context(mock.patch.object(owner, name, counted(getattr(owner, name))))
            yield
        self.starts.wall.append(wall)
        self.starts.cpu.append(cpu)


@dataclass(frozen=True)
class Cost:
    """Medians per step, in milliseconds of wall and of this thread's processor time."""

    sequences: int
    kind: str
    running: int
    starts_per_step: float
    parts_ms: dict[str, float]
    parts_cpu_ms: dict[str, float]
    step_ms: float
    step_cpu_ms: float
    start_ms: float  # each
    start_cpu_ms: float


def measure(sequences: int, kind: str, args: argparse.Namespace) -> Cost:
    rig = Rig(sequences, args.lanes, args.r_workers, KINDS[kind])
    # Until lengths are learned, from some hundreds of ends.
    warm_up = args.warm_up if sequences > 256 else 4 * args.warm_up
    for _ in range(warm_up):
        rig.step()
    rig.sworker.is_sampling = True
    for _ in range(2):
        rig.step()
    rig.num_starts, rig.parts, rig.starts = [], {part: Spent() for part in PARTS}, Spent()
    steps = args.steps if kind == "greedy" else max(1, args.steps // 4)
    for _ in range(steps):
        rig.step()

    def median_ms(values: list[float]) -> float:
        return statistics.median(values) * 1e3

    def each_ms(values: list[float]) -> float:
        return median_ms([value / num for value, num in zip(values, rig.num_starts, strict=True) if num] or [0.0])

    return Cost(
        sequences=sequences,
        kind=kind,
        running=rig.num_running,
        starts_per_step=sum(rig.num_starts) / steps,
        parts_ms={part: median_ms(spent.wall) for part, spent in rig.parts.items()},
        parts_cpu_ms={part: median_ms(spent.cpu) for part, spent in rig.parts.items()},
        step_ms=median_ms([sum(of) for of in zip(*(spent.wall for spent in rig.parts.values()), strict=True)]),
        step_cpu_ms=median_ms([sum(of) for of in zip(*(spent.cpu for spent in rig.parts.values()), strict=True)]),
        start_ms=each_ms(rig.starts.wall),
        start_cpu_ms=each_ms(rig.starts.cpu),
    )


def _line(label: str, cost: dict[str, Any]) -> str:
    parts = " ".join(f"{cost['parts_ms'][part]:7.2f} ({cost['parts_cpu_ms'][part]:7.2f})" for part in PARTS)
    goal = GOALS_MS.get(cost["sequences"])
    within = "" if goal is None or cost["kind"] != "greedy" else f" of {goal:.0f}"
    step = f"{cost['step_ms']:8.2f} ({cost['step_cpu_ms']:8.2f}){within:6}"
    start = f"{cost['start_ms']:7.3f} ({cost['start_cpu_ms']:.3f}) of {GOAL_START_MS}"
    return f"{cost['sequences']:5} {cost['kind']:9} {label:10} {parts} {step} {start}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[64, 1024, 4096])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--lanes", type=int, default=2, help="that share the sequences; the figures are of all lanes")
    parser.add_argument("--r-workers", type=int, default=2)
    parser.add_argument(
        "--steps",
        type=int,
        default=40,
        help="that are measured; a fourth of them where tokens are not just the likeliest",
    )
    parser.add_argument("--warm-up", type=int, default=150, help="steps before, until lengths are learned")
    parser.add_argument("--label", default="now", help="what these figures are called in --out")
    parser.add_argument("--out", type=Path, metavar="FILE", help="they are written there, beside those of other labels")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"fastdecode {fastdecode.__version__}, {cpu_name()}; ms per step, wall (of this thread)")
    print(f"{'':27}" + "".join(f"{part:>18}" for part in PARTS) + f"{'all of them':>20}{'a start':>29}")
    known = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    found: list[dict[str, Any]] = []
    for sequences in args.sequences:
        for kind in args.kinds:
            cost = asdict(measure(sequences, kind, args))
            found.append(cost)
            for label, other in known.items():
                for before in other["results"]:
                    if label != args.label and (before["sequences"], before["kind"]) == (sequences, kind):
                        print(_line(label, before))
            print(_line(args.label, cost), flush=True)
            if args.out:
                settings = {name: getattr(args, name) for name in ("lanes", "r_workers", "steps", "warm_up")}
                known[args.label] = {"machine": cpu_name(), "settings": settings, "results": found}
                args.out.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
