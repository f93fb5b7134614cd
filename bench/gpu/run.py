"""All measurements that want a GPU, in one go, on a machine that nothing can be fetched on.

    python bench/gpu/run.py --wheels DIR                  where there is a network: what the other machine lacks
    python bench/gpu/run.py --install DIR --out RESULTS   there: installs them beside itself, and measures
    python bench/gpu/run.py --dry                         tiny shapes on the processor: whether all of it runs

Each stage of bench/gpu/stages is a process with a deadline of its own, its share of the time that is left; one that
fails or hangs is told of, and the others go on.  Each writes RESULTS/<stage>.json as it goes, the driver
RESULTS/summary.json and a table.  Without --out they go to bench/results/gpu-<the device's name>/, of a dry run to a
folder for temporary files.  Exit code: 0 if every stage came to its end, 1 if one did not, 2 for what cannot be run,
128 and the signal's number if it was ended.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.gpu import carry

ROOT = Path(__file__).parents[2]
# stage -> seconds it may want; what it gets is its share of what is left
STAGES = {
    "paged_attention": 70,
    "t_of_b": 70,
    "equality": 100,
    "copies": 45,
    "graphs": 50,
    "step": 90,
    "modes": 110,
}
_OTHER_SHARE = 60  # of a stage that is given by its path
_PROBE_TIMEOUT_S = 90.0
_GLANCE_S = 0.05
_GRACE_S = 2.0  # from the question where it hangs to SIGTERM, and from there to SIGKILL
_TAIL = 6000  # characters of a stage's output


@dataclass(frozen=True)
class Ending:
    """How a stage came to its end."""

    stage: str
    state: str  # "done", "failed", or "timed out"
    seconds: float
    deadline_s: float
    exit_code: int | None
    command: list[str]
    output_tail: str


def main() -> None:
    args = _arguments()
    if args.wheels:
        num_bytes = carry.download(args.wheels)
        print(f"{num_bytes / 2**20:.1f} MiB of wheels in {args.wheels}: {', '.join(carry.CARRIED)}")
        return
    began = time.monotonic()
    asked: list[int] = []  # signals, by which this is to end; between two lines one would lose a stage just begun
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.append(number))
    with tempfile.TemporaryDirectory(prefix="fastdecode-gpu-") as own:
        work = args.work or Path(own)
        work.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        places = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        if args.install:
            packages = work / "packages"
            carry.install(args.install, packages)
            places.insert(0, str(packages))
        environment["PYTHONPATH"] = os.pathsep.join(places)
        unmet = carry.unmet([*places, *sys.path])
        for requirement in unmet:
            print(f"not as setup.py has it: {requirement}", flush=True)
        machine = _probe(environment, args.dry)
        out = args.out or (Path(tempfile.mkdtemp(prefix="fastdecode-gpu-dry-")) if args.dry else _kept(machine))
        out.mkdir(parents=True, exist_ok=True)
        endings: list[Ending] = []
        wanted = [_stage(name) for name in args.stages]
        for index, (stage, path, share) in enumerate(wanted):
            left = args.seconds - (time.monotonic() - began)
            deadline = max(1.0, left * share / sum(other for *_, other in wanted[index:]))
            deadline = min(deadline, args.stage_seconds or deadline)
            ending = _run(stage, path, out, work, deadline, environment, args.dry, asked)
            if asked:
                sys.exit(128 + asked[0])
            endings.append(ending)
            _complete(out, ending, machine, args.dry)
            print(f"{stage}: {ending.state} after {ending.seconds:.0f} s of {deadline:.0f}", flush=True)
            if ending.state != "done":
                print(ending.output_tail[-1500:], flush=True)
            summary = {  # now, because whoever started this may have less patience
                "is_dry": args.dry,
                "machine": machine,
                "unmet_requirements": unmet,
                "seconds": round(time.monotonic() - began, 1),
                "command": [sys.executable, *sys.argv],
                "stages": [_summary(out, ending) for ending in endings],
            }
            _write(out / "summary.json", summary)
        print(_table(summary))
        print(f"{summary['seconds']} s; {out}")
    sys.exit(any(ending.state != "done" for ending in endings))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="download what a bare machine lacks, and end")
    parser.add_argument("--install", type=Path, metavar="DIR", help="install the wheels there first, offline")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for results")
    parser.add_argument("--work", type=Path, metavar="DIR", help="for models and packages, 10 GiB; default: temporary")
    parser.add_argument("--stages", nargs="+", default=[*STAGES], metavar="STAGE",
                        help=f"of {', '.join(STAGES)}, or paths of others")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=540.0, help="of all stages together")
    parser.add_argument("--stage-seconds", type=float, metavar="S", help="of any one stage, at most")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the processor")
    args = parser.parse_args()
    for name in args.stages:
        if name not in STAGES and not Path(name).is_file():
            parser.error(f"there is no stage {name!r}; the stages are {', '.join(STAGES)}, or give a file's path")
    return args


def _stage(name: str) -> tuple[str, Path, int]:
    """Its name, its program, its share of the time."""
    if name in STAGES:
        return name, Path(__file__).parent / "stages" / f"{name}.py", STAGES[name]
    return Path(name).stem, Path(name).resolve(), _OTHER_SHARE


def _probe(environment: dict[str, str], dry: bool) -> dict[str, Any]:
    """What the machine is, as a process tells that may fail; ends the run where there is nothing to run on."""
    command = [sys.executable, str(Path(__file__).parent / "machine.py"), *(["--dry"] if dry else [])]
    try:
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        print(f"error: {' '.join(command)} gave no answer in {_PROBE_TIMEOUT_S:.0f} s", file=sys.stderr)
        sys.exit(2)
    if answer.returncode:
        print(f"error: FastDecode cannot be imported here:\n{answer.stderr[-2000:]}", file=sys.stderr)
        sys.exit(2)
    machine: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    if machine["device"] is None and not dry:
        print("error: torch sees no CUDA device here; --dry tries all of it on the processor", file=sys.stderr)
        sys.exit(2)
    return machine


def _kept(machine: dict[str, Any]) -> Path:
    """For results on such a device, in the repository."""
    name = re.sub(r"[^a-z0-9]+", "-", machine["name"].lower()).strip("-")
    return ROOT / "bench" / "results" / f"gpu-{name}"


def _run(
    stage: str,
    path: Path,
    out: Path,
    work: Path,
    deadline_s: float,
    environment: dict[str, str],
    dry: bool,
    asked: Sequence[int],
) -> Ending:
    """A session of its own, so that what it has started ends with it.  asked: ends it when something is in it."""
    command = [
        sys.executable, str(path), "--out", str(out / f"{stage}.json"), "--work", str(work),
        "--seconds", f"{deadline_s:.1f}", *(["--dry"] if dry else []),
    ]  # fmt: skip
    (out / f"{stage}.json").unlink(missing_ok=True)  # of an earlier run
    began = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        while process.poll() is None and time.monotonic() - began < deadline_s and not asked:
            time.sleep(_GLANCE_S)
        state = "timed out" if process.poll() is None else "failed" if process.returncode else "done"
        _end(process)
        seconds = time.monotonic() - began
        output.seek(0)
        tail = output.read()[-_TAIL:]
    return Ending(stage, state, round(seconds, 2), round(deadline_s, 1), process.returncode, command, tail)


def _end(process: subprocess.Popen[bytes]) -> None:
    """It, and all of its session; a stage says first where it hangs."""
    if process.poll() is None:
        process.send_signal(signal.SIGUSR1)
        _wait(process)
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # nobody is left
            break
        _wait(process)  # one that a driver holds for ever is left behind


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        pass


def _complete(out: Path, ending: Ending, machine: dict[str, Any], dry: bool) -> None:
    """The stage's file gets how it ended; one that wrote none, a file."""
    path = out / f"{ending.stage}.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {"is_complete": False, "figures": [], "left_out": [], "failures": [], "results": []}
    known = {"stage": ending.stage, "is_dry": dry, "machine": machine}
    _write(path, known | record | {name: value for name, value in asdict(ending).items() if name != "stage"})


