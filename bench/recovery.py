"""What the loss of an R-worker costs: when it is noticed, how long nothing moves, and the rate before and after.

    python bench/recovery.py [--transport shm] [--rounds 5] [--json FILE]

Three R-worker processes; one is killed or stopped in the middle of a batch, at a random moment.  Every output has to be
that of a run in which nothing happened.

    noticed      from the blow to the warning that names the worker
    stood still  the longest time without a finished step, from the blow on
    rate         decoded tokens per second, in the seconds before the blow and after the lost sequences are back
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import fastdecode  # before torch, see there

# isort: split
import numpy as np
import psutil

from bench.end_to_end import make_model
from bench.near_ties import assert_same_tokens
from cpu_attention import cpu_name
from fastdecode import LLM, SamplingParams

HARMS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}


class _Noticed(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.at: list[float] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.at.append(time.monotonic())


def requests(args: argparse.Namespace) -> tuple[list[list[int]], SamplingParams]:
    prompts = np.random.default_rng(0).integers(3, args.vocab, (args.sequences, args.input_len)).tolist()
    return prompts, SamplingParams(temperature=0, max_tokens=args.output_len, ignore_eos=True)


def serve(args: argparse.Namespace, model: str, blow: signal.Signals | None, after_s: float) -> dict[str, Any]:
    """One batch; `blow` to one worker after so many seconds."""
    prompts, params = requests(args)
    noticed, struck, steps = _Noticed(), [], []
    logging.getLogger("fastdecode.engine.recovery").addHandler(noticed)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    try:
        with LLM(
            model, transport=args.transport, num_r_workers=3, r_worker_threads=1, skip_tokenizer_init=True,
            max_num_seqs=args.sequences, start_policy="eager", kv_cache_memory="1GiB",
        ) as llm:  # fmt: skip
            workers = [c for c in psutil.Process().children(recursive=True) if c.pid not in before]
            engine, run_step = llm._engine, llm._engine.step

            def step() -> Any:
                done = run_step()
                running = engine._requests.sequences
                steps.append((time.monotonic(), sum(not s.is_prefilling and s.r_worker is not None for s in running)))
                return done

            engine.step = step  # type: ignore[method-assign]

            def strike() -> None:
                struck.append(time.monotonic())
                workers[-1].send_signal(blow or 0)

            timer = threading.Timer(after_s, strike)
            if blow:
                timer.start()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            timer.cancel()
            if blow == signal.SIGSTOP:
                workers[-1].kill()
    finally:
        logging.getLogger("fastdecode.engine.recovery").removeHandler(noticed)
    tokens = [output.outputs[0].token_ids for output in outputs]
    if not blow:
        return {"tokens": tokens, "seconds": steps[-1][0] - steps[0][0]}
    moments = [moment for moment, _ in steps]
    full = [moment for moment, decoding in steps if moment > noticed.at[0] and decoding == args.sequences]
    return {
        "tokens": tokens,
        "noticed_s": noticed.at[0] - struck[0],
        "stood_still_s": max(b - a for a, b in itertools.pairwise(moments) if b > struck[0]),
        "back_s": full[0] - struck[0],
        "rate_before": _rate([m for m, d in steps if d == args.sequences and m < struck[0]], args.sequences),
        "rate_after": _rate(full, args.sequences),
    }


def _rate(moments: list[float], sequences: int) -> float:
    return sequences / statistics.median(np.diff(moments)) if len(moments) > 2 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = {"hidden": 256, "mlp": 512, "layers": 4, "q-heads": 8, "kv-heads": 4, "vocab": 1000}
    sizes = {"sequences": 48, "input-len": 64, "output-len": 400, "rounds": 5, "seed": 0}
    for name, default in (shape | sizes).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--transport", default="shm", choices=("shm", "ipc", "tcp"))
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    args = parser.parse_args()
    generator, records = np.random.default_rng(args.seed), []
    with tempfile.TemporaryDirectory() as model:
        make_model(args, model)
        plain = serve(args, model, None, 0.0)
        for _ in range(args.rounds):
            for name, blow in HARMS.items():
                after_s = float(generator.uniform(0.3, 0.6) * plain["seconds"])
                record = serve(args, model, blow, after_s)
                try:
                    assert_same_tokens(Path(model), *requests(args), record.pop("tokens"), plain["tokens"])
                except AssertionError as error:
                    where = f"{name} after {after_s:.3f} s"
                    raise SystemExit(f"{where}: other tokens than in an undisturbed run: {error}") from error
                records.append({"harm": name, "after_s": after_s, **record})
    print(f"fastdecode {fastdecode.__version__}, {cpu_name()}, {args.transport}, {len(records)} losses, tokens equal")
    print(f"{'':8} {'noticed, s':>16} {'stood still, s':>16} {'all back, s':>16} {'rate after / before':>20}")
    for name in HARMS:
        own = [record for record in records if record["harm"] == name]

        def cell(key: str, own: list[dict[str, Any]] = own) -> str:
            values = [record[key] for record in own]
            return f"{statistics.median(values):.2f} (max {max(values):.2f})"

        ratio = statistics.median(record["rate_after"] / record["rate_before"] for record in own)
        print(f"{name:8} {cell('noticed_s'):>16} {cell('stood_still_s'):>16} {cell('back_s'):>16} {ratio:20.2f}")
    if args.json:
        record = {"machine": cpu_name(), "settings": vars(args), "losses": records}
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
