"""What an R-worker's call for a layer takes beside the kernel's own loop: casts, storing, threads, putting together.

    python bench/r_worker_layer.py                       512 rows x 32 heads x 128, 8 and 32 KV heads, three wires
    python bench/r_worker_layer.py --before DIRECTORY    the same of another checkout beside it, taking turns

The *call* is `RWorker.handle(Attend)` of a decode step, of frames as they come from the wire.  The *loop* is attention
alone over the same rows, K and V on the same threads: q in float32, nothing to store, cast or merge.  What is
*around* is the rest of the call: by the clock, and of the processor's time, which others on the machine disturb less.
Machines drift, so in each repeat everything is timed once, one right after the other, and medians are shown, of times
as of ratios within a repeat.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WIRES = ("float32", "float16", "bfloat16")
FILL_TOKENS = 1 << 14  # that one message brings, while the sequences are filled


@dataclass(frozen=True)
class Case:
    wire: str
    kv_dtype: str
    num_kv_heads: int
    context: int  # tokens of each sequence, the new one included
    num_threads: int
    num_rows: int = 512
    num_q_heads: int = 32
    head_dim: int = 128

    @property
    def kv_bytes(self) -> int:
        """About."""
        return self.num_rows * (self.context + 64) * self.num_kv_heads * self.head_dim * 4


class Layer:
    """An R-worker with a session of one layer; stands still at `context` tokens for each sequence."""

    def __init__(self, case: Case) -> None:
        import numpy as np

        from cpu_attention import NUMBER_DTYPES, RWorker, available_cores, pin_thread
        from transport import Admit, Attend, Hello, LayerSpec, Rewind, Rows

        self.case, self.np, self.messages, self.step = case, np, (Attend, Rewind, Rows), 0
        cores = available_cores()
        pin_thread(cores[0])
        self.worker = RWorker(kv_cache_bytes=2 * case.kv_bytes, num_threads=case.num_threads, cores=cores)
        spec = LayerSpec(case.num_q_heads, case.num_kv_heads, case.head_dim, case.head_dim**-0.5)
        self._ask(Hello((spec,), case.kv_dtype, 64))
        self.seq_ids = np.arange(case.num_rows)
        self._ask(Admit(self.seq_ids, np.full(case.num_rows, case.context + 1, np.int32)))
        generator = np.random.default_rng(0)

        def frame(rows: int, heads: int) -> Any:
            array = generator.standard_normal((rows, heads, case.head_dim), np.float32).astype(NUMBER_DTYPES[case.wire])
            return np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape)  # read-only

        at_once = max(1, FILL_TOKENS // case.context)
        for first in range(0, case.num_rows, at_once):
            seq_ids = self.seq_ids[first : first + at_once]
            count = len(seq_ids) * (case.context - 1)
            kv = frame(count, case.num_kv_heads)
            self._begin(seq_ids, 0, case.context - 1, 0)
            self._ask(Attend(self.step, 0, 0, frame(0, case.num_q_heads), kv, kv))
        self.q, self.k, self.v = (
            frame(case.num_rows, heads) for heads in (case.num_q_heads, case.num_kv_heads, case.num_kv_heads)
        )
        self.floats = self.q.astype(np.float32)

    def time(self) -> dict[str, float]:
        """Seconds of a loop and of a call, and of the processors that worked on them."""
        Attend, Rewind, _ = self.messages
        self._begin(self.seq_ids, self.case.context - 1, 1, 1)
        session = self.worker._session
        batch, store, [rule] = session.micro_batches[0], session.store, session.rules
        work, attention = batch.works[None], self.worker._attention
        loop = timed(
            lambda: attention.attend_part(
                self.floats, store.data[0], store.layout.heads[0], batch.block_tables, work, rule
            )
        )
        message = Attend(self.step, 0, 0, self.q, self.k, self.v)
        call = timed(lambda: self._ask(message))
        self._ask(Rewind(self.seq_ids, self.np.full(self.case.num_rows, self.case.context - 1, self.np.int32)))
        return {"loop": loop.seconds, "loop_cpu": loop.cpu_seconds, "call": call.seconds, "call_cpu": call.cpu_seconds}

    def _begin(self, seq_ids: Any, start: int, num_tokens: int, num_queries: int) -> None:
        self.step += 1
        columns = (self.np.full(len(seq_ids), number, self.np.int32) for number in (start, num_tokens, num_queries))
        self._ask(self.messages[2](self.step, 0, seq_ids, *columns))

    def _ask(self, message: Any) -> None:
        answer = self.worker.handle(1, message)
        if type(answer).__name__ == "Failure":
            raise SystemExit(f"the R-worker says: {answer.text}")


@dataclass(frozen=True)
class Timed:
    seconds: float
    cpu_seconds: float  # of all threads


def timed(call: Callable[[], Any]) -> Timed:
    began, cpu_began = time.perf_counter(), time.process_time()
    call()
    return Timed(time.perf_counter() - began, time.process_time() - cpu_began)


def answer_questions() -> None:
    """In the process of one side: a line asks, a line answers."""
    sys.path.insert(0, "")
    from transport import keep_freed_memory

    keep_freed_memory()  # as an R-worker's process does
    layer: Layer | None = None
    for line in sys.stdin:
        question = json.loads(line)
        if question is not None:
            layer = None
            layer = Layer(Case(**question))
        assert layer is not None
        print(json.dumps(layer.time()), flush=True)


class Side:
    """A checkout's R-worker, in a process of its own."""

    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--answer"], cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=os.environ | {"PYTHONPATH": str(directory)},
        )  # fmt: skip

    def ask(self, case: Case | None) -> dict[str, float]:
        """The times of one more repeat, after a change to `case`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(None if case is None else asdict(case)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a measured process ended with exit code {self._process.wait()}; its message is above")
        return dict(json.loads(line))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def measure(case: Case, sides: dict[str, Side], repeats: int) -> dict[str, Any]:
    for side in sides.values():
        side.ask(case)  # compiles, fills
        side.ask(None)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides) if repeat % 2 else reversed(list(sides)):
            taken[name].append(sides[name].ask(None))
    result: dict[str, Any] = {}
    for name, times in taken.items():
        result[name] = {f"{what}_ms": 1e3 * statistics.median(t[what] for t in times) for what in times[0]}
        for cpu in ("", "_cpu"):
            share = statistics.median(1 - t[f"loop{cpu}"] / t[f"call{cpu}"] for t in times)
            result[name][f"share_around{cpu}"] = share
    if len(taken) == 2:
        for what in ("call", "call_cpu", "loop", "loop_cpu"):
            ratios = [b[what] / a[what] for b, a in zip(*taken.values(), strict=True)]
            result[f"{what}_before_over_after"] = statistics.median(ratios)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="DIRECTORY", type=Path, help="another checkout")
    parser.add_argument("--wires", nargs="+", choices=WIRES, default=list(WIRES))
    parser.add_argument("--kv-heads", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 1000])
    parser.add_argument("--threads", nargs="+", type=int, default=None, help="default: 1 and all cores")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answer:
        return answer_questions()
    sys.path.insert(0, str(ROOT))
    from cpu_attention import available_cores, available_memory_bytes, cpu_name

    directories = {} if args.before is None else {"before": args.before.resolve()}
    sides = {name: Side(directory) for name, directory in {**directories, "after": ROOT}.items()}
    threads = args.threads or sorted({1, len(available_cores())})
    print("threads KV heads context KV       wire             call ms  loop ms around   cpu ms  loop cpu around")
    machine = {"processor": cpu_name(), "cores": len(available_cores()), "python": platform.python_version()}
    results = []
    for heads, context, count, wire in itertools.product(args.kv_heads, args.contexts, threads, args.wires):
        case = Case(wire, "float16", heads, context, count, args.rows)
        if case.kv_bytes * len(sides) > available_memory_bytes() // 2:
            case = Case(wire, "int8", heads, context, count, args.rows)  # which takes half of it
        result = measure(case, sides, args.repeats)
        results.append({**asdict(case), **result})
        for name in sides:
            side = result[name]
            shares = [f"{100 * side[f'share_around{cpu}']:.1f} %" for cpu in ("", "_cpu")]
            print(
                f"{count:7} {heads:8} {context:7} {case.kv_dtype:8} {wire:8} {name:6} {side['call_ms']:9.2f} "
                f"{side['loop_ms']:8.2f} {shares[0]:>6} {side['call_cpu_ms']:8.2f} {side['loop_cpu_ms']:9.2f} "
                f"{shares[1]:>6}", flush=True,
            )  # fmt: skip
        if len(sides) == 2:
            ratios = [result[f"{what}_before_over_after"] for what in ("call", "call_cpu")]
            print(f"{'':42} before / after {ratios[0]:.2f} by the clock, {ratios[1]:.2f} of CPU time", flush=True)
        if args.json:  # as far as it has come
            Path(args.json).write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
    for side in sides.values():
        side.close()


if __name__ == "__main__":
    main()
