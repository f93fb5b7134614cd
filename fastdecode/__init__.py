"""FastDecode: decode large language models with the KV cache, and the attention over it, on CPUs.

``import fastdecode`` is cheap; what needs torch is imported when it is first asked for.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

__version__ = "0.1.0"

# After each of torch's parallel regions libgomp's threads spin for milliseconds, on the cores that attention wants
# next: a step of both Parts on two cores took 77-83 ms so, 67 ms where they spin for 50 us, 79 ms where they do not.
# Read when torch is loaded, so it does nothing for who imported torch before.
TORCH_THREADS_SPIN = "torch" in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

_DOORS = {
    "LLM": "fastdecode.llm",
    "SamplingParams": "fastdecode.api.sampling_params",
    "RequestOutput": "fastdecode.api.outputs",
    "CompletionOutput": "fastdecode.api.outputs",
    "Logprob": "fastdecode.api.outputs",
    "EngineConfig": "fastdecode.engine.config",
    "mpi_main": "fastdecode.holders.launch_mpi",
    "Tokenizer": "fastdecode.text.tokenizer",
    "calibrate_model": "fastdecode.benchmark.calibrate",
    "read_model_size": "fastdecode.modelling.model_size",
    "free_device_bytes": "fastdecode.modelling.model_size",
    "run_batch": "fastdecode.batch.runner",
    "run_server": "fastdecode.server.run",
    "send_all": "fastdecode.benchmark.http_client",
}

__all__ = ["__version__", *_DOORS]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _DOORS:
        return getattr(importlib.import_module(_DOORS[name]), name)
    raise AttributeError(f"module 'fastdecode' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
