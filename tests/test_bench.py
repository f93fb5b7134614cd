"""The benchmarks run, and their figures mean what they say.  Not how fast: that is for the benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[1] / "bench"


def run(tmp_path: Path, script: str, *flags: str) -> Any:
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCH / script), *flags, "--json", str(out)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(out.read_text())


def test_attention(tmp_path: Path) -> None:
    flags = [
        "--ragged",
        "6",
        "--q-heads",
        "4",
        "--kv-heads",
        "2",
        "--head-dim",
        "64",
        "--threads",
        "2",
        "--repeats",
        "2",
    ]
    results = run(tmp_path, "attention.py", *flags, "--dtype", "float16", "int4", "--no-sdpa")["results"]
    assert {(r["dtype"], r["what"]) for r in results} == {
        (dtype, what) for dtype in ("float16", "int4") for what in ("kernel", "+ append")
    }
    for r in results:
        assert r["gb_per_s"] > 0 and r["of_binding_roof"] > 0 and r["of_read_roof"] <= r["of_binding_roof"] * 1.001
        if r["what"] == "kernel":
            assert r["max_abs_error"] < 2e-6


def test_shared_rows(tmp_path: Path) -> None:
    flags = ["--families", "2", "--tokens", "256", "--kv-heads", "2", "--q-heads", "4", "--head-dim", "64"]
    flags += ["--rows", "1", "2", "12", "--repeats", "2", "--dtype", "float16"]
    results = run(tmp_path, "shared_rows.py", *flags)["results"]
    assert [r["rows"] for r in results] == [1, 2, 12]
    for r in results:
        assert r["gb_per_s"] > 0 and r["of_read_roof"] <= r["of_binding_roof"] * 1.001 and r["group"] == 2


@pytest.mark.parametrize("windows", [8, pytest.param(24, marks=pytest.mark.slow)])
@pytest.mark.parametrize("outliers", [False, True])
def test_kv_quality(tmp_path: Path, outliers: bool, windows: int) -> None:
    """Of the shipped model: what docs/figures.md says of each storage type, on a part of the text."""
    flags = ["--context", "128", "--windows", str(windows), *(["--outliers"] if outliers else [])]
    results = {r["dtype"]: r for r in run(tmp_path, "kv_quality.py", *flags)["results"]}
    assert results["float32"]["mean_kld"] < 1e-7 and results["float16"]["mean_kld"] < 1e-6
    assert results["int8"]["mean_kld"] < 1e-3 and results["int8"]["top1_percent"] > 98
    assert results["k8v4"]["mean_kld"] < 1e-2 and results["k8v4"]["top1_percent"] > 95
    assert results["int4"]["mean_kld"] < (8e-2 if outliers else 3e-2)
    assert 5 < results["float32"]["perplexity"] < 25
