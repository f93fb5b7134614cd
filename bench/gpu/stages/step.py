"""Seconds of a decode step of two lanes beside max(S, R), by a whole engine with an R-worker in a process of its own.

    S    the S-Part of both lanes' tokens, T of half the batch twice, measured with the engine's own S-worker
    R    the attention of both lanes in all layers, as the busiest R-worker timed itself in the run

The model has a few layers of the 8B shape, so its LM head has a larger part in S than in the whole model.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import fastdecode  # noqa: F401 (before torch, see there)

# isort: split
import numpy as np

from bench.gpu import stack
from bench.gpu.report import Report, arguments
from bench.gpu.timing import call_seconds
from bench.overlap import decode_steps
from fastdecode import LLM, SamplingParams
from fastdecode.observe.timeline import S_DEVICE, S_WORKER

_POINTS = ((64, 128), (256, 128), (64, 1024), (256, 512), (512, 128))  # sequences, context
_TINY_POINTS = ((4, 20), (8, 12))
_MODEL = "8b"
_STEPS, _TINY_STEPS = 24, 6
_STEP_TOKENS = 16384  # of prompts, at most
_POINT_SECONDS = 10.0


def main(args: argparse.Namespace) -> None:
    with Report("step", args) as report:
        points = _TINY_POINTS if report.is_dry else _POINTS
        steps = _TINY_STEPS if report.is_dry else _STEPS
        with LLM(
            stack.model_directory(_MODEL, args.work, args.dry),
            device="cpu" if report.is_dry else "cuda",
            dtype="float32" if report.is_dry else "bfloat16",
            num_r_workers=1,
            transport="shm",
            device_kv_memory=0,
            micro_batches=2,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            start_policy="at-once",
            max_num_seqs=max(sequences for sequences, _ in points),
            max_num_batched_tokens=_STEP_TOKENS,
            max_model_len=max(context + _num_new(*p, steps) for p in points for context in p[1:]) + 1,
            trace=str(args.work / "step-trace.json"),
        ) as llm:
            report.add(places=llm.kv_places)
            worst = 0.0
            for sequences, context in points:
                what = f"{sequences} sequences of {context}"
                if report.has_time(what, 0 if report.is_dry else _POINT_SECONDS):
                    with report.surviving(what):
                        worst = max(worst, _measure(report, llm, sequences, context, steps))
            report.hold("step over max(S, R), two lanes, most", worst or None, "", roof=1.0)


def _measure(report: Report, llm: LLM, sequences: int, context: int, steps: int) -> float:
    """Step over max(S, R)."""
    sworker, timeline = llm._engine._sworker, llm._engine._timeline
    half = -(-sequences // 2)
    o, tokens = stack.made_up_o(sworker, half), stack.decode_batch(half)
    with sworker.inference():
        s_ms = 2e3 * call_seconds(lambda: stack.run_forward(sworker, tokens, lambda call: o), sworker.device)
    generator = np.random.default_rng(sequences + context)
    prompts = generator.integers(3, 250, (sequences, context)).tolist()
    params = SamplingParams(temperature=0, max_tokens=_num_new(sequences, context, steps), ignore_eos=True)
    timeline.spans.clear()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    errors = [output.error for output in outputs if output.error]
    assert not errors, errors[0]
    found = decode_steps(timeline, S_WORKER if report.is_dry else S_DEVICE)
    floor_ms = max(s_ms, found.r_ms)
    report.add(
        sequences=sequences, context=context, step_ms=found.step_ms, s_ms=s_ms, r_ms=found.r_ms,
        s_blocks_ms=found.s_ms, over_floor=found.step_ms / floor_ms, shares=found.shares,
    )  # fmt: skip
    return found.step_ms / floor_ms


def _num_new(sequences: int, context: int, steps: int) -> int:
    """Tokens of each, so that so many steps are left when the last prompt is in."""
    return steps + 3 + 2 * math.ceil(sequences * context / _STEP_TOKENS)


if __name__ == "__main__":
    main(arguments(__doc__))
