"""The S-Part: everything of the model that has weights, on a GPU (or a CPU).  torch and transformers.

Imports nothing else of this project; holds no KV and knows no requests.
"""

from gpu_sworker.attention import AttentionCall
from gpu_sworker.errors import ModelNotFound, SWorkerError, UnsupportedModel
from gpu_sworker.model import DTYPES
from gpu_sworker.probe import AttentionSpec
from gpu_sworker.reference import generate_reference
from gpu_sworker.sampler import Penalties, Sampled, SamplingRows, TokenLogprob, derive_seed, uniforms
from gpu_sworker.sworker import FlatBatch, ModelFacts, SWorker

__all__ = [
    "DTYPES",
    "AttentionCall",
    "AttentionSpec",
    "FlatBatch",
    "ModelFacts",
    "ModelNotFound",
    "Penalties",
    "SWorker",
    "SWorkerError",
    "Sampled",
    "SamplingRows",
    "TokenLogprob",
    "UnsupportedModel",
    "derive_seed",
    "generate_reference",
    "uniforms",
]
