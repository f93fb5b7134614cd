"""Three R-workers come to harm, again and again, while 200 requests are served: no token may change, nothing may hang.

Recovery computes with other numbers of rows, which round differently: a token that two others tie with, or that a draw
lies beside, may change for that reason alone (`near_ties.py`, which tells that from a fault); such are counted.

    python bench/chaos.py [--seeds 10] [--kv-cache-memory 256MiB] [--json FILE]

Two thirds of the prompts begin with one of four texts, some are the same to their end, and every fifth request wants
two samples: what an R-worker takes with it others began with, or wait for.  With little memory (4MiB) and
`--kv-policy greedy` sequences are preempted besides, and what ended ones leave behind is given up again and again; then
it is seen at the end that one prompt can have all blocks of every R-worker: that none is lost.

The workers are processes behind tcp://.  At random moments one is killed with SIGKILL (and started again by whoever
looks after it), one stopped with SIGSTOP (and let go on), and one has a link that drops, delays, doubles, damages or
swaps a message, is cut, or falls silent.  Each comes back by itself.  A blow that would fall on the last worker that is
left waits until another one is back.

    noticed      from the blow to the warning that names the worker; none: it was bridged over, as a delay should be
    stood still  the longest time without a finished step, from the blow until shortly after it was noticed
    at 2/3       until tokens come at two thirds of the undisturbed run's rate again, over half a second
    back         until the worker has a session again
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import fastdecode  # before torch, see there

# isort: split
import numpy as np

from bench.end_to_end import make_model
from bench.near_ties import assert_same_tokens
from cpu_attention import LISTENING, cpu_name
from fastdecode import LLM, RequestOutput, SamplingParams
from fastdecode.observe.step_log import StepRecord
from fastdecode.scheduling.kv_credits import KV_POLICIES
from transport.bad_link import HARMS, BadLink

KILLED, STOPPED, BEHIND_BAD_LINK = range(3)
_RESTART_S, _STOP_S = 0.5, 3.0
_WINDOW_S = 0.5
_EXPLAINS_S = 5.0  # a loss later than that after a blow is not its doing


class Worker:
    """An R-worker process that somebody looks after: it is started again at its address."""

    def __init__(self, kv_cache_memory: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._kv_cache_memory = kv_cache_memory
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "cpu_attention", "--bind", self.address]
        self.process = subprocess.Popen(
            [*command, "--kv-cache-memory", self._kv_cache_memory, "--threads", "1", "--log-level", "error"],
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout and self.process.stdout.readline().startswith(LISTENING)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Blow:
    harm: str
    worker: int
    at: float
    noticed: float | None = None
    back: float | None = None


@dataclass
class Run:
    """What happened, all in seconds of the monotonic clock."""

    prompts: list[list[int]] = field(default_factory=list)
    params: list[SamplingParams] = field(default_factory=list)
    outputs: list[RequestOutput] = field(default_factory=list)
    steps: list[tuple[float, int]] = field(default_factory=list)  # (when it was done, tokens)
    blows: list[Blow] = field(default_factory=list)
    unprovoked: list[str] = field(default_factory=list)  # losses that no blow explains
    num_preempted: int = 0
    share_found: float = 0.0  # of the prompts' tokens, those that did not go through the model

    def note(self, record: StepRecord) -> None:
        self.steps.append((time.monotonic(), record.num_decodes))
        self.num_preempted += record.num_preempted

    def rate(self, begin: float, end: float) -> float:
        """Tokens per second."""
        return sum(tokens for at, tokens in self.steps if begin < at <= end) / (end - begin)

    def usual_rate(self) -> float:
        """The median over windows of the middle half."""
        begin, end = self.steps[0][0], self.steps[-1][0]
        edges = np.arange(begin + 0.25 * (end - begin), begin + 0.75 * (end - begin), _WINDOW_S)
        return statistics.median(self.rate(edge, edge + _WINDOW_S) for edge in edges)


class _Listener(logging.Handler):
    """Puts what is logged of losses and returns beside the blows."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING or not isinstance(record.args, tuple):
            return
        now = time.monotonic()
        if record.name == "fastdecode.engine.recovery":
            worker = record.args[0].r_worker  # type: ignore[union-attr]
            blows = [blow for blow in self._run.blows if blow.worker == worker]
            if blows and blows[-1].noticed is None and now - blows[-1].at < _EXPLAINS_S:
                blows[-1].noticed = now
            else:
                self._run.unprovoked.append(record.getMessage())
        elif record.name == "fastdecode.holders.rejoin":
            for blow in self._run.blows:
                if f"R-worker {blow.worker} " in str(record.args[0]) and blow.noticed and blow.back is None:
                    blow.back = now


