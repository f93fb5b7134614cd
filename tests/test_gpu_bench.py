"""bench/gpu: all of it runs on a processor, and no stage takes the others with it.  Not how fast: that is for a GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import carry
from bench.gpu.report import Report
from bench.gpu.run import STAGES

ROOT = Path(__file__).parents[1]
RUN = ROOT / "bench" / "gpu" / "run.py"
FINE = """
import json, os, sys
out = sys.argv[sys.argv.index("--out") + 1]
json.dump({"is_complete": True, "figures": [], "left_out": [], "failures": [], "results": [os.environ["PYTHONPATH"]]},
          open(out, "w"))
"""
CRASHING = "import os; print('about to'); os.abort()"
# As one that waits for a device, with a process of its own, and hears of no signal but the last one.
HANGING = """
import faulthandler, signal, subprocess, sys
faulthandler.register(signal.SIGUSR1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
def waits_for_the_device():
    while True:
        signal.pause()
waits_for_the_device()
"""


def drive(*flags: object, timeout_s: float = 240) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUN), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture
def kept() -> Iterator[None]:
    """A dry run leaves the repository's results as they are."""
    before = sorted((ROOT / "bench" / "results").rglob("*"))
    yield
    assert sorted((ROOT / "bench" / "results").rglob("*")) == before


@pytest.mark.parametrize("stages", [[*STAGES][:4], [*STAGES][4:]], ids=lambda stages: "-".join(stages))
def test_dry(stages: list[str], tmp_path: Path, kept: None) -> None:
    finished = drive("--dry", "--out", tmp_path, "--stages", *stages)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    summary = read(tmp_path / "summary.json")
    assert summary["machine"]["name"] and summary["machine"]["versions"]["torch"] and summary["seconds"] < 540
    assert [stage["stage"] for stage in summary["stages"]] == stages
    for stage in stages:
        record = read(tmp_path / f"{stage}.json")
        assert record["state"] == "done" and record["is_complete"] and record["is_dry"]
        assert record["machine"]["name"] == summary["machine"]["name"] and record["command"] and record["seconds"] > 0
        assert record["results"] and not record["failures"] and not record["left_out"], record["failures"]
        assert record["figures"]
        for figure in record["figures"]:
            assert figure["is_met"] is not False, figure
            assert f"{stage}: {figure['name']}" in finished.stdout
    found = {stage: read(tmp_path / f"{stage}.json") for stage in stages}
    if "equality" in found:
        ways = {(point["dtype"], point["way"]) for point in found["equality"]["results"]}
        assert {("float32", way) for way in ("r-workers", "device", "mixed")} < ways
    if "graphs" in found:
        assert {point["captured"] for point in found["graphs"]["results"]} == {"not measured: no CUDA"}
    if "modes" in found:
        (point,) = [point for point in found["modes"]["results"] if "map_point" in point]
        assert point["over_gpu_only"].keys() == {"hybrid", "full offload"} and not point["fits_device"]
        assert (tmp_path / "modes.png").stat().st_size > 1000


def test_stages_that_crash_and_hang(tmp_path: Path) -> None:
    for name, program in (("crashing", CRASHING), ("hanging", HANGING), ("fine", FINE)):
        (tmp_path / f"{name}.py").write_text(program)
    stages = [tmp_path / f"{name}.py" for name in ("crashing", "hanging", "fine")]
    out = tmp_path / "out"
    finished = drive("--dry", "--out", out, "--stage-seconds", 5, "--stages", *stages)
    assert finished.returncode == 1, finished.stderr
    crashing, hanging, fine = (read(out / f"{stage.stem}.json") for stage in stages)
    assert crashing["state"] == "failed" and crashing["exit_code"] == -6 and "about to" in crashing["output_tail"]
    assert hanging["state"] == "timed out" and "hanging: timed out" in finished.stdout
    assert 5 <= hanging["seconds"] < 30 and "waits_for_the_device" in hanging["output_tail"]
    assert fine["state"] == "done" and str(ROOT) in fine["results"][0]
    child = int(hanging["output_tail"].split("child ")[1].split()[0])
    assert not is_running(child), "what a stage has started ends with it"
    states = [stage["state"] for stage in read(out / "summary.json")["stages"]]
    assert states == ["failed", "timed out", "done"]


def test_a_driver_that_is_ended_ends_its_stage(tmp_path: Path) -> None:
    """And what was there before is kept."""
    (tmp_path / "fine.py").write_text(FINE)
    (tmp_path / "hanging.py").write_text(HANGING)
    flags = [
        "--dry",
        "--out",
        str(tmp_path / "out"),
        "--stages",
        str(tmp_path / "fine.py"),
        str(tmp_path / "hanging.py"),
    ]
    driver = subprocess.Popen([sys.executable, str(RUN), *flags], stdout=subprocess.PIPE, text=True)
    assert driver.stdout and driver.stdout.readline().startswith("fine: done")
    deadline = time.monotonic() + 60
    while not (stages := processes_of(str(tmp_path / "hanging.py"), besides=driver.pid)):
        assert time.monotonic() < deadline, "the second stage begins"
        time.sleep(0.05)
    driver.terminate()
    assert driver.wait(60) == 143
    assert not any(is_running(stage) for stage in stages)
    assert [stage["stage"] for stage in read(tmp_path / "out" / "summary.json")["stages"]] == ["fine"]


def processes_of(argument: str, besides: int) -> list[int]:
    """That have the argument on their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        found += [int(place.name)] if argument in words and int(place.name) != besides else []
    return found


def report_to(path: Path, seconds: float = 60) -> Report:
    return Report("stage", argparse.Namespace(out=path, work=path.parent, seconds=seconds, dry=True))


def test_a_point_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    out = tmp_path / "stage.json"
    with report_to(out) as report:
        for number in range(3):
            with report.surviving(f"point {number}"):
                report.add(number=number, ratio=1 / (number - 1))
        with report.surviving("large"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 68.7 GiB")
        assert not read(out)["is_complete"]
    record = read(out)
    assert [point["number"] for point in record["results"]] == [0, 2] and record["is_complete"]
    (failure,) = record["failures"]
    assert failure["what"] == "point 1" and "ZeroDivisionError" in failure["error"]
    assert record["left_out"] == ["large: no memory (CUDA out of memory. Tried to allocate 68.7 GiB)"]


def test_a_stage_that_raises_leaves_what_it_had(tmp_path: Path) -> None:
    out = tmp_path / "stage.json"
    with pytest.raises(KeyError), report_to(out, seconds=0) as report:
        report.add(number=1)
        assert not report.has_time("the second point")
        raise KeyError("weights")
    record = read(out)
    assert not record["is_complete"] and record["results"] == [{"number": 1}]
    assert record["failures"][0]["what"] == "the stage" and "KeyError: 'weights'" in record["failures"][0]["error"]
    assert record["left_out"] == ["the second point: no time left"]


def test_figures_are_held_to_goals(tmp_path: Path) -> None:
    """Those of speed not in a dry run, and one that was not measured to none."""
    with report_to(tmp_path / "stage.json") as report:
        report.hold("speed", 0.1, "share", at_least=0.7)
        report.hold("low", 0.1, "share", at_least=0.7, is_of_speed=False)
        report.hold("just", 1.3, "", at_most=1.3, is_of_speed=False)
        report.hold("not measured", None, "", at_least=1.0, is_of_speed=False)
    assert [(f.goal, f.is_met) for f in report.figures] == [
        (">= 0.7", None), (">= 0.7", False), ("<= 1.3", True), (">= 1", None),
    ]  # fmt: skip


def is_running(pid: int) -> bool:
    """A process that is no zombie."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True


def test_the_time_that_is_left_is_shared(tmp_path: Path) -> None:
    """Three stages of one share: the first gets a third, and what it leaves is the others'."""
    for name in "abc":
        (tmp_path / f"{name}.py").write_text(FINE)
    stages = [tmp_path / f"{name}.py" for name in "abc"]
    assert drive("--dry", "--out", tmp_path, "--seconds", 300, "--stages", *stages).returncode == 0
    first, second, third = (read(tmp_path / f"{name}.json")["deadline_s"] for name in "abc")
    assert first <= 100 < second < third <= 300


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--dry", "--stages", "no_such"], "there is no stage 'no_such'; the stages are paged_attention, t_of_b"),
        (["--stages", "copies"], "torch sees no CUDA device here; --dry"),
    ],
)
def test_what_cannot_be_run(flags: list[str], said: str, kept: None) -> None:
    finished = subprocess.run(
        [sys.executable, str(RUN), *flags], capture_output=True, text=True, timeout=120,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert finished.returncode == 2 and said in finished.stderr


def make_wheel(folder: Path, name: str, version: str) -> None:
    information = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        wheel.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")


def test_installs_offline(tmp_path: Path) -> None:
    """Stages find what was carried before anything else, and this repository behind it."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    make_wheel(wheels, "carried_to_a_bare_machine", "1.0")
    (tmp_path / "looking.py").write_text("import carried_to_a_bare_machine\n" + FINE)
    flags = ["--dry", "--install", wheels, "--work", tmp_path / "work", "--out", tmp_path / "out"]
    finished = drive(*flags, "--stages", tmp_path / "looking.py")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    first, second, *_ = read(tmp_path / "out" / "looking.json")["results"][0].split(os.pathsep)
    assert Path(first) == tmp_path / "work" / "packages" and Path(second) == ROOT
    assert "--no-index" in carry.install_command(wheels, tmp_path)
    with pytest.raises(carry.CarryError, match="holds no wheel; `--wheels"):
        carry.install(tmp_path / "out", tmp_path / "work")


def test_what_is_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = carry.download_command(tmp_path)
    assert "--no-deps" in command and command[command.index("--python-version") + 1] == "3.12"
    names = {word.partition("==")[0] for word in command[-len(carry.CARRIED) :]}
    assert names == set(carry.CARRIED) and all("==" in word for word in command[-len(carry.CARRIED) :])
    required = {requirement.partition(">")[0] for requirement in carry.requirements()}
    assert names < required
    monkeypatch.setattr(carry, "_run", lambda command: (tmp_path / "large.whl").write_bytes(bytes(101)))
    monkeypatch.setattr(carry, "MOST_BYTES", 100)
    with pytest.raises(carry.CarryError, match="101 bytes of wheels"):
        carry.download(tmp_path)


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert carry.unmet(sys.path) == []
    information = tmp_path / "transformers-5.16.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.16.0\n")
    assert carry.unmet([str(tmp_path), *sys.path]) == ["transformers>=5.17,<6 (5.16.0 is there)"]
    assert "msgspec>=0.19,<1 (none is there)" in carry.unmet([str(tmp_path)])
    monkeypatch.setattr(carry, "requirements", lambda: ["transformers>=5.16", "Transformers<5.16"])
    assert carry.unmet([str(tmp_path)]) == ["Transformers<5.16 (5.16.0 is there)"]
