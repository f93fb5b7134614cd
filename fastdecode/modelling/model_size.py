"""How large a model is, and how much memory a device here has free: by torch and transformers, without weights."""

from __future__ import annotations

from fastdecode.errors import ModelError
from fastdecode.modelling.memory_plan import ModelSize
from gpu_sworker import SWorkerError, choose_device, describe_model, free_bytes


def read_model_size(directory: str) -> ModelSize:
    """From its config.json.  Raises ModelError."""
    try:
        facts, parameters = describe_model(directory, "plan")
    except SWorkerError as error:
        raise ModelError(str(error)) from error
    spec = facts.layers[0]
    return ModelSize(
        facts.model_type, len(facts.layers), spec.num_q_heads, spec.num_kv_heads, spec.head_dim, facts.max_positions,
        facts.num_parameters, parameters.num_active,
    )  # fmt: skip


def free_device_bytes() -> int:
    """Of the GPU, or of this machine where there is none."""
    return free_bytes(choose_device("auto"))
