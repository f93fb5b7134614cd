"""The S-Part: everything of the model that has weights, on a GPU (or a CPU).  torch and transformers.

Imports nothing else of this project; knows no requests, and holds K and V on the device, in a store with a budget.
"""

from gpu_sworker.device_attention import attend_tokens, attend_tokens_plainly
from gpu_sworker.device_kv import DeviceKV, DeviceRows
from gpu_sworker.emulated import EmulatedSWorker, describe_model
from gpu_sworker.errors import (
    DeviceKVError,
    DeviceKVFull,
    DeviceKVMisused,
    ModelNotFound,
    SWorkerError,
    UnsupportedModel,
    first_line,
    foreign_errors,
)
from gpu_sworker.memory import free_bytes, total_bytes
from gpu_sworker.model import DTYPES, choose_device
from gpu_sworker.partial_state import PartialState, finished, merge, with_sinks
from gpu_sworker.prefill import PromptChunk
from gpu_sworker.probe import AttentionSpec
from gpu_sworker.reference import generate_reference, load_reference
from gpu_sworker.sampler import (
    Penalties,
    RowFault,
    Sampled,
    SamplingRows,
    TokenLogprob,
    TokenLogprobs,
    derive_seed,
    uniforms,
)
from gpu_sworker.staging import Transfer, as_array, as_tensor
from gpu_sworker.suspension import AttentionCall
from gpu_sworker.sworker import PROMPT_KV_SHARE, FlatBatch, KVRoom, ModelFacts, SWorker

__all__ = [
    "DTYPES",
    "PROMPT_KV_SHARE",
    "AttentionCall",
    "AttentionSpec",
    "DeviceKV",
    "DeviceKVError",
    "DeviceKVFull",
    "DeviceKVMisused",
    "DeviceRows",
    "EmulatedSWorker",
    "FlatBatch",
    "KVRoom",
    "ModelFacts",
    "ModelNotFound",
    "PartialState",
    "Penalties",
    "PromptChunk",
    "RowFault",
    "SWorker",
    "SWorkerError",
    "Sampled",
    "SamplingRows",
    "TokenLogprob",
    "TokenLogprobs",
    "Transfer",
    "UnsupportedModel",
    "as_array",
    "as_tensor",
    "attend_tokens",
    "attend_tokens_plainly",
    "choose_device",
    "derive_seed",
    "describe_model",
    "finished",
    "first_line",
    "foreign_errors",
    "free_bytes",
    "generate_reference",
    "load_reference",
    "merge",
    "total_bytes",
    "uniforms",
    "with_sinks",
]
