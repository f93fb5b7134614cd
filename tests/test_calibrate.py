"""Calibration: measured, kept, read again, and used; what is no calibration is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastdecode import LLM, SamplingParams
from fastdecode.cli import main
from fastdecode.errors import ConfigError
from fastdecode.modelling.calibration import Calibration, read_calibration, write_calibration
from fastdecode.modelling.perf_model import PerfModel
from fastdecode.observe.step_log import read_step_log

MODEL = PerfModel((1, 8), (1e-3, 2e-3), 1e-8, 4, 5e-5)


def a_calibration(perf_model: PerfModel = MODEL) -> Calibration:
    return Calibration("llama", "a CPU", "float32", "float16", "here", 2, 1, "2026-11-21", perf_model)


def test_round_trip(tmp_path: Path) -> None:
    write_calibration(a_calibration(), tmp_path / "c.json")
    assert read_calibration(tmp_path / "c.json") == a_calibration()


@pytest.mark.parametrize(
    "content",
    ["", "{}", '{"format": "fastdecode calibration 0"}', '{"format": "fastdecode calibration 1"}', "[1]", "not JSON"],
)
def test_what_is_no_calibration(content: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ConfigError, match="c.json is no calibration.*fastdecode calibrate"):
        read_calibration(tmp_path / "c.json")


def test_times_that_cannot_be(tmp_path: Path) -> None:
    write_calibration(a_calibration(), tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text())
    content["perf_model"]["seconds"] = [2e-3, 1e-3]
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="a larger batch cannot take less time"):
        read_calibration(tmp_path / "c.json")


@pytest.mark.alone
def test_measured_and_used(demo_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command measures on real workers; its file bounds the load of a run by a step's time."""
    path = tmp_path / "c.json"
    arguments = ["calibrate", str(demo_model), "-o", str(path), "--num-r-workers", "2", "--largest-batch", "12"]
    arguments += ["--kv-cache-memory", "64MiB", "--kv-cache-dtype", "float16"]
    assert any(main(arguments) == 0 for _ in range(10)), "each time the machine was too busy to be measured"
    told = capsys.readouterr()
    assert "ns per KV token" in told.out and "T(12)" in told.err and "R-Part of" in told.err
    found = read_calibration(path)
    assert found.num_r_workers == 2 and found.kv_dtype == "float16" and found.model == "llama"
    assert found.perf_model.batches == (1, 2, 4, 8, 12) and 1e-12 < found.perf_model.kv_token_seconds < 1e-5

    step_s = found.perf_model.num_layers * (found.perf_model.r_fixed_seconds + 600 * found.perf_model.kv_token_seconds)
    log = tmp_path / "steps.jsonl"
    with LLM(demo_model, max_step_s=step_s, calibration=path, step_log=log, skip_tokenizer_init=True) as llm:
        params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        llm.generate([[5 + i] * 20 for i in range(30)], params, use_tqdm=False)
    peak = max(record.load for record in read_step_log(log))
    assert 400 < peak <= 600


def test_of_another_model(demo_model: Path, tmp_path: Path) -> None:
    write_calibration(a_calibration(PerfModel((1,), (1e-3,), 1e-8, 77)), tmp_path / "c.json")
    with pytest.raises(ConfigError, match="taken of a model of 77 layers"):
        LLM(demo_model, max_step_s=1.0, calibration=tmp_path / "c.json", skip_tokenizer_init=True)


def test_a_step_too_short(demo_model: Path, tmp_path: Path) -> None:
    with LLM(demo_model, skip_tokenizer_init=True) as llm:
        num_layers = len(llm.facts.layers)
    write_calibration(a_calibration(PerfModel((1,), (1e-3,), 1e-8, num_layers, 1e-3)), tmp_path / "c.json")
    with pytest.raises(ConfigError, match="too short.*reads nothing"):
        LLM(demo_model, max_step_s=1e-3, calibration=tmp_path / "c.json", skip_tokenizer_init=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_step_s": 0.1}, "max_step_s needs calibration=FILE"),
        ({"calibration": "c.json"}, "calibration is for max_step_s, or for placement"),
        ({"placement": "planned"}, "set device_kv_memory"),
        ({"placement": "best"}, "placement must be one of auto, planned, device-first"),
    ],
)
def test_what_belongs_together(options: dict[str, object], message: str, demo_model: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(demo_model, skip_tokenizer_init=True, **options)


def test_too_little_kv(demo_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(demo_model), "--kv-cache-memory", "1MB"]) == 2
    assert "too little KV to measure with" in capsys.readouterr().err
