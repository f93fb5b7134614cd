"""FastDecode: decode large language models with the KV cache, and the attention over it, on CPUs.

``import fastdecode`` is cheap; what needs torch is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_DOORS = {
    "LLM": "fastdecode.llm",
    "SamplingParams": "fastdecode.sampling_params",
    "RequestOutput": "fastdecode.outputs",
    "CompletionOutput": "fastdecode.outputs",
    "Logprob": "fastdecode.outputs",
    "EngineConfig": "fastdecode.config",
    "mpi_main": "fastdecode.launch_mpi",
    "calibrate_model": "fastdecode.calibrate",
}

__all__ = ["__version__", *_DOORS]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _DOORS:
        return getattr(importlib.import_module(_DOORS[name]), name)
    raise AttributeError(f"module 'fastdecode' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
