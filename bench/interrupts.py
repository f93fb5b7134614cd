"""Ctrl-C at random moments of `LLM.generate`: no R-worker is lost by it, and what comes after is right.

    python bench/interrupts.py [--rounds 200] [--transports inproc shm ipc tcp] [--out bench/results/interrupts.json]

A round is a generate of 30 prompts that begin alike, some with two samples, which one, two or three signals interrupt,
0 to 200 ms apart, the first one 0 to 300 ms after it began; then another generate, whose tokens have to be those that
they were at the beginning, and the scheduler and the engine have to agree about what is left on the R-workers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from fastdecode import LLM, SamplingParams

ROOT = Path(__file__).parents[1]
BEGINNING = '"""Numbers of Fibonacci, and others that are sums of those before them."""\n\n\n' * 3
PROMPT = BEGINNING + "def fib(n):"
PROMPTS = [PROMPT if i % 3 else f"{BEGINNING}def fib{i}(n):" for i in range(30)]
SHORT = SamplingParams(temperature=0, max_tokens=8)
LONG = [SamplingParams(temperature=0, max_tokens=800, ignore_eos=True, n=1 + (i % 5 == 0)) for i in range(30)]


def interrupt(pauses_s: list[float]) -> None:
    for pause_s in pauses_s:
        time.sleep(pause_s)
        os.kill(os.getpid(), signal.SIGINT)


class Target:
    """What Ctrl-C interrupts: the generate, whatever it is in the middle of, and not this script around it."""

    def __init__(self) -> None:
        self.is_exposed = False
        signal.signal(signal.SIGINT, self._handle)

    def run(self, action: Callable[[], object]) -> bool:
        """Whether it was interrupted."""
        try:
            try:
                self.is_exposed = True
                action()
                return False
            finally:
                self.is_exposed = False
        except KeyboardInterrupt:
            self.is_exposed = False
            return True

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.is_exposed:
            raise KeyboardInterrupt


def run(transport: str, rounds: int, draw: random.Random) -> dict[str, Any]:
    counts, errors, target = Counter[str](), Counter[str](), Target()
    num_workers = 1 if transport == "inproc" else 2
    began = time.monotonic()
    with LLM(
        ROOT / "scripts" / "demo_model", transport=transport, kv_cache_memory="64MiB", num_r_workers=num_workers,
        linear_kernel="plain",
    ) as llm:  # fmt: skip
        base = llm.generate(PROMPT, SHORT, use_tqdm=False)[0].outputs[0].token_ids
        for _ in range(rounds):
            pauses_s = [draw.uniform(0, 0.3), *(draw.uniform(0, 0.2) for _ in range(draw.randrange(3)))]
            counts["signals"] += len(pauses_s)
            thread = threading.Thread(target=interrupt, args=(pauses_s,))
            thread.start()
            try:
                counts["interrupted"] += target.run(lambda: llm.generate(PROMPTS, LONG, use_tqdm=False))
            except Exception as error:
                errors[f"{type(error).__name__}: {error}"] += 1
            thread.join()
            try:
                again = llm.generate([PROMPT] * 3, SHORT, use_tqdm=False)
                counts["wrong_outputs"] += sum(output.outputs[0].token_ids != base for output in again)
            except Exception as error:
                errors[f"{type(error).__name__}: {error}"] += 1
            engine = llm._engine
            for worker in engine._rpool.alive:
                held = {seq_id for at, seq_id in engine._rpool.held if at == worker}
                counts["wrong_books"] += held != engine._scheduler.kept(worker)
            engine._scheduler.check_integrity()
        counts["workers_lost"] = llm._engine.totals.num_lost
    names = ("signals", "interrupted", "wrong_outputs", "wrong_books", "workers_lost")
    told = {"transport": transport, "rounds": rounds, **{name: counts[name] for name in names}}
    return {**told, "errors": dict(errors), "seconds": round(time.monotonic() - began, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200, help="of all transports together")
    parser.add_argument("--transports", nargs="+", default=["inproc", "shm", "ipc", "tcp"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="JSON")
    args = parser.parse_args()
    draw, results = random.Random(args.seed), []
    for transport in args.transports:
        results.append(run(transport, args.rounds // len(args.transports), draw))
        print(results[-1], flush=True)
    if args.out:
        args.out.write_text(json.dumps({"seed": args.seed, "results": results}, indent=1) + "\n")
    return int(
        any(each["errors"] or each["wrong_outputs"] or each["wrong_books"] or each["workers_lost"] for each in results)
    )


if __name__ == "__main__":
    sys.exit(main())
