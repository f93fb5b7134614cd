"""The engine's options, checked and composed in one place; each room gets only its own part."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from cpu_attention import KV_DTYPES, LANES, parse_bytes
from fastdecode.errors import ConfigError
from fastdecode.scheduling.kv_credits import KV_POLICIES
from fastdecode.scheduling.load_control import START_POLICIES
from fastdecode.scheduling.waiting import ORDERS

TRANSPORTS = ("inproc", "shm", "ipc", "tcp", "mpi")
LENGTH_PREDICTORS = ("learned", "max-tokens")
DTYPE_NAMES = ("auto", "float32", "float16", "bfloat16")
LINEAR_KERNELS = ("auto", "plain", "onednn")
PLACEMENTS = ("auto", "planned", "device-first")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """
    model: a Hugging Face model directory (config.json and *.safetensors).
    tokenizer: another directory to take the tokenizer from; default: the model's.
    dtype: of the S-Part. ``auto``: float32 on a CPU; on CUDA what config.json says, or else the weights' own if they
        have 16 bits, or else bfloat16 (float16 where the GPU has none), with a warning.
    device: ``auto`` (CUDA if there is one), ``cpu``, ``cuda``, ``cuda:N``; or ``emulated:a10``, ``v100``, ``h100`` or
        ``emulated:FILE`` of a calibration: no weights, made-up tokens, that device's time, and real R-workers.
    linear_kernel: how a CPU multiplies with weights: ``plain`` (torch's own way), ``onednn`` (weights rearranged once,
        at load) or ``auto``, by processor, dtype and shapes.
    kv_cache_dtype: how R-workers store K and V: float32, float16, bfloat16, int8, int4 or k8v4
        (K in int8, V in int4). ``auto``: like dtype.
    kv_cache_memory: bytes of KV per R-worker, like ``"4GiB"``; None: a share of what is free, or what the
        R-worker was started with.
    enable_prefix_caching: whether sequences begin with KV of others whose tokens begin alike, running or ended, as far
        as an R-worker has room for those. None: where that changes no token: not with a kv_cache_dtype of its own,
        because a prompt's own tokens see K and V as they are, and not as they are stored. n samples of a prompt share
        it in any case then. Never with a model whose positions depend on how long a prompt is (dynamic NTK, LongRoPE).
    prompt_kv_memory: bytes on the S-worker's device, like ``"2GiB"``, for K and V of prompts on their way in, as far
        as they take more than one step; those that find no room attend on their R-workers. None: an eighth of what is
        free there.
    device_kv_memory: bytes on the S-worker's device for KV of sequences that stay there, attended to without a wire;
        they go there first, and to R-workers when it is full. In the model's dtype on a GPU, else as on R-workers.
        None: on a GPU what gpu_memory_utilization leaves; on a CPU none if there are R-workers, otherwise a share of
        what is free.
    gpu_memory_utilization: the share of the GPU's memory that may be taken, as vLLM has it; KV gets 0.8 of what weights
        and others leave of it, and steps the rest. None: 0.9. In place of device_kv_memory, on a GPU alone.
    placement: where KV is kept if there are both, the device's and R-workers'. ``planned``: where tokens per second are
        most by a performance model of both, and over as many lanes as pay; the model is that of ``calibration`` or is
        measured at the start, which takes seconds. ``device-first``: on the device as far as it goes. ``auto``: planned
        on a GPU, or with a calibration that tells of the device.
    num_r_workers: how many to start on this machine; 0: none, all KV is on the S-worker's device. None: one; beside a
        GPU one for each NUMA node.
    r_worker_threads: attention threads of each; None: this machine's cores, shared among them.
    transport: ``inproc`` (threads of this process), ``shm`` (processes, shared memory), ``ipc`` or ``tcp`` (processes,
        ZeroMQ), ``mpi`` (ranks). None: ``inproc``; beside a GPU ``shm``, for launching kernels and sharing an
        interpreter do not go together.
    r_worker_addresses: R-workers that run already, like ``tcp://127.0.0.1:5555``; none are started then.
    key_file: the job's key for R-workers over tcp://: they let in its holders alone, and what travels is encrypted;
        ``fastdecode keygen`` makes it, and R-workers that run already were started with a copy of it.
    micro_batches: lanes of sequences that take turns, so that S- and R-Part overlap; each step of a lane is one
        micro-batch. None: 2 with a GPU; 1 on a CPU, where both Parts want the same cores and halving the batch costs
        more than the overlap gains.
    max_num_seqs: sequences that run at the same time, at most.
    max_num_batched_tokens: tokens of one step of all lanes together, at most: one for each running sequence, the rest
        for prompts, which are cut to fit. An eighth is kept for prompts, so no more sequences run than seven eighths.
    max_model_len: longest prompt + output in tokens; None: what the model and the KV budget allow.
    seed: what requests without a seed of their own derive theirs from.
    skip_tokenizer_init: load no tokenizer; prompts are token ids then, and outputs have no text.
    block_tokens: tokens per KV block, a multiple of 16.
    kv_policy: when a sequence fits an R-worker. ``reserve-dynamic``: if it does at every step to come, as far as
        lengths are known; ``reserve-static``: if the ends of all do at once; ``greedy``: if what it has now does.
        Where a guess was wrong, the last to come waits again and is computed again, with the same tokens.
    start_policy: ``steady`` starts sequences in a stream while lengths are alike and more wait than twice what fits
        at once, so that the load stays near half of what starting them together would make it (the paper's load
        stabilising); otherwise, and always under ``eager``, whoever fits starts; ``at-once`` starts the next batch
        when the last one has ended.
    start_interval: steps from one start to the next, under steady.
    max_kv_load: KV tokens of all R-workers that a step may read, at most; None: what they hold.
    max_step_s: the same as a time: what R-workers read in that many seconds, by the calibration.
    calibration: a file of ``fastdecode calibrate``, for max_step_s and placement.
    length_predictor: what is taken for the length of outputs that may end by themselves: ``learned`` from those that
        have ended, by prompt length, or ``max-tokens``.
    length_quantile: the share of outputs that are not to outlive the KV reserved for them.
    order: who starts first of those that wait: ``fcfs``, ``sjf`` or ``ljf`` (first come, shortest, longest job), or
        ``prefix``: first come, and behind it those that begin like it. None: ``prefix`` for prompts that are there
        together, in `LLM` and batch files; ``fcfs`` for a server.
    order_window: how many of them are looked at so at a time; all of them start before others do.
    min_part_tokens: a sequence whose KV comes to twice as much is divided among R-workers, by ranges of its tokens of
        at least so many, if one that had it whole would have more to read than the others. One that fits on no R-worker
        is divided in any case.
    max_num_waiting: sequences that the engine queues; None: any number.
    step_log: a file to write a JSON line to for every step: its time, its tokens, the KV of every R-worker.
    trace: a file to write a timeline to when the engine closes, for ui.perfetto.dev or chrome://tracing: what S- and
        R-workers did and waited for, the last 262,144 spans.
    worker_timeout_s: longest wait for an answer of an R-worker, and for one to come back when none is left.
    """

    model: str
    tokenizer: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    linear_kernel: str = "auto"
    kv_cache_dtype: str = "auto"
    kv_cache_memory: int | None = None
    enable_prefix_caching: bool | None = None
    prompt_kv_memory: int | None = None
    device_kv_memory: int | None = None
    gpu_memory_utilization: float | None = None
    placement: str = "auto"
    num_r_workers: int | None = None
    r_worker_threads: int | None = None
    transport: str | None = None
    r_worker_addresses: tuple[str, ...] = ()
    key_file: str | None = None
    micro_batches: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 4096
    max_model_len: int | None = None
    seed: int = 0
    skip_tokenizer_init: bool = False
    block_tokens: int = 64
    kv_policy: str = "reserve-dynamic"
    start_policy: str = "steady"
    start_interval: int = 1
    max_kv_load: int | None = None
    max_step_s: float | None = None
    calibration: str | None = None
    length_predictor: str = "learned"
    length_quantile: float = 0.95
    order: str | None = None
    order_window: int = 64
    min_part_tokens: int = 8192
    max_num_waiting: int | None = None
    step_log: str | None = None
    trace: str | None = None
    worker_timeout_s: float = 60.0

    def completed(self, *, is_gpu: bool, num_numa_nodes: int) -> Self:
        """With what was left open for the S-worker's device to tell, and this machine."""
        num_r_workers, transport = self.num_r_workers, self.transport
        is_own = is_gpu and not self.r_worker_addresses and transport != "mpi"
        if num_r_workers is None:
            num_r_workers = num_numa_nodes if is_own else 1
        if transport is None:
            transport = "shm" if is_own and num_r_workers else "inproc"
        return replace(self, num_r_workers=num_r_workers, transport=transport)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Self:
        """Raises ConfigError for an option that does not exist, naming the nearest that does."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ConfigError(f"there is no option {name!r}; {hint}The options are {', '.join(known)}")
        options = {name: v.tolist() if hasattr(v, "tolist") else v for name, v in options.items()}  # of numpy
        for name in ("model", "tokenizer", "key_file", "calibration", "step_log", "trace"):
            if options.get(name) is not None:
                options[name] = str(options[name])
        addresses = options.get("r_worker_addresses") or ()
        options["r_worker_addresses"] = (addresses,) if isinstance(addresses, str) else tuple(addresses)
        for name in ("kv_cache_memory", "prompt_kv_memory", "device_kv_memory"):
            try:
                if options.get(name) is not None:
                    options[name] = parse_bytes(options[name])
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from error
        return cls(**options)

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, DTYPE_NAMES)
        _one_of("linear_kernel", self.linear_kernel, LINEAR_KERNELS)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, ("auto", *KV_DTYPES))
        _one_of("transport", self.transport or "inproc", TRANSPORTS)
        _one_of("kv_policy", self.kv_policy, KV_POLICIES)
        _one_of("start_policy", self.start_policy, START_POLICIES)
        _one_of("length_predictor", self.length_predictor, LENGTH_PREDICTORS)
        if self.order is not None:
            _one_of("order", self.order, ORDERS)
        for name, low, high in (
            ("max_num_seqs", 1, 1 << 20),
            ("max_num_batched_tokens", 1, 1 << 20),
            ("block_tokens", LANES, 4096),
            ("start_interval", 1, 1 << 20),
            ("order_window", 1, 1 << 20),
            ("seed", -(2**63), 2**64 - 1),
        ):
            _in_range(name, getattr(self, name), low, high)
        if self.block_tokens % LANES:
            raise ConfigError(f"block_tokens must be a multiple of {LANES}, got {self.block_tokens}")
        for name, low, high in (
            ("num_r_workers", 0, 4096),
            ("micro_batches", 1, 64),
            ("r_worker_threads", 1, 4096),
            ("max_model_len", 2, 1 << 30),
            ("kv_cache_memory", 1, 1 << 62),
            ("prompt_kv_memory", 0, 1 << 62),
            ("device_kv_memory", 0, 1 << 62),
            ("max_kv_load", 1, 1 << 40),
            ("max_num_waiting", 1, 1 << 30),
            ("min_part_tokens", 1, 1 << 31),
        ):
            if getattr(self, name) is not None:
                _in_range(name, getattr(self, name), low, high)
        if not 0 < self.worker_timeout_s <= 86400:
            raise ConfigError(f"worker_timeout_s must be above 0 and at most 86400, got {self.worker_timeout_s}")
        if not 0 <= self.length_quantile <= 1:
            raise ConfigError(f"length_quantile is a share from 0 to 1, got {self.length_quantile}")
        if self.max_step_s is not None and not 0 < self.max_step_s <= 86400:
            raise ConfigError(f"max_step_s must be above 0 and at most 86400, got {self.max_step_s}")
        _one_of("placement", self.placement, PLACEMENTS)
        if self.max_step_s is not None and self.calibration is None:
            raise ConfigError("max_step_s needs calibration=FILE: `fastdecode calibrate` makes the file")
        if self.gpu_memory_utilization is not None:
            if not 0 < self.gpu_memory_utilization <= 1:
                raise ConfigError(
                    f"gpu_memory_utilization is a share above 0 and up to 1, got {self.gpu_memory_utilization}"
                )
            if self.device_kv_memory is not None:
                raise ConfigError("device_kv_memory and gpu_memory_utilization say the same; leave one of them out")
        if self.r_worker_addresses and self.num_r_workers not in (None, 1):
            raise ConfigError("give either num_r_workers (to start some) or r_worker_addresses (that run already)")
        if self.r_worker_addresses and self.transport not in (None, "inproc"):
            raise ConfigError("r_worker_addresses say their transport themselves; leave transport out")
        if len(set(self.r_worker_addresses)) != len(self.r_worker_addresses):
            raise ConfigError("r_worker_addresses names an R-worker twice")
        if self.num_r_workers == 0 and self.transport not in (None, "inproc"):
            raise ConfigError("transport is for R-workers, and num_r_workers=0 asks for none; leave one of them out")
        if self.num_r_workers == 0 and self.kv_cache_memory is not None:
            raise ConfigError(
                "kv_cache_memory is for R-workers, and num_r_workers=0 asks for none: set device_kv_memory"
            )
        if self.num_r_workers == 0 and self.max_step_s is not None:
            raise ConfigError("max_step_s bounds what R-workers read in a step, and num_r_workers=0 asks for none")
        if self.num_r_workers == 0 and self.device_kv_memory == 0:
            raise ConfigError("num_r_workers=0 and device_kv_memory=0 leave no place for KV; raise one of them")
        is_network = self.transport == "tcp" or any(address.startswith("tcp://") for address in self.r_worker_addresses)
        if self.key_file is not None and not is_network:
            raise ConfigError("key_file is for R-workers over tcp://, and there is none; leave it out")


def _one_of(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _in_range(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