class Chaos(threading.Thread):
    def __init__(self, run: Run, llm: LLM, workers: list[Worker], link: BadLink, seed: int, num_blows: int) -> None:
        super().__init__(daemon=True)
        self._chaos, self._llm, self._workers, self._link = run, llm, workers, link
        self._random, self._num_blows = random.Random(seed), num_blows
        self.ends = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            targets: list[int] = []
            for _ in range(self._num_blows):
                if not targets:
                    targets = self._random.sample(range(3), 3)
                if self.ends.wait(self._random.uniform(0.2, 1.5)):
                    return
                self._strike(targets.pop())
        except BaseException as error:
            self.error = error

    def _is_sound(self, worker: int) -> bool:
        """It serves, and nothing is under way that would end that."""
        blows = [blow for blow in self._chaos.blows if blow.worker == worker]
        is_over = not blows or blows[-1].back or (not blows[-1].noticed and time.monotonic() - blows[-1].at > 4)
        return worker in self._llm._engine._rpool.alive and bool(is_over)

    def _strike(self, worker: int) -> None:
        while not self._is_sound(worker) or not any(map(self._is_sound, {0, 1, 2} - {worker})):
            if self.ends.wait(0.02):
                return
        process = self._workers[worker].process
        harm = {KILLED: "SIGKILL", STOPPED: "SIGSTOP"}.get(worker) or self._random.choice(HARMS)
        self._chaos.blows.append(Blow(harm, worker, time.monotonic()))
        if worker == KILLED:
            process.kill()
            process.wait()
            self.ends.wait(_RESTART_S)
            self._workers[worker].start()
        elif worker == STOPPED:
            process.send_signal(signal.SIGSTOP)
            threading.Timer(_STOP_S, process.send_signal, (signal.SIGCONT,)).start()
        else:
            self._link.strike(harm, self._random.randrange(8))


