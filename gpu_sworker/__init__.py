"""The S-Part: everything of the model that has weights, on a GPU (or a CPU).  torch and transformers.

Imports nothing else of this project; knows no requests, and holds no KV but that of prompts on their way in.
"""

from gpu_sworker.attention import AttentionCall
from gpu_sworker.emulated import EmulatedSWorker, describe_model
from gpu_sworker.errors import ModelNotFound, SWorkerError, UnsupportedModel, foreign_errors
from gpu_sworker.model import DTYPES
from gpu_sworker.prefill import PromptChunk
from gpu_sworker.probe import AttentionSpec
from gpu_sworker.reference import generate_reference
from gpu_sworker.sampler import Penalties, RowFault, Sampled, SamplingRows, TokenLogprob, derive_seed, uniforms
from gpu_sworker.staging import Transfer
from gpu_sworker.sworker import FlatBatch, ModelFacts, SWorker

__all__ = [
    "DTYPES",
    "AttentionCall",
    "AttentionSpec",
    "EmulatedSWorker",
    "FlatBatch",
    "ModelFacts",
    "ModelNotFound",
    "Penalties",
    "PromptChunk",
    "RowFault",
    "SWorker",
    "SWorkerError",
    "Sampled",
    "SamplingRows",
    "TokenLogprob",
    "Transfer",
    "UnsupportedModel",
    "derive_seed",
    "describe_model",
    "foreign_errors",
    "generate_reference",
    "uniforms",
]
