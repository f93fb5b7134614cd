"""What a machine that nothing can be fetched on lacks: wheels, downloaded here and installed there into a folder.

torch, numba, NumPy and the like are taken to be there; carried are the packages that come with none of them, and
transformers, whose version tokens depend on.  Versions are those of constraints.txt.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]
CARRIED = ("pyzmq", "msgspec", "greenlet", "xxhash", "transformers")
MOST_BYTES = 64 << 20
_PYTHON = "3.12"
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_26_x86_64", "manylinux_2_24_x86_64",
              "manylinux_2_17_x86_64", "manylinux2014_x86_64")  # fmt: skip


class CarryError(Exception):
    """pip failed, or there is more than may be carried."""


def download_command(folder: Path, names: Sequence[str] = CARRIED) -> list[str]:
    """Of their wheels for Linux on x86-64, and of nothing that they need."""
    platforms = [word for platform in _PLATFORMS for word in ("--platform", platform)]
    return [
        sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:",
        "--python-version", _PYTHON, "--implementation", "cp", *platforms, "--dest", str(folder),
        *(_pinned(name) for name in names),
    ]  # fmt: skip


def install_command(wheels: Path, folder: Path) -> list[str]:
    """Of every wheel there is, without a look at any index."""
    return [
        sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-index", "--no-deps",
        "--no-cache-dir", "--upgrade", "--find-links", str(wheels), "--target", str(folder),
        *sorted(str(wheel) for wheel in wheels.glob("*.whl")),
    ]  # fmt: skip


def download(folder: Path) -> int:
    """Bytes of all wheels in the folder.  Raises CarryError."""
    folder.mkdir(parents=True, exist_ok=True)
    _run(download_command(folder))
    num_bytes = sum(wheel.stat().st_size for wheel in folder.glob("*.whl"))
    if num_bytes > MOST_BYTES:
        raise CarryError(f"{num_bytes} bytes of wheels in {folder}; at most {MOST_BYTES} are carried: begin with none")
    return num_bytes


def install(wheels: Path, folder: Path) -> None:
    """Raises CarryError."""
    if not any(wheels.glob("*.whl")):
        raise CarryError(f"{wheels} holds no wheel; `--wheels {wheels}` downloads them, where there is a network")
    _run(install_command(wheels, folder))


def unmet(places: Sequence[str]) -> list[str]:
    """Requirements of setup.py that are not there, or not in such a version, with what is.

    places: folders that packages are looked for in, the first one that has a package counting.
    """
    found: dict[str, Distribution] = {}
    for distribution in distributions(path=list(places)):
        found.setdefault(_plain(distribution.metadata["Name"] or ""), distribution)
    missing = []
    for requirement in requirements():
        name = re.match(r"[\w.-]+", requirement)
        assert name, requirement
        there = found.get(_plain(name[0]))
        if there is None:
            missing.append(f"{requirement} (none is there)")
        elif not _satisfies(there.version, requirement[name.end() :]):
            missing.append(f"{requirement} ({there.version} is there)")
    return missing


def requirements() -> list[str]:
    """setup.py's `install_requires`."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            names: list[str] = ast.literal_eval(node.value)
            return names
    raise AssertionError("setup.py has install_requires")


def _pinned(name: str) -> str:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").split()
    return next((pin for pin in pins if _plain(pin.partition("==")[0]) == _plain(name)), name)


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _satisfies(version: str, bounds: str) -> bool:
    """bounds: like ``>=5.17,<6``, releases alone."""
    own = _numbers(version)
    return all(
        own >= _numbers(bound[2:]) if bound.startswith(">=") else own < _numbers(bound[1:])
        for bound in bounds.split(",")
        if bound
    )


def _numbers(version: str) -> tuple[int, ...]:
    """Of the release: 2.11.0+cu130 is 2, 11; zeros at its end say nothing."""
    release = re.match(r"[\d.]*", version)
    assert release
    numbers = [int(part) for part in release[0].split(".") if part]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def _run(command: list[str]) -> None:
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode:
        raise CarryError(f"{' '.join(command)} ended with {finished.returncode}:\n{finished.stderr[-2000:]}")
