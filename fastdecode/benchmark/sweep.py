"""A grid of benchmark runs from a YAML file, each in a process of its own, one JSON line per engine and point.

    command: throughput            # or latency
    model: path/to/model
    flags: {kv-cache-dtype: float16, output-len: 32}          # of every run
    grid: {num-prompts: [1, 16, 64], micro-batches: [1, 2]}   # every combination

A run that fails leaves a line that says why, and the others go on.  With ``resume`` points that have a result already
are left out, those that failed are tried again.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fastdecode.errors import ConfigError

COMMANDS = ("throughput", "latency")

_TIMEOUT_S = 4 * 3600.0  # of a run
_END_S = 30.0

Flags = dict[str, Any]  # without dashes in front; a list gives several values, true a flag without any
Runner = Callable[[list[str]], list[dict[str, Any]]]  # arguments -> records; raises ConfigError


@dataclass(frozen=True)
class Sweep:
    command: str
    model: str
    flags: Flags
    grid: dict[str, list[Any]]

    @classmethod
    def read(cls, path: str | Path) -> Sweep:
        """Raises ConfigError."""
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        known = {"command", "model", "flags", "grid"}
        if not isinstance(content, dict) or not content.keys() <= known or not {"model", "grid"} <= content.keys():
            raise ConfigError(f"{path}: a sweep has model and grid, and may have command and flags; nothing else")
        command, flags, grid = content.get("command", "throughput"), content.get("flags") or {}, content["grid"]
        if command not in COMMANDS:
            raise ConfigError(f"{path}: command is one of {', '.join(COMMANDS)}, not {command!r}")
        if not isinstance(flags, dict) or not isinstance(grid, dict) or flags.keys() & grid.keys():
            raise ConfigError(f"{path}: flags and grid are mappings that share no name")
        if not grid or not all(isinstance(values, list) and values for values in grid.values()):
            raise ConfigError(f"{path}: every entry of grid is a list of values")
        return cls(command, str(content["model"]), flags, grid)

    def points(self) -> list[Flags]:
        """Every combination; the last entry of the grid changes fastest."""
        return [dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    def arguments(self, point: Flags) -> list[str]:
        """Of ``fastdecode bench``."""
        words = [self.command, self.model]
        for name, value in (self.flags | point).items():
            if value is False or value is None:
                continue
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *([] if value is True else map(str, values))]
        return words

    def key(self, point: Flags) -> str:
        """What makes a run another run."""
        return json.dumps([self.command, self.model, self.flags, point], sort_keys=True)


def run_sweep(
    sweep: Sweep, output: str | Path, *, resume: bool, run: Runner, on_progress: Callable[[str], None]
) -> int:
    """Appends to `output`; returns how many points failed.  Raises ConfigError (output)."""
    output = Path(output)
    if output.exists() and not resume:
        raise ConfigError(f"{output} is there already: go on with --resume, or give another file")
    done = _done(output)
    points, num_failed = sweep.points(), 0
    with output.open("a", encoding="utf-8") as file:
        for number, point in enumerate(points, 1):
            label = f"{number} of {len(points)}: {', '.join(f'{name} {value}' for name, value in point.items())}"
            if sweep.key(point) in done:
                on_progress(f"{label}: there already")
                continue
            on_progress(label)
            try:
                records = run(sweep.arguments(point))
            except ConfigError as error:
                on_progress(f"{label}: failed: {error}")
                num_failed += 1
                records = [{"kind": "failed", "error": str(error)}]
            for record in records:
                file.write(json.dumps({**record, "point": point, "key": sweep.key(point)}) + "\n")
            file.flush()
    return num_failed


def run_process(arguments: list[str]) -> list[dict[str, Any]]:
    """``fastdecode bench`` in a process of its own, so that no run leaves anything to the next."""
    with tempfile.TemporaryDirectory(prefix="fastdecode-") as directory:
        path = Path(directory) / "records.jsonl"
        command = [sys.executable, "-m", "fastdecode", "bench", *arguments, "--output-json", str(path)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            try:
                _, said = process.communicate(timeout=_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                _end(process)
                raise ConfigError(f"it did not end within {_TIMEOUT_S:g} s") from None
            except BaseException:
                _end(process)
                raise
        if process.returncode or not path.exists():
            last = (said.strip().splitlines() or ["it said nothing"])[-1]
            raise ConfigError(f"exit code {process.returncode}: {last}")
        return read_records(path)


def _end(process: subprocess.Popen[str]) -> None:
    """In order, as it has R-workers, and peers; one that does not end is made to."""
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_END_S)
    finally:
        process.kill()


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Lines of JSON; a torn last one, of a run that was cut off, is left out.  Raises ConfigError."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(dict(json.loads(line)))
        except ValueError as error:
            if number < len(lines):
                raise ConfigError(f"{path}, line {number} is no JSON: {error}") from error
    return records


def _done(output: Path) -> set[str]:
    """Keys of points that have a result.  A torn last line is ended, so that the next one stands alone."""
    if not output.exists():
        return set()
    content = output.read_bytes()
    if content and not content.endswith(b"\n"):
        output.write_bytes(content[: content.rfind(b"\n") + 1])
    return {record["key"] for record in read_records(output) if record.get("kind") != "failed" and "key" in record}