def _summary(out: Path, ending: Ending) -> dict[str, Any]:
    record = json.loads((out / f"{ending.stage}.json").read_text(encoding="utf-8"))
    names = ("stage", "state", "seconds", "deadline_s", "exit_code", "is_complete", "figures", "left_out", "failures")
    return {name: record[name] for name in names}


def _table(summary: dict[str, Any]) -> str:
    rows = [("figure", "value", "roof", "goal", "met")]
    lines = []
    for stage in summary["stages"]:
        for figure in stage["figures"]:
            met = "" if figure["is_met"] is None else "yes" if figure["is_met"] else "NO"
            value = "not measured" if figure["value"] is None else f"{figure['value']:.4g} {figure['unit']}".strip()
            roof = "" if figure["roof"] is None else f"{figure['roof']:.4g}"
            rows.append((f"{stage['stage']}: {figure['name']}", value, roof, figure["goal"], met))
            if figure["note"]:
                rows.append((f"    {figure['note']}", "", "", "", ""))
        lines += [f"{stage['stage']}: {stage['state']}"] if stage["state"] != "done" else []
        lines += [f"{stage['stage']}: left out: {what}" for what in stage["left_out"]]
        lines += [
            f"{stage['stage']}: {failure['what']} failed: {failure['error'].strip().splitlines()[-1]}"
            for failure in stage["failures"]
        ]
    widths = [max(len(row[column]) for row in rows if row[1]) for column in range(5)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() if row[1] else row[0]
        for row in rows
    ]
    return "\n".join([summary["machine"]["name"], *table, *lines])


def _write(path: Path, record: Any) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


if __name__ == "__main__":
    main()
