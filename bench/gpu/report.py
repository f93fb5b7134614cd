"""What a stage writes: a JSON file that is whole at any time, so that a stage that is ended leaves what it had found.

results      points, in the order in which they were measured
figures      what goals are about: value, roof, goal, met or not
left_out     points for which there was no time, or no memory
failures     points that raised, with the end of what they said
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers.utils import logging as transformers_logging

from bench.gpu.machine import describe

_SHARE_OF_TIME = 0.85  # after which no further point is begun
_SAID = 1500  # characters of what an exception says


@dataclass(frozen=True)
class Figure:
    name: str
    value: float | None  # None: it could not be measured, and `note` says why
    unit: str
    roof: float | None  # in the same unit, of the same run
    goal: str  # as a person reads it; empty: there is none
    is_met: bool | None  # None: nothing is held to it
    note: str = ""


def arguments(description: str | None) -> argparse.Namespace:
    """Those of every stage, from the command line of its process, which tells from now on where it hangs or crashes."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # by which the driver asks
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the JSON goes")
    parser.add_argument(
        "--work", type=Path, required=True, metavar="DIR", help="for models, which other stages use too"
    )
    parser.add_argument("--seconds", type=float, default=90.0, help="it begins nothing new when most of them are over")
    parser.add_argument(
        "--dry", action="store_true", help="tiny shapes on the processor: whether it runs, not how fast"
    )
    return parser.parse_args()


@dataclass
class Report:
    stage: str
    args: argparse.Namespace
    results: list[dict[str, Any]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    is_complete: bool = False

    def __enter__(self) -> Self:
        transformers_logging.disable_progress_bar()
        self._began = time.monotonic()
        self._machine = describe(self.args.dry)
        if not self.args.dry and not torch.cuda.is_available():
            raise SystemExit("torch sees no CUDA device here; --dry tries the stage on the processor")
        self.save()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.failures.append({"what": "the stage", "error": _said(error)})
        self.is_complete = error is None
        self.save()

    @property
    def is_dry(self) -> bool:
        return bool(self.args.dry)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.is_dry else torch.device("cuda", 0)

    def has_time(self, what: str, seconds: float = 0.0) -> bool:
        """For a point that takes about so long; otherwise it is noted as left out."""
        is_there = time.monotonic() - self._began + seconds < _SHARE_OF_TIME * self.args.seconds
        if not is_there:
            self.left_out.append(f"{what}: no time left")
        return is_there

    def add(self, **point: Any) -> None:
        print(f"{self.stage}: " + ", ".join(f"{name} {_short(value)}" for name, value in point.items()), flush=True)
        self.results.append(point)
        self.save()

    def hold(
        self,
        name: str,
        value: float | None,
        unit: str,
        *,
        roof: float | None = None,
        at_least: float | None = None,
        at_most: float | None = None,
        is_of_speed: bool = True,
        note: str = "",
    ) -> None:
        """A figure, and whether it keeps its goal.  One of speed is held to nothing in a dry run."""
        goal = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}" if at_most is not None else ""
        is_met = None
        if goal and value is not None and not (is_of_speed and self.is_dry):
            is_met = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        self.figures.append(Figure(name, value, unit, roof, goal, is_met, note))
        self.save()

    @contextmanager
    def surviving(self, what: str) -> Iterator[None]:
        """A point that raises is told, and the others go on."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            self.left_out.append(f"{what}: no memory ({str(error).splitlines()[0]})")
        except Exception as error:
            self.failures.append({"what": what, "error": _said(error)})
            print(f"{self.stage}: {what} failed: {error}", file=sys.stderr, flush=True)
        else:
            return
        if not self.is_dry:
            torch.cuda.empty_cache()
        self.save()

    def save(self) -> None:
        record = {
            "stage": self.stage,
            "is_dry": self.is_dry,
            "is_complete": self.is_complete,
            "seconds": round(time.monotonic() - self._began, 3),
            "command": [sys.executable, *sys.argv],
            "machine": self._machine,
            "figures": [asdict(figure) for figure in self.figures],
            "left_out": self.left_out,
            "failures": self.failures,
            "results": self.results,
        }
        write_whole(self.args.out, record)


def write_whole(path: Path, record: Any) -> None:
    """The file is the old one or the new one, whenever the writer is ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def _said(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-_SAID:]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
