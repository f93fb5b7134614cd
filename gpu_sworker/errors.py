"""What an S-worker refuses.  All are the caller's: the text says what is wrong and what would work.

SWorkerError
├── ModelNotFound       no such directory, or not (whole) a Hugging Face model with safetensors weights
├── UnsupportedModel    a model whose attention cannot be split off, or a device that is not there
└── DeviceKVError       what the store of K and V on the S-worker's device does not do; it has changed nothing then
    ├── DeviceKVFull    its budget has no room for it now, or never
    └── DeviceKVMisused a sequence that is not there, comes twice, or has fewer tokens or a lower limit than that
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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


class DeviceKVError(SWorkerError):
    """Root of what a DeviceKV refuses."""


class DeviceKVFull(DeviceKVError):
    pass


class DeviceKVMisused(DeviceKVError):
    pass


@contextmanager
def foreign_errors(explain: Callable[[str], Exception]) -> Iterator[None]:
    """For code that is not ours, fed with files that are not ours: it may raise anything.

    Raises what `explain` makes of the error's class and first line; lets pass what is told already, and what ends the
    process.
    """
    try:
        yield
    except (SWorkerError, MemoryError):
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # how code in Rust fails, no Exception
        if not isinstance(error, Exception) and not is_panic:
            raise
        raise explain(f"{type(error).__name__}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Of what it says, and the next one where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no more is said"]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])[:300]
