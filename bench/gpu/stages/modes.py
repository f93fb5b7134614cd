"""Tokens per second of the three places for K and V, over batch and context: who wins where.

    gpu-only       on the device alone (num_r_workers=0); what does not fit waits
    full offload   on an R-worker alone (device_kv_memory=0)
    hybrid         on both, where it pays by what is measured at the start

The device has the same budget of K and V wherever it has one, so small that some points do not fit it.  Output tokens
over the whole time, prompts and waiting included.  The model has a few layers of the 8B shape: a layer's S and R are
those of the whole model, its LM head has a larger part.  Beside the JSON a plot, where matplotlib is there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

import fastdecode  # noqa: F401 (before torch, see there)

# isort: split
import numpy as np

from bench.gpu import stack
from bench.gpu.report import Report, arguments
from fastdecode import LLM, SamplingParams
from fastdecode.errors import ConfigError
from fastdecode.observe.plots import check_plotting

_MODEL = "8b"
_POINTS = ((16, 256), (64, 256), (64, 1024), (256, 256), (256, 1024))  # sequences, context
_TINY_POINTS = ((8, 40),)
_BUDGET_TOKENS, _TINY_BUDGET_TOKENS = 64 * 1152, 5 * 64  # of K and V on the device: 256 sequences do not fit
_NEW_TOKENS, _TINY_NEW_TOKENS = 64, 6
_RUNS, _ENOUGH_SECONDS = 3, 5.0  # fewer, where one takes so long
_POINT_SECONDS = 6.0
_BASE = "gpu-only"


def main(args: argparse.Namespace) -> None:
    with Report("modes", args) as report:
        points = _TINY_POINTS if report.is_dry else _POINTS
        directory = stack.model_directory(_MODEL, args.work, args.dry)
        budget = _token_bytes(directory, report.is_dry) * (_TINY_BUDGET_TOKENS if report.is_dry else _BUDGET_TOKENS)
        away = {"num_r_workers": 1, "micro_batches": 2, "transport": "inproc" if report.is_dry else "shm"}
        modes: dict[str, dict[str, Any]] = {
            _BASE: {"num_r_workers": 0, "device_kv_memory": budget, "micro_batches": 1},
            "hybrid": away | {"device_kv_memory": budget},
            "full offload": away | {"device_kv_memory": 0},
        }
        for mode, options in modes.items():
            with report.surviving(mode):
                _measure_mode(report, directory, mode, options, points)
        _compare(report)
        _plot(report)


def _token_bytes(directory: Path, is_dry: bool) -> int:
    config = stack.config(directory)
    head_dim = config.hidden_size // config.num_attention_heads
    return int(2 * config.num_key_value_heads * head_dim * config.num_hidden_layers * (4 if is_dry else 2))


def _measure_mode(
    report: Report, directory: Path, mode: str, options: dict[str, Any], points: tuple[tuple[int, int], ...]
) -> None:
    new_tokens = _TINY_NEW_TOKENS if report.is_dry else _NEW_TOKENS
    with LLM(
        directory,
        device="cpu" if report.is_dry else "cuda",
        dtype="float32" if report.is_dry else "bfloat16",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_num_seqs=max(sequences for sequences, _ in points),
        max_num_batched_tokens=8192,
        max_model_len=max(context for _, context in points) + new_tokens,
        **options,
    ) as llm:
        report.add(mode=mode, places=llm.kv_places)
        _generate(llm, 4, 16, 4)  # what is compiled and set up lazily
        for sequences, context in points:
            what = f"{mode}, {sequences} sequences of {context}"
            if not report.has_time(what, 0 if report.is_dry else _POINT_SECONDS):
                continue
            with report.surviving(what):
                seconds: list[float] = []
                while len(seconds) < (1 if report.is_dry else _RUNS) and sum(seconds) < _ENOUGH_SECONDS:
                    seconds.append(_generate(llm, sequences, context, new_tokens))
                rate = sequences * new_tokens / statistics.median(seconds)
                report.add(mode=mode, sequences=sequences, context=context, tokens_per_s=rate, runs=len(seconds))


def _generate(llm: LLM, sequences: int, context: int, new_tokens: int) -> float:
    """Seconds."""
    prompts = np.random.default_rng(sequences + context).integers(3, 250, (sequences, context)).tolist()
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    began = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    errors = [output.error for output in outputs if output.error]
    assert not errors, errors[0]
    return seconds


def _rates(report: Report) -> dict[tuple[int, int], dict[str, float]]:
    """(sequences, context) -> mode -> tokens per second."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for point in report.results:
        if "tokens_per_s" in point:
            found.setdefault((point["sequences"], point["context"]), {})[point["mode"]] = point["tokens_per_s"]
    return found


def _compare(report: Report) -> None:
    least: dict[str, tuple[float, str]] = {}
    budget = _TINY_BUDGET_TOKENS if report.is_dry else _BUDGET_TOKENS
    new_tokens = _TINY_NEW_TOKENS if report.is_dry else _NEW_TOKENS
    for (sequences, context), rates in _rates(report).items():
        if _BASE not in rates:
            continue
        ratios = {mode: rate / rates[_BASE] for mode, rate in rates.items() if mode != _BASE}
        report.add(
            map_point=[sequences, context], fits_device=sequences * (context + new_tokens) <= budget,
            best=max(rates, key=rates.__getitem__), over_gpu_only=ratios,
        )  # fmt: skip
        for mode, ratio in ratios.items():
            least[mode] = min(least.get(mode, (float("inf"), "")), (ratio, f"{sequences} sequences of {context}"))
    for mode, goal in (("hybrid", 1.0), ("full offload", None)):
        ratio, where = least.get(mode, (None, "not measured beside gpu-only"))
        report.hold(f"{mode} over gpu-only, least", ratio, "", roof=1.0, at_least=goal, note=where)


def _plot(report: Report) -> None:
    """Rates of the modes, a group of bars for each point."""
    rates = _rates(report)
    try:
        pyplot = check_plotting()
    except ConfigError as error:
        report.left_out.append(f"the plot: {error}")
        return
    modes = list(dict.fromkeys(mode for of_point in rates.values() for mode in of_point))
    figure, panel = pyplot.subplots(figsize=(9, 5), constrained_layout=True)
    for index, mode in enumerate(modes):
        places = [number + 0.8 * index / len(modes) for number in range(len(rates))]
        panel.bar(
            places, [of_point.get(mode, 0.0) for of_point in rates.values()], 0.8 / len(modes), label=mode, align="edge"
        )
    panel.set_xticks([number + 0.4 for number in range(len(rates))], [f"{s} x {c}" for s, c in rates])
    panel.set_xlabel("sequences x tokens of context")
    panel.set_ylabel("output tokens/s")
    panel.set_ylim(bottom=0)
    panel.grid(axis="y", alpha=0.3)
    panel.legend(fontsize="small")
    figure.savefig(report.args.out.with_suffix(".png"), dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main(arguments(__doc__))