def requests(args: argparse.Namespace) -> tuple[list[list[int]], list[SamplingParams]]:
    """The same ones always."""
    generator = np.random.default_rng(0)

    def text(length: int) -> list[int]:
        return generator.integers(3, args.vocab, length).tolist()

    beginnings, prompts = [text(length) for length in (40, 64, 100, 150)], []
    for index, length in enumerate(generator.integers(4, 100, args.requests).tolist()):
        if index % 10 == 9:
            prompts.append(prompts[-int(generator.integers(1, 9))])
        else:
            prompts.append((beginnings[index % 4] if index % 3 else []) + text(length))
    params = [
        SamplingParams(
            temperature=0.8 if index % 4 == 0 else 0, max_tokens=int(length), ignore_eos=True, seed=index,
            n=1 + (index % 5 == 0),
        )
        for index, length in enumerate(generator.integers(args.output_len // 2, args.output_len, args.requests))
    ]  # fmt: skip
    return prompts, params


def serve(args: argparse.Namespace, model: str, seed: int | None) -> Run:
    """The requests once; without a seed nothing happens to anybody."""
    prompts, params = requests(args)
    run, workers = Run(prompts, params), [Worker(args.kv_cache_memory) for _ in range(3)]
    link = BadLink("127.0.0.1", workers[BEHIND_BAD_LINK].port, seed or 0)
    listener = _Listener(run)
    logging.getLogger("fastdecode").addHandler(listener)
    try:
        addresses = [workers[KILLED].address, workers[STOPPED].address, link.address]
        with LLM(
            model, r_worker_addresses=addresses, skip_tokenizer_init=True, max_num_seqs=args.sequences,
            start_policy="eager", max_num_batched_tokens=512, kv_policy=args.kv_policy, block_tokens=16,
        ) as llm:  # fmt: skip
            llm.generate(prompts[:4], SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
            llm._engine._records.on_step = run.note
            chaos = Chaos(run, llm, workers, link, seed or 0, args.blows if seed is not None else 0)
            chaos.start()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            chaos.ends.set()
            chaos.join(10)
            if chaos.error:
                raise chaos.error
            counts = llm._engine._scheduler.prefix_counts
            run.share_found = counts.num_found / counts.num_queried
            assert_nothing_left(llm)
    finally:
        logging.getLogger("fastdecode").removeHandler(listener)
        link.close()
        for worker in workers:
            worker.close()
    assert not any(output.error for output in outputs), [output.error for output in outputs if output.error]
    run.outputs = outputs
    return run


def assert_nothing_left(llm: LLM) -> None:
    """R-workers hold what the scheduler knows that they keep; and when they are told to give that up, all blocks are
    there: where one prompt can have them all, it gets them."""
    engine = llm._engine
    engine.heartbeat(_WINDOW_S)  # who has been stopped just now counts as lost
    for worker in engine._rpool.alive:
        held = {seq_id for at, seq_id in engine._rpool.held if at == worker}
        assert held == engine._scheduler.kept(worker), (held, engine._scheduler.kept(worker))
    engine._scheduler.check_integrity()
    most = min(engine.kv_capacity_tokens[worker] for worker in engine._rpool.alive)
    if most < llm.max_model_len:
        engine._scheduler.forget_prefixes()
        prompts = [[3 + worker] * most for worker in engine._rpool.alive]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
        assert not any(output.error for output in outputs), [output.error for output in outputs]
        engine._scheduler.check_integrity()


def figures(run: Run, usual_rate: float) -> list[dict[str, Any]]:
    """One record for each blow that had time to show."""
    last, records = run.steps[-1][0], []
    moments = [at for at, _ in run.steps]
    for blow in run.blows:
        if last - blow.at < 5:
            continue
        until = (blow.noticed or blow.at) + _WINDOW_S
        gaps = [b - a for a, b in itertools.pairwise(moments) if b > blow.at and a < until]
        begins = np.arange(blow.at, last - _WINDOW_S, 0.05)
        full = next((b for b in begins if run.rate(b, b + _WINDOW_S) >= 2 / 3 * usual_rate), None)
        records.append(
            {
                "harm": blow.harm,
                "noticed_s": None if blow.noticed is None else blow.noticed - blow.at,
                "stood_still_s": max(gaps, default=0.0),
                "two_thirds_s": None if full is None else full - blow.at,
                "back_s": None if blow.back is None else blow.back - blow.at,
            }
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"hidden": 256, "mlp": 512, "layers": 4, "q-heads": 8, "kv-heads": 4, "vocab": 1000}
    sizes = {"requests": 200, "sequences": 32, "output-len": 300, "seeds": 10, "first-seed": 0, "blows": 6}
    for name, default in (shape | sizes).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kv-cache-memory", default="256MiB", help="of each R-worker")
    parser.add_argument("--kv-policy", default="reserve-dynamic", choices=KV_POLICIES)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    records: list[dict[str, Any]] = []
    unprovoked: list[str] = []
    with tempfile.TemporaryDirectory() as model:
        make_model(args, model)
        plain = serve(args, model, None)
        usual = plain.usual_rate()
        print(f"undisturbed: {plain.steps[-1][0] - plain.steps[0][0]:.1f} s, {usual:.0f} tokens/s", flush=True)
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            run = serve(args, model, seed)
            try:
                ties = assert_same_tokens(Path(model), run.prompts, run.params, run.outputs, plain.outputs)
            except AssertionError as error:
                raise SystemExit(f"seed {seed}: other tokens than in the undisturbed run: {error}") from error
            records += figures(run, usual)
            unprovoked += run.unprovoked
            harms = ", ".join(blow.harm for blow in run.blows)
            took_s = run.steps[-1][0] - run.steps[0][0]
            seen = f"{run.share_found:.0%} of the prompts found, {run.num_preempted} preempted"
            equal = f"tokens equal but for {len(ties)} near-ties"
            print(f"seed {seed}: {took_s:.1f} s, {equal}; {seen}; {harms}", flush=True)
    print(f"\nfastdecode {fastdecode.__version__}, {cpu_name()}, {len(records)} blows; median (largest), seconds")
    print(f"{'harm':10} {'blows':>5} {'lost':>5} {'noticed':>14} {'stood still':>14} {'at 2/3':>14} {'back':>14}")
    for harm in ("SIGKILL", "SIGSTOP", *HARMS):
        own = [record for record in records if record["harm"] == harm]
        if own:
            num_lost = sum(record["noticed_s"] is not None for record in own)
            cells = [_cell(own, key) for key in ("noticed_s", "stood_still_s", "two_thirds_s", "back_s")]
            print(f"{harm:10} {len(own):5} {num_lost:5} " + " ".join(f"{cell:>14}" for cell in cells))
    print(f"losses without a blow: {len(unprovoked)}", *unprovoked, sep="\n    ")
    if args.json:
        record = {"machine": cpu_name(), "settings": vars(args), "blows": records, "unprovoked": unprovoked}
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")


def _cell(records: list[dict[str, Any]], key: str) -> str:
    values = [record[key] for record in records if record[key] is not None]
    return f"{statistics.median(values):.2f} ({max(values):.2f})" if values else "none"


if __name__ == "__main__":
    main()
