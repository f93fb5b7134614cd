"""Sweeps: every combination once, resumable, failures kept apart; and what is drawn of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Case

from fastdecode.benchmark.sweep import Sweep, read_records, run_process, run_sweep
from fastdecode.cli import main
from fastdecode.errors import ConfigError
from fastdecode.observe.plots import plot_rates


def sweep(**grid: list[Any]) -> Sweep:
    return Sweep("throughput", "m", {"eager": True, "quiet": False, "backend": ["a", "b"]}, grid)


def test_every_combination_as_arguments() -> None:
    one = sweep(x=[1, 2], y=["p", "q"])
    assert one.points() == [{"x": 1, "y": "p"}, {"x": 1, "y": "q"}, {"x": 2, "y": "p"}, {"x": 2, "y": "q"}]
    expected = ["throughput", "m", "--eager", "--backend", "a", "b", "--x", "1", "--y", "p"]
    assert one.arguments(one.points()[0]) == expected
    assert len({one.key(point) for point in one.points()}) == 4


def test_failures_are_kept_and_tried_again(tmp_path: Path) -> None:
    output, ran = tmp_path / "out.jsonl", []
    broken = {"2"}

    def run(arguments: list[str]) -> list[dict[str, Any]]:
        ran.append(arguments[-1])
        if arguments[-1] in broken:
            raise ConfigError("no memory")
        return [{"kind": "throughput", "value": arguments[-1]}] * 2

    lines: list[str] = []
    assert run_sweep(sweep(x=[1, 2, 3]), output, resume=False, run=run, on_progress=lines.append) == 1
    assert [r["kind"] for r in read_records(output)] == ["throughput"] * 2 + ["failed"] + ["throughput"] * 2
    assert any("2 of 3: x 2: failed: no memory" in line for line in lines)
    with pytest.raises(ConfigError, match="--resume"):
        run_sweep(sweep(x=[1]), output, resume=False, run=run, on_progress=lines.append)
    # Cut off in the middle of a line, gone on with: what is there is left alone, the rest runs once more.
    output.write_text(output.read_text()[:-20])
    broken.clear()
    ran.clear()
    assert run_sweep(sweep(x=[1, 2, 3, 4]), output, resume=True, run=run, on_progress=lines.append) == 0
    assert ran == ["2", "4"]
    assert {r["point"]["x"] for r in read_records(output) if r["kind"] == "throughput"} == {1, 2, 3, 4}
    # Other flags are other runs.
    ran.clear()
    run_sweep(Sweep("throughput", "m", {}, {"x": [1]}), output, resume=True, run=run, on_progress=lines.append)
    assert ran == ["1"]


@pytest.mark.parametrize(
    "text, why",
    [
        ("model: m", "has model and grid"),
        ("{model: m, grid: {x: [1]}, speed: 3}", "nothing else"),
        ("{model: m, grid: {x: 1}}", "list of values"),
        ("{model: m, grid: {x: [1]}, flags: {x: 2}}", "share no name"),
        ("{model: m, command: transport, grid: {x: [1]}}", "throughput, latency"),
        ("{", "cannot read"),
    ],
)
def test_sweeps_that_are_none(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ConfigError, match=why):
        Sweep.read(tmp_path / "grid.yaml")


def test_the_command_and_its_plot(llama: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, output, image = tmp_path / "grid.yaml", tmp_path / "out.jsonl", tmp_path / "out.png"
    flags = "{input-len: 8, output-len: 6, repeats: 1}"
    grid.write_text(
        f"{{model: {llama.directory}, flags: {flags}, grid: {{num-prompts: [1, 3], micro-batches: [1, 99]}}}}"
    )
    assert main(["bench", "sweep", str(grid), "-o", str(output)]) == 1, "99 micro-batches are refused"
    kinds = [record["kind"] for record in read_records(output)]
    assert kinds == ["throughput", "failed"] * 2
    assert "micro_batches" in read_records(output)[1]["error"]
    assert main(["bench", "plot", "--records", str(output), "-o", str(image)]) == 0
    assert image.read_bytes().startswith(b"\x89PNG")
    assert main(["bench", "plot", "--step-log", str(output), "-o", str(image)]) == 2
    assert "nothing to draw" in capsys.readouterr().err


def test_nothing_to_plot(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no throughput record"):
        plot_rates([{"kind": "latency"}], tmp_path / "x.png")


def test_a_run_that_fails_says_why() -> None:
    with pytest.raises(ConfigError, match="exit code 2: error: .*config.json"):
        run_process(["throughput", "/no/such/model"])


def test_torn_lines_in_the_middle_are_no_records(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a"\n{"a": 1}\n')
    with pytest.raises(ConfigError, match="line 1 is no JSON"):
        read_records(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text(json.dumps({"a": 1}) + '\n{"a"')
    assert read_records(tmp_path / "x.jsonl") == [{"a": 1}]
