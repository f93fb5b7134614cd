"""``fastdecode doctor``: what this machine offers, and what every bug report should hold."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from typing import Any

import fastdecode
from cpu_attention import (
    available_cores,
    available_memory_bytes,
    cgroup_memory_limit_bytes,
    cpu_name,
    default_kv_cache_bytes,
    format_bytes,
    measure_read_bandwidth,
    num_usable_cores,
    numa_nodes,
)

_PACKAGES = (
    "torch",
    "transformers",
    "numba",
    "numpy",
    "pyzmq",
    "mpi4py",
    "msgspec",
    "xxhash",
    "greenlet",
    "safetensors",
    "tokenizers",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument("--skip-bandwidth", action="store_true", help="do not measure memory bandwidth (a few seconds)")


def run(args: argparse.Namespace) -> int:
    facts = collect(measure=not args.skip_bandwidth)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    for section, entries in facts.items():
        print(section)
        for name, value in entries.items():
            print(f"  {name:24} {value}")
    return 0


def collect(*, measure: bool) -> dict[str, dict[str, Any]]:
    """Sections of name -> value, ready to print."""
    cores, limit = available_cores(), cgroup_memory_limit_bytes()
    nodes = numa_nodes()
    memory: dict[str, Any] = {
        "available": format_bytes(available_memory_bytes()),
        "cgroup limit": "none" if limit is None else format_bytes(limit),
        "default KV budget": format_bytes(default_kv_cache_bytes()),
    }
    if measure:
        for threads in sorted({1, len(cores)}):
            memory[f"read, {threads} thread{'s' * (threads > 1)}"] = f"{measure_read_bandwidth(threads) / 1e9:.1f} GB/s"
    return {
        "machine": {
            "host": platform.node(),
            "system": f"{platform.system()} {platform.release()}",
            "processor": cpu_name(),
            "cores to use": f"{len(cores)} ({_ranges(cores)})",
            "threads to run at once": num_usable_cores(),
            **{
                f"NUMA node {node.index}": f"cores {_ranges(node.cores)}, {format_bytes(node.memory_bytes)}"
                for node in nodes
            },
        },
        "memory": memory,
        "accelerator": _accelerator(),
        "MPI": {"mpirun": _mpirun(), "mpi4py": _version("mpi4py")},
        "versions": {
            "fastdecode": fastdecode.__version__,
            "python": sys.version.split()[0],
            **{name: _version(name) for name in _PACKAGES},
        },
    }


def _accelerator() -> dict[str, str]:
    try:
        import torch
    except ImportError as error:
        return {"GPU": f"torch cannot be imported: {error}"}
    if not torch.cuda.is_available():
        return {"GPU": f"none that torch {torch.__version__} sees; the S-worker runs on the CPU"}
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {f"cuda:{i}": f"{device.name}, {format_bytes(device.total_memory)}" for i, device in enumerate(devices)}


def _mpirun() -> str:
    path = shutil.which("mpirun")
    if path is None:
        return "not found (pip install 'fastdecode[mpi]' brings one)"
    try:
        out = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{path} does not run: {error}"
    return f"{path}: {(out.strip().splitlines() or ['no version'])[0]}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _ranges(numbers: tuple[int, ...]) -> str:
    """(0, 1, 2, 3, 8) -> 0-3,8"""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)
