"""Measures T(B) and R of a model on the workers at hand, for the performance model (the paper's section 4.3).

How is told in `fastdecode/engine/measuring.py`; here is what is measured, and what is kept of it.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

import torch

from cpu_attention import cpu_name
from fastdecode.engine.capacity import completed
from fastdecode.engine.config import EngineConfig
from fastdecode.engine.measuring import measure
from fastdecode.engine.runtime import Runtime, open_runtime
from fastdecode.errors import ConfigError
from fastdecode.modelling.calibration import Calibration


def calibrate_model(config: EngineConfig, largest_batch: int, on_progress: Callable[[str], None]) -> Calibration:
    """largest_batch: of a micro-batch, tokens; on_progress: told a line for every measurement.

    Raises ConfigError (options, too little KV), ModelError, RWorkerError.
    """
    config = completed(config)
    if not config.num_r_workers:
        raise ConfigError("a calibration is of S- and R-Part; with num_r_workers=0 there is no R-Part to measure")
    runtime = open_runtime(config)
    try:
        return _calibrate(runtime, largest_batch, on_progress)
    finally:
        runtime.close()


def _calibrate(runtime: Runtime, largest_batch: int, on_progress: Callable[[str], None]) -> Calibration:
    batches = [1 << i for i in range(largest_batch.bit_length())]
    if batches[-1] != largest_batch:
        batches.append(largest_batch)
    perf_model = measure(runtime, batches, on_progress)
    facts = runtime.sworker.facts
    return Calibration(
        model=facts.model_type,
        device=torch.cuda.get_device_name(facts.device) if facts.device.startswith("cuda") else cpu_name(),
        dtype=facts.dtype,
        kv_dtype=runtime.layout.dtype,
        host=platform.node(),
        num_r_workers=len(runtime.welcomes),
        r_worker_threads=runtime.welcomes[0].num_threads,
        date=time.strftime("%Y-%m-%d"),
        perf_model=perf_model,
    )
