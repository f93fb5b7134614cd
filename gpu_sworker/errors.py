"""What an S-worker refuses.  Both are the caller's: the text says what is wrong and what would work.

SWorkerError
├── ModelNotFound       no such directory, or not (whole) a Hugging Face model with safetensors weights
└── UnsupportedModel    a model whose attention cannot be split off, or a device that is not there
"""

from __future__ import annotations

SUPPORTED = (
    "supported are decoder-only models whose transformers implementation goes through its attention interface: "
    "Llama, Qwen2/3, Mistral, Mixtral, OPT, Gemma 2/3, Phi-3, GPT-2, GPT-NeoX, gpt-oss, Granite, OLMo 2, Cohere, "
    "StarCoder2, StableLM, GLM-4 and their kin, in safetensors, unquantised"
)

NOT_THROUGH_INTERFACE = "its code does not go through transformers' attention interface"


class SWorkerError(Exception):
    """Root of what an S-worker refuses."""


class ModelNotFound(SWorkerError):
    pass


class UnsupportedModel(SWorkerError):
    def __init__(self, model_type: str, reason: str) -> None:
        super().__init__(f"cannot run a {model_type!r} model: {reason}; {SUPPORTED}")
        self.model_type = model_type
        self.reason = reason
