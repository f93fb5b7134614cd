"""Plots: of steps (the load, what one takes, who runs and who waits), of rates over the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdecode.errors import ConfigError
from fastdecode.observe.step_log import StepRecord


def check_plotting() -> Any:
    """matplotlib's pyplot, without a screen.  Raises ConfigError if it is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'fastdecode[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_steps(
    runs: Mapping[str, Sequence[StepRecord]],
    path: str | Path,
    max_kv_load: int | None = None,
    *,
    title: str | None = None,
    by_time: bool = False,
) -> None:
    """One line per run: load, milliseconds of a step, sequences that run (and wait, dotted).

    by_time: against seconds instead of steps.  max_kv_load: drawn as a line.
    """
    pyplot = check_plotting()
    figure, panels = pyplot.subplots(3, 1, figsize=(9, 8), sharex=True, constrained_layout=True)
    for index, (name, steps) in enumerate(runs.items()):
        x = [record.begin_s if by_time else number for number, record in enumerate(steps)]
        color = f"C{index}"
        panels[0].plot(x, [record.load for record in steps], color=color, label=name, linewidth=1.2)
        panels[1].plot(x, [record.seconds * 1e3 for record in steps], color=color, linewidth=0.8)
        panels[2].plot(x, [record.num_running for record in steps], color=color, linewidth=1.2)
        panels[2].plot(x, [record.num_waiting for record in steps], color=color, linewidth=0.8, linestyle=":")
    if max_kv_load is not None:
        panels[0].axhline(max_kv_load, color="gray", linestyle="--", linewidth=0.8, label="limit")
    panels[0].set_ylabel("load W: KV tokens of live sequences")
    panels[1].set_ylabel("step, ms")
    panels[2].set_ylabel("sequences running, waiting (dotted)")
    panels[2].set_xlabel("seconds" if by_time else "step")
    panels[0].legend(loc="upper right")
    for panel in panels:
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_rates(records: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Of throughput records: decode tokens/s and milliseconds per token over the batch, and one over the other.

    A line per engine and setting.  Raises ConfigError if there is no such record.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if record.get("kind") == "throughput" and record.get("decode_tokens_per_s"):
            others = {k: v for k, v in record.get("point", {}).items() if k != "num-prompts"}
            name = ", ".join([record["backend"], *(f"{key} {value}" for key, value in others.items())])
            lines.setdefault(name, []).append((record["workload"]["num_prompts"], record["decode_tokens_per_s"]))
    if not lines:
        raise ConfigError("there is no throughput record with a decode rate")
    pyplot = check_plotting()
    figure, panels = pyplot.subplots(1, 3, figsize=(15, 5), constrained_layout=True)
    for name, points in lines.items():
        batches, rates = zip(*sorted(points), strict=True)
        token_ms = [1e3 * batch / rate for batch, rate in zip(batches, rates, strict=True)]
        panels[0].plot(batches, rates, marker="o", label=name)
        panels[1].plot(batches, token_ms, marker="o")
        panels[2].plot(token_ms, rates, marker="o")
    for panel, x, y in zip(
        panels,
        ("sequences", "sequences", "ms from token to token"),
        ("decode tokens/s", "ms from token to token", "decode tokens/s"),
        strict=True,
    ):
        panel.set_xlabel(x)
        panel.set_ylabel(y)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
