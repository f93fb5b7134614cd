"""What a measurement ran on: device, driver, processor, versions.

python bench/gpu/machine.py        as JSON
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import fastdecode  # before torch, see there

# isort: split
import torch

from cpu_attention import available_memory_bytes, cpu_name, num_usable_cores

_PACKAGES = ("torch", "triton", "transformers", "numba", "numpy", "ml_dtypes", "pyzmq", "msgspec", "greenlet", "xxhash")
_QUERY_TIMEOUT_S = 15.0


def describe(dry: bool) -> dict[str, Any]:
    """dry: the processor alone is spoken of, whatever else is there."""
    has_device = torch.cuda.is_available() and not dry
    return {
        "name": torch.cuda.get_device_name(0) if has_device else cpu_name(),
        "device": _describe_device() if has_device else None,
        "cpu": cpu_name(),
        "cores": num_usable_cores(),
        "available_memory_bytes": available_memory_bytes(),
        "kernel": platform.release(),
        "versions": {"python": platform.python_version(), "fastdecode": fastdecode.__version__, **_versions()},
    }


def _describe_device() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "capability": list(torch.cuda.get_device_capability(0)),
        "cuda": torch.version.cuda,
        "driver": _ask_driver("driver_version"),
        "clocks_mhz": _ask_driver("clocks.sm,clocks.mem,clocks.max.sm"),
        "count": torch.cuda.device_count(),
    }


def _ask_driver(fields: str) -> str | None:
    """None: there is no nvidia-smi, or it gives no answer."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="of the processor alone")
    print(json.dumps(describe(parser.parse_args().dry)))


if __name__ == "__main__":
    main()
