"""What was measured of a model on a machine, kept in a file: T(B) and R, for the performance model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fastdecode.errors import ConfigError
from fastdecode.modelling.perf_model import PerfModel

_FORMAT = "fastdecode calibration 1"


@dataclass(frozen=True)
class Calibration:
    model: str
    device: str  # of the S-worker
    dtype: str
    kv_dtype: str
    host: str
    num_r_workers: int  # that were measured side by side
    r_worker_threads: int
    date: str
    perf_model: PerfModel


def write_calibration(calibration: Calibration, path: str | Path) -> None:
    Path(path).write_text(json.dumps({"format": _FORMAT, **asdict(calibration)}, indent=1) + "\n", encoding="utf-8")


def read_calibration(path: str | Path) -> Calibration:
    """Raises ConfigError for a file that is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if content.pop("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT!r}")
        fields = content.pop("perf_model")
        fields["batches"], fields["seconds"] = tuple(fields["batches"]), tuple(fields["seconds"])
        return Calibration(**content, perf_model=PerfModel(**fields))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} is no calibration ({type(error).__name__}: {error}); `fastdecode calibrate` makes one"
        ) from error
