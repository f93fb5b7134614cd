"""What the programs with_*.py share, each of which tries one client: one line of JSON for each thing tried.

Runs in the client's environment, so the standard library alone is used.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Given:
    url: str  # of the server, without /v1
    model: Path  # its directory, for clients that have the tokenizer, too
    scratch: Path  # an empty folder

    @property
    def api(self) -> str:
        return self.url + "/v1"


NAME = "smollm2"  # what the server calls the model
Check = Callable[[Given], object]


def main(*checks: Check) -> None:
    """Each is given the server and returns something to tell, or raises.  Its name says what is tried."""
    parser = argparse.ArgumentParser()
    for name in ("url", "model", "scratch", "record"):
        parser.add_argument(f"--{name}", required=True)
    args = parser.parse_args()
    given = Given(args.url, Path(args.model), Path(args.scratch))
    with Path(args.record).open("a") as record:
        for check in checks:
            began, told, error = time.time(), None, None
            try:
                told = check(given)
            except Exception as raised:
                traceback.print_exc()
                error = f"{type(raised).__name__}: {raised}"
            line = {"what": check.__name__.replace("_", " "), "began": began, "ended": time.time()}
            record.write(json.dumps({**line, "told": told, "error": error}, default=str) + "\n")
            record.flush()


def command(name: str) -> str:
    """An executable of this environment."""
    return str(Path(sys.executable).parent / name)


def shell(words: Sequence[str], *, folder: Path | None = None, timeout_s: float = 1800, text: str = "") -> str:
    """What a command writes.  Raises RuntimeError with the end of it if the command fails."""
    ran = subprocess.run(
        list(words), cwd=folder, input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=timeout_s,
    )  # fmt: skip
    print(ran.stdout, flush=True)
    if ran.returncode:
        raise RuntimeError(f"{Path(words[0]).name} ended with {ran.returncode}: {ran.stdout.strip()[-600:]}")
    return ran.stdout
