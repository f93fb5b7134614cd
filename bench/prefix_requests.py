"""Very many requests that begin like one another: nothing wrong is begun with, nothing leaks, memory stays as it is.

    python bench/prefix_requests.py [--requests 100000] [--engine-requests 10000] [--out FILE]

    scheduler   its steps alone, beside a KVStore for each R-worker that does what the step tells it; no model
    engine      short requests through a small model and R-workers in this process

Beginnings are drawn from 1,000 by Zipf's law, and are of all lengths, some of several blocks more than others; what
comes after is anybody's own.  Some requests are aborted; memory is short, so some are preempted, and what ended ones
leave behind is given up again and again; R-workers of the scheduler's are lost and come back.  At intervals the books
of both sides are compared: what a store holds beside what runs is what the scheduler counts as kept.  At the end, when
that is forgotten, no block is held.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import fastdecode  # before torch, see there

# isort: split
import numpy as np
import psutil

from bench.end_to_end import make_model
from bench.near_ties import assert_same_tokens
from cpu_attention import KVStore, RWorker, cpu_name
from fastdecode import LLM, SamplingParams
from fastdecode.observe.step_log import StepRecord
from fastdecode.scheduling.config import SchedulerConfig
from fastdecode.scheduling.plan import Step
from fastdecode.scheduling.request import Request, Sequence
from fastdecode.scheduling.scheduler import Loss, Scheduler

SHAPE = SimpleNamespace(hidden=64, mlp=96, layers=2, q_heads=4, kv_heads=2, vocab=1000)
_VOCAB = SHAPE.vocab
_KV_BYTES = 256 << 10  # of an R-worker
_WARM_UP = 0.2  # of the requests: from then on memory is to stay as it is


class Prompts:
    """The same ones for the same seed."""

    def __init__(self, seed: int, num_beginnings: int, longest: int) -> None:
        self.generator = np.random.default_rng(seed)
        lengths = self.generator.integers(1, longest, num_beginnings)
        self._beginnings = [self._text(int(length)) for length in lengths]
        # Some go on from another one, as conversations do.
        for i in range(0, num_beginnings, 3):
            self._beginnings[i] = (*self._beginnings[i // 2], *self._beginnings[i])[:longest]
        shares = 1 / np.arange(1, num_beginnings + 1)
        self._ends = np.cumsum(shares / shares.sum())

    def _text(self, length: int) -> tuple[int, ...]:
        return tuple(self.generator.integers(3, _VOCAB, length).tolist())

    def draw(self, longest: int) -> tuple[int, ...]:
        which = int(np.searchsorted(self._ends, self.generator.random()))
        beginning = self._beginnings[min(which, len(self._beginnings) - 1)]
        kept = len(beginning) if self.generator.random() < 0.8 else int(self.generator.integers(0, len(beginning)))
        return beginning[:kept] + self._text(int(self.generator.integers(1, longest)))


class Memory:
    """Of this process, seen from time to time."""

    def __init__(self) -> None:
        self._process = psutil.Process()

    def look(self) -> dict[str, int]:
        gc.collect()
        return {"rss_bytes": self._process.memory_info().rss, "objects": len(gc.get_objects())}


class Mirror:
    """An R-worker's part of the scheduler's steps, without K and V; and whether what is begun with is right."""

    def __init__(self, capacity_blocks: tuple[int, ...], block_tokens: int) -> None:
        layout: Any = SimpleNamespace(
            block_bytes=1, block_tokens=block_tokens, layers=(), heads=(), num_blocks=lambda n: -(-n // block_tokens)
        )
        self._make = [partial(KVStore, layout, blocks) for blocks in capacity_blocks]
        self.stores = [make() for make in self._make]
        self._tokens: dict[tuple[int, int], tuple[int, ...]] = {}  # whose K and V are there

    def begin(self, step: Step) -> None:
        self.release(step.preempted)
        for worker, cut in step.cut.items():
            for seq_id, num_tokens in cut.items():
                if num_tokens:
                    self.stores[worker].truncate(seq_id, num_tokens)
                    self._tokens[worker, seq_id] = self._tokens[worker, seq_id][:num_tokens]
                else:
                    self.release({worker: [seq_id]})
        for admission in step.admissions:
            self.stores[admission.r_worker].admit(admission.seq_id, admission.max_tokens)
            self._tokens[admission.r_worker, admission.seq_id] = ()
        for forking in step.forkings:
            of, count = self._tokens[forking.r_worker, forking.parent], forking.num_tokens
            assert 0 < count <= len(of) and not self._tokens[forking.r_worker, forking.seq_id]
            self.stores[forking.r_worker].fork([forking.seq_id], [forking.parent], [count])
            self._tokens[forking.r_worker, forking.seq_id] = of[:count]
        for segment in step.segments:
            where = segment.r_worker, segment.seq_id
            assert len(self._tokens[where]) == segment.start, "positions follow one another"
            self._tokens[where] += segment.token_ids
            self.stores[segment.r_worker].extend({segment.seq_id: segment.num_tokens})

    def lose(self, worker: int, loss: Loss) -> None:
        """The R-worker is empty, as when it is back; on the others is undone what did not happen."""
        self.stores[worker] = self._make[worker]()
        self._tokens = {where: tokens for where, tokens in self._tokens.items() if where[0] != worker}
        for other, seq_ids in loss.released.items():
            self.release({other: [seq_id for seq_id in {*seq_ids} if (other, seq_id) in self._tokens]})
        for other, kept in loss.kept.items():
            for seq_id, num_tokens in kept.items() if other != worker else ():
                self.stores[other].truncate(seq_id, num_tokens)
                self._tokens[other, seq_id] = self._tokens[other, seq_id][:num_tokens]

    def check(self, sequence: Sequence, worker: int) -> None:
        """It has the K and V of its own tokens, whoever computed them."""
        stored = self._tokens[worker, sequence.seq_id]
        assert stored == sequence.token_ids[: len(stored)], "it began with what is not its own"

    def release(self, gone: Mapping[int, list[int]]) -> None:
        """gone: R-worker -> sequences"""
        for worker, seq_ids in gone.items():
            for seq_id in seq_ids:
                self.stores[worker].release(seq_id)
                del self._tokens[worker, seq_id]

    def check_integrity(self, scheduler: Scheduler, running: dict[int, Sequence]) -> None:
        """While no step is under way."""
        scheduler.check_integrity()
        for worker, store in enumerate(self.stores):
            store.check_integrity()
            own = {seq_id for seq_id, one in running.items() if one.r_worker == worker and one.is_known}
            assert own <= store.seq_ids and scheduler.kept(worker) <= store.seq_ids
            waiting = {seq_id for seq_id, one in running.items() if one.r_worker is None}
            untold = store.seq_ids - own - scheduler.kept(worker)
            assert untold <= waiting, "nothing is there but what runs, is kept, or was thrown out just now"


def a_sequence(seq_id: int, prompt: tuple[int, ...], num_output: int, generator: np.random.Generator) -> Sequence:
    request = Request(
        request_id=str(seq_id),
        prompt_token_ids=prompt,
        params=SamplingParams(temperature=1.0, max_tokens=num_output),
        max_new_tokens=num_output,
        stop_token_ids=frozenset(),
        eos_token_ids=frozenset({2}),
        priority=int(generator.random() < 0.05),
        cache_salt=None if generator.random() < 0.9 else "salt",
    )
    return Sequence(seq_id, request, 0, 0)


class Progress:
    """How far it is; at marks, when nothing is under way, the books are compared and memory is looked at."""

    def __init__(self, what: str, num_requests: int) -> None:
        self._what, self._num_requests, self._began_s = what, num_requests, time.perf_counter()
        self._marks = [round(share * num_requests / 20) for share in range(1, 21)]
        self._memory = Memory()
        self.num_checks, self._checking_s, self.seen = 0, 0.0, dict[str, dict[str, int]]()

    def is_due(self, num_done: int) -> bool:
        return bool(self._marks) and num_done >= self._marks[0]

    def check(self, check_integrity: Callable[[], None]) -> None:
        began_s, mark = time.perf_counter(), self._marks.pop(0)
        check_integrity()
        self.num_checks += 1
        if mark == round(_WARM_UP * self._num_requests):
            self.seen["warm"] = self._memory.look()
        took_s = time.perf_counter() - self._began_s
        print(
            f"\r{self._what}: {mark:,} of {self._num_requests:,}, {took_s:.0f} s", end="", file=sys.stderr, flush=True
        )
        self._checking_s += time.perf_counter() - began_s

    def end(self) -> dict[str, Any]:
        """But for the last look at memory, which whoever runs takes when all is forgotten."""
        took_s = time.perf_counter() - self._began_s - self._checking_s
        print(file=sys.stderr)
        self.seen["end"] = self._memory.look()
        return {
            "requests": self._num_requests,
            "requests_per_s": round(self._num_requests / took_s, 1),
            "checks": self.num_checks,
            "memory": self.seen,
        }


def run_scheduler(num_requests: int, *, num_workers: int = 3, num_lanes: int = 2, seed: int = 0) -> dict[str, Any]:
    """Every request to its end; figures.  Raises AssertionError.  One of several R-workers is lost now and then."""
    block_tokens, capacity = 16, (160,) * num_workers
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=64, max_num_batched_tokens=1024, num_lanes=num_lanes, block_tokens=block_tokens,
            capacity_blocks=capacity, kv_policy="greedy", start_policy="eager", sharing="prompts",
        )
    )  # fmt: skip
    prompts, mirror = Prompts(seed, 1000, 300), Mirror(capacity, block_tokens)
    progress, draw = Progress("scheduler", num_requests), prompts.generator
    live: dict[int, Sequence] = {}
    under_way: list[Step] = []
    counts = {"steps": 0, "aborted": 0, "preempted": 0, "shared_beginnings": 0, "lost_workers": 0}
    num_added, lost = 0, None  # which R-worker is

    def remove(sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            live.pop(sequence.seq_id, None)
            counts["preempted"] += sequence.num_preemptions
        mirror.release(scheduler.remove(sequences))

    def begin(lane: int) -> None:
        if step := scheduler.schedule(lane):
            mirror.begin(step)
            under_way.append(step)
            counts["steps"] += 1
            for forking in step.forkings:
                counts["shared_beginnings"] += 1
                mirror.check(live[forking.seq_id], forking.r_worker)

    while num_added < num_requests or live:
        while num_added < num_requests and len(live) < 100:
            sequence = a_sequence(num_added, prompts.draw(60), int(draw.integers(1, 40)), draw)
            live[num_added] = sequence
            scheduler.add(sequence)
            num_added += 1
        if draw.random() < 0.02 and live:
            counts["aborted"] += 1
            remove([live[list(live)[int(draw.integers(len(live)))]]])
        if lost is not None and draw.random() < 0.1:
            scheduler.gain(lost, capacity[lost])
            lost = None
        elif lost is None and num_workers > 1 and draw.random() < 0.01:
            lost = int(draw.integers(num_workers))
            loss = scheduler.lose(lost)
            mirror.lose(lost, loss)
            under_way = [step for step in under_way if step.lane not in loss.broken]
            counts["lost_workers"] += 1
        is_due = progress.is_due(num_added)
        for lane in range(num_lanes):
            if not is_due and all(step.lane != lane for step in under_way):
                begin(lane)
        if under_way:
            step = under_way.pop(0)
            remove(scheduler.commit(step, draw.integers(2, _VOCAB, len(step.sampled))))
        elif is_due:
            progress.check(lambda: mirror.check_integrity(scheduler, live))
    scheduler.forget_prefixes()
    last = live[num_requests] = a_sequence(num_requests, (5,), 9, draw)
    scheduler.add(last)
    begin(0)
    scheduler.commit(under_way.pop(), np.full(1, 5))
    remove([last])
    mirror.check_integrity(scheduler, live)
    assert all(store.num_free_blocks == store.num_blocks for store in mirror.stores), "a block is held"
    found = scheduler.prefix_counts
    return progress.end() | counts | {"share_found": round(found.num_found / found.num_queried, 4)}


def run_engine(num_requests: int, model: Path, *, num_workers: int = 2, seed: int = 1) -> dict[str, Any]:
    """Likewise.  Tokens of one request in 100 are compared with those of an LLM where nobody shares anything."""
    workers: list[RWorker] = []
    options: dict[str, Any] = {"skip_tokenizer_init": True, "block_tokens": 16, "max_num_seqs": 64}

    class Noted(RWorker):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            workers.append(self)

    counts = {"aborted": 0, "preempted": 0}
    compared: dict[str, tuple[list[int], SamplingParams, list[int]]] = {}
    prompts = Prompts(seed, 1000, 100)
    draw = prompts.generator
    with (
        mock.patch("fastdecode.holders.launch.RWorker", Noted),
        LLM(
            model, num_r_workers=num_workers, micro_batches=2, kv_cache_memory=_KV_BYTES * num_workers,
            kv_policy="greedy", start_policy="eager", **options,
        ) as llm,
    ):  # fmt: skip
        engine, progress = llm._engine, Progress("engine", num_requests)
        scheduler = engine._scheduler
        stores = [worker._session.store for worker in workers if worker._session]
        assert len(stores) == num_workers
        live: dict[str, tuple[list[int], SamplingParams]] = {}
        num_added = 0

        def note(record: StepRecord) -> None:
            counts["preempted"] += record.num_preempted

        def check_integrity() -> None:
            engine._rpool.settle()
            scheduler.check_integrity()
            for worker, store in enumerate(stores):
                store.check_integrity()
                assert store.seq_ids == scheduler.kept(worker), "what is kept is what is there"

        def pass_step() -> None:
            for output in engine.step():
                assert not output.error, output.error
                prompt, params = live.pop(output.request_id)
                if int(output.request_id) % 100 == 0:
                    compared[output.request_id] = prompt, params, output.outputs[0].token_ids

        engine._records.on_step = note
        while num_added < num_requests or engine.has_work:
            is_due = progress.is_due(num_added)
            if is_due and not engine.has_work:
                progress.check(check_integrity)
                continue
            while not is_due and num_added < num_requests and len(live) < 100:
                prompt = list(prompts.draw(30))
                num_new = int(draw.integers(1, 12))
                params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
                live[name := engine.next_request_id()] = prompt, params
                engine.add_request(name, prompt, params)
                num_added += 1
            if draw.random() < 0.02 and live:
                victim = list(live)[int(draw.integers(len(live)))]
                counts["aborted"] += 1
                del live[victim]
                engine.abort([victim])
            pass_step()
        while progress.is_due(num_added):
            progress.check(check_integrity)
        scheduler.forget_prefixes()
        engine.add_request(engine.next_request_id(), [5], SamplingParams(max_tokens=9, ignore_eos=True))
        pass_step()
        engine.abort_all()
        check_integrity()
        assert all(store.num_free_blocks == store.num_blocks for store in stores), "a block is held"
        found = scheduler.prefix_counts
        told = progress.end() | counts | {"share_found": round(found.num_found / found.num_queried, 4)}
    with LLM(model, kv_cache_memory="64MiB", enable_prefix_caching=False, **options) as llm:
        wanted = [(prompt, params) for prompt, params, _ in compared.values()]
        expected = llm.generate(*map(list, zip(*wanted, strict=True)), use_tqdm=False)  # type: ignore[arg-type]
    ties = assert_same_tokens(
        model, *map(list, zip(*compared.values(), strict=True)), [output.outputs[0].token_ids for output in expected]
    )
    return told | {"compared": len(compared), "near_ties": len(ties)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--engine-requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="JSON")
    args = parser.parse_args()
    told: dict[str, Any] = {"machine": cpu_name(), "fastdecode": fastdecode.__version__, "seed": args.seed}
    told["scheduler"] = run_scheduler(args.requests, seed=args.seed)
    print(json.dumps(told["scheduler"]), flush=True)
    with tempfile.TemporaryDirectory() as directory:
        make_model(SHAPE, directory)
        told["engine"] = run_engine(args.engine_requests, Path(directory), seed=args.seed + 1)
    print(json.dumps(told["engine"]), flush=True)
    for part in ("scheduler", "engine"):
        memory = told[part]["memory"]
        for what in ("rss_bytes", "objects"):
            grown = memory["end"][what] / memory["warm"][what] - 1
            print(f"{part}: {what} at the end {grown:+.1%} of what they were after the warm-up")
    if args.out:
        args.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
