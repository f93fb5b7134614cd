"""``device="emulated:PROFILE"``: an S-worker of another device's speed, for the model that a directory describes."""

from __future__ import annotations

import logging
from pathlib import Path

from fastdecode.errors import ConfigError
from fastdecode.modelling.calibration import read_calibration
from fastdecode.modelling.simulation.devices import DEVICES, gpu_model
from gpu_sworker import EmulatedSWorker, describe_model

logger = logging.getLogger(__name__)

PREFIX = "emulated:"


def emulated_sworker(model: str, profile: str) -> EmulatedSWorker:
    """profile: one of DEVICES, or a file of `fastdecode calibrate`.  Weights are not read.

    Raises ConfigError (profile), SWorkerError (model directory).
    """
    facts, parameters = describe_model(model, f"{PREFIX}{profile}")
    if profile in DEVICES:
        times = gpu_model(profile, parameters.of_block, len(facts.layers))
    elif Path(profile).is_file():
        times = read_calibration(profile).perf_model
    else:
        raise ConfigError(
            f"device {PREFIX}{profile}: the profile is one of {', '.join(DEVICES)}, or a file of `fastdecode calibrate`"
        )
    logger.warning("the S-worker is emulated: it takes the time of %s, and its tokens are made up", profile)
    return EmulatedSWorker(facts, times.s_seconds)
