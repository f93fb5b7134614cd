"""How much KV there is, how long a sequence may be, what a step may read: arithmetic, and errors that show it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from cpu_attention import KVLayout, LayerShape, available_memory_bytes, format_bytes, numa_nodes
from fastdecode.engine.config import EngineConfig
from fastdecode.errors import ConfigError, ModelError
from fastdecode.modelling.calibration import read_calibration
from fastdecode.modelling.emulation import PREFIX
from fastdecode.modelling.memory_plan import GPU_SHARE, kv_room
from fastdecode.modelling.perf_model import PerfModel
from fastdecode.modelling.simulation.devices import MEMORY
from fastdecode.scheduling.config import SchedulerConfig
from fastdecode.scheduling.predictor import Learned, MaxTokens
from fastdecode.scheduling.scheduler import Scheduler
from fastdecode.scheduling.times import Times
from gpu_sworker import (
    PROMPT_KV_SHARE,
    KVRoom,
    ModelFacts,
    SWorkerError,
    choose_device,
    free_bytes,
    total_bytes,
)
from transport import Welcome

logger = logging.getLogger(__name__)

_SCORES_BYTES = 256 << 20  # of float32 logits that score tokens of prompts, in a step
_LEAST_SCORED_ROWS = 64
_HOST_KV_SHARE = 0.4  # of the free memory, for R-workers started here without a budget; the S-Part may need the rest


def completed(config: EngineConfig) -> EngineConfig:
    """With what it leaves to the S-worker's device, and to this machine.  Raises ModelError if that device is none."""
    if config.device.startswith(PREFIX):
        is_gpu = False  # none is here
    else:
        try:
            is_gpu = choose_device(config.device).type != "cpu"
        except SWorkerError as error:
            raise ModelError(str(error)) from error
    return config.completed(is_gpu=is_gpu, num_numa_nodes=max(1, len(numa_nodes())))


def kv_layout(config: EngineConfig, facts: ModelFacts) -> KVLayout:
    dtype = facts.dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    return KVLayout(tuple(LayerShape(s.num_kv_heads, s.head_dim) for s in facts.layers), dtype, config.block_tokens)


def local_kv_bytes(config: EngineConfig, facts: ModelFacts, layout: KVLayout, taken: int = 0) -> int:
    """The budget of each R-worker that is started on this machine.  Raises ConfigError if it is not there.

    taken: of this machine's memory, promised to others, and not used as yet.
    """
    free = available_memory_bytes() - taken
    assert config.num_r_workers, "it is completed, and some are started"
    if config.kv_cache_memory is None:
        # Never more than could be used.
        longest = config.max_model_len or facts.max_positions or (1 << 30)
        usable = config.max_num_seqs * layout.num_blocks(longest) * layout.block_bytes
        return min(int(_HOST_KV_SHARE * free) // config.num_r_workers, usable)
    if config.kv_cache_memory * config.num_r_workers > free:
        raise ConfigError(
            f"kv_cache_memory {format_bytes(config.kv_cache_memory)} x {config.num_r_workers} R-workers is more than "
            f"the {format_bytes(free)} of memory that are free"
        )
    return config.kv_cache_memory


def prompt_kv_bytes(config: EngineConfig) -> int | None:
    """The budget of prompts on their way in, on the S-worker's device; None: it is a GPU, and takes a share of its own.

    Raises ConfigError if it is to be on this machine, and is not there; UnsupportedModel if the device is not.
    """
    asked = config.prompt_kv_memory
    if choose_device(config.device).type != "cpu":
        return asked
    free = available_memory_bytes()
    if asked is None:
        return int(PROMPT_KV_SHARE * free)
    if asked > free:
        raise ConfigError(
            f"prompt_kv_memory {format_bytes(asked)} is more than the {format_bytes(free)} of memory that are free"
        )
    return asked


def device_kv_bytes(config: EngineConfig, facts: ModelFacts, layout: KVLayout) -> int:
    """The budget of sequences on the S-worker's device; 0: none stay there.  Raises ConfigError if it is not there."""
    asked, share = config.device_kv_memory, config.gpu_memory_utilization
    if share is not None and facts.device == "cpu":
        raise ConfigError("gpu_memory_utilization is a share of a GPU's memory, and the device is cpu: leave it out")
    is_here = not facts.device.startswith(PREFIX)
    if asked == 0 or (asked is None and share is None and config.num_r_workers and not _is_used_first(config, facts)):
        return 0
    if not is_here:
        return _emulated_kv_bytes(facts, asked, GPU_SHARE if share is None else share)
    device = torch.device(facts.device)
    if device.type != "cpu" and config.kv_cache_dtype not in ("auto", facts.dtype):
        raise ConfigError(
            f"KV on {facts.device} is in the model's dtype, {facts.dtype}; kv_cache_dtype {config.kv_cache_dtype} is "
            "for R-workers: leave it out, or device_kv_memory"
        )
    free = free_bytes(device)
    if asked is None:
        longest = config.max_model_len or facts.max_positions or (1 << 30)
        usable = config.max_num_seqs * layout.num_blocks(longest) * layout.block_bytes
        if device.type == "cpu":
            return min(int(_HOST_KV_SHARE * free), usable)
        total = total_bytes(device)
        return min(kv_room(total, total - free, GPU_SHARE if share is None else share), usable)
    if asked > free:
        raise ConfigError(
            f"device_kv_memory {format_bytes(asked)} is more than the {format_bytes(free)} that are free on "
            f"{facts.device}"
        )
    return asked


def _is_used_first(config: EngineConfig, facts: ModelFacts) -> bool:
    """Whether the device keeps KV though nobody says so, and there are R-workers: a GPU does, in their storage type."""
    is_gpu = facts.device != "cpu" and not facts.device.startswith(PREFIX)
    return is_gpu and config.kv_cache_dtype in ("auto", facts.dtype)


def _emulated_kv_bytes(facts: ModelFacts, asked: int | None, share: float) -> int:
    """Of a named GPU what weights in 16 bits leave of a share of its memory.  Raises ConfigError."""
    memory = MEMORY.get(facts.device.removeprefix(PREFIX))
    if memory is None:
        raise ConfigError(
            f"{facts.device} has no memory for KV, only {', '.join(MEMORY)} do; leave device_kv_memory out, and have "
            "R-workers"
        )
    room = kv_room(memory.num_bytes, 2 * facts.num_parameters, share)
    if room <= 0 or (asked or 0) > room:
        raise ConfigError(
            f"{facts.device} has {format_bytes(max(0, room))} for KV beside the weights, and device_kv_memory is "
            f"{format_bytes(asked or 0)}"
        )
    return room if asked is None else asked


def max_model_len(
    config: EngineConfig, facts: ModelFacts, layout: KVLayout, welcomes: Sequence[Welcome], device_blocks: int = 0
) -> int:
    """The longest sequence that the model knows positions for and that the device or the R-workers can hold, in parts
    if need be.

    Its last token is sampled and never stored, so it may be one longer than the KV.  Raises ConfigError.
    """
    of_r_workers = sum(welcome.num_blocks * welcome.block_tokens for welcome in welcomes)
    total = max(of_r_workers, device_blocks * layout.block_tokens)
    name, who = ("kv_cache_memory", "the R-workers hold") if welcomes else ("device_kv_memory", "the device holds")
    asked, known = config.max_model_len, facts.max_positions
    if asked is not None and known is not None and asked > known:
        raise ConfigError(
            f"max_model_len is {asked}, but the model has positions for {known} tokens only: {facts.positions_reason}"
        )
    if asked is not None and asked > total + 1:
        needed = layout.num_blocks(asked - 1) * layout.block_bytes
        raise ConfigError(
            f"the KV budget is too small for one sequence of max_model_len = {asked} tokens: {asked - 1} tokens of KV "
            f"x {layout.token_bytes} bytes, in blocks of {layout.block_tokens} = {format_bytes(needed)} ({needed} "
            f"bytes), but {who} {total} tokens ({total * layout.token_bytes} bytes) in all; raise {name} or lower "
            "max_model_len"
        )
    limit = min(filter(None, (asked, known, total + 1)))
    if asked is None and known is not None and limit < known:
        logger.warning("max_model_len is %d: the KV budget ends there, the model goes to %d", limit, known)
    return limit


def make_scheduler(
    config: EngineConfig,
    facts: ModelFacts,
    capacity_blocks: Sequence[int],
    prompt_kv: KVRoom,
    device_blocks: int = 0,
    times: Times | None = None,
) -> Scheduler:
    """capacity_blocks: [num_r_workers]; prompt_kv: the S-worker's room for prompts; device_blocks: its room for
    sequences that stay; times: of blocks, to place KV by.  Raises ConfigError.
    """
    sharing = _sharing(config, facts)
    return Scheduler(
        SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            num_lanes=config.micro_batches or (1 if facts.device == "cpu" else 2),
            block_tokens=config.block_tokens,
            capacity_blocks=tuple(capacity_blocks),
            device_blocks=device_blocks,
            prompts_attend_there=config.kv_cache_dtype in ("auto", facts.dtype),
            max_num_waiting=config.max_num_waiting,
            kv_policy=config.kv_policy,
            start_policy=config.start_policy,
            start_interval=config.start_interval,
            max_kv_load=max_kv_load(config, facts, len(capacity_blocks)),
            length_quantile=config.length_quantile,
            order=config.order or "fcfs",
            order_window=config.order_window,
            min_part_tokens=config.min_part_tokens,
            restart_tokens=facts.restart_tokens,
            sharing=sharing,
            prompt_kv_blocks=prompt_kv.num_blocks,
            prompt_kv_block_tokens=prompt_kv.block_tokens,
            times=times,
            max_scored_rows=max(_SCORES_BYTES // (4 * facts.vocab_size), _LEAST_SCORED_ROWS),
        ),
        Learned() if config.length_predictor == "learned" else MaxTokens(),
    )


def _sharing(config: EngineConfig, facts: ModelFacts) -> str:
    """See `fastdecode.scheduling.prefixes`."""
    is_exact = config.kv_cache_dtype in ("auto", facts.dtype)
    if facts.positions_by_length:  # KV of one prompt is not that of a longer one
        if config.enable_prefix_caching:
            logger.warning("prefix caching is off: this model's positions depend on how long a prompt is")
        return "samples" if is_exact else "nothing"
    if config.enable_prefix_caching or (config.enable_prefix_caching is None and is_exact):
        return "prompts"
    return "samples" if is_exact else "nothing"


def max_kv_load(config: EngineConfig, facts: ModelFacts, num_r_workers: int) -> int | None:
    """W_lim: what the user sets, or what the R-workers read in the time a step may take.  Raises ConfigError."""
    model = calibrated_times(config, facts)
    if config.max_step_s is None or model is None:
        return config.max_kv_load
    load = model.largest_load(config.max_step_s, num_r_workers)
    if load < 1:
        raise ConfigError(
            f"max_step_s = {config.max_step_s} is too short: by {config.calibration} the R-workers need "
            f"{model.num_layers * model.r_fixed_seconds:.4f} s for a step that reads nothing"
        )
    return min(load, config.max_kv_load or load)


def calibrated_times(config: EngineConfig, facts: ModelFacts) -> PerfModel | None:
    """Those of the calibration, if there is one.  Raises ConfigError if it is of another model."""
    if config.calibration is None:
        return None
    calibration = read_calibration(config.calibration)
    model = calibration.perf_model
    if model.num_layers != len(facts.layers):
        raise ConfigError(
            f"{config.calibration} was taken of a model of {model.num_layers} layers ({calibration.model}); this one "
            f"has {len(facts.layers)}"
        )
    return model


def describe_device(facts: ModelFacts, layout: KVLayout, num_blocks: int) -> str:
    """Likewise, of the S-worker's device."""
    num_bytes, num_tokens = num_blocks * layout.block_bytes, num_blocks * layout.block_tokens
    return (
        f"the S-worker's device, {facts.device}: {format_bytes(num_bytes)} of {layout.dtype} KV = {num_tokens} tokens"
    )


def describe_places(
    names: Sequence[str], welcomes: Sequence[Welcome], layout: KVLayout, asked_bytes: int | None, max_model_len: int
) -> list[str]:
    """A line per R-worker: where its KV is and how much.  Warns of one that gives less than was asked for."""
    lines = []
    blocks_each = layout.num_blocks(max_model_len - 1)  # the last token is sampled and never stored
    for name, welcome in zip(names, welcomes, strict=True):
        num_bytes = welcome.num_blocks * welcome.block_bytes
        if asked_bytes is not None and num_bytes + welcome.block_bytes <= asked_bytes:
            logger.warning(
                "%s was started with less KV than kv_cache_memory = %s: it gives %s",
                name, format_bytes(asked_bytes), format_bytes(num_bytes),
            )  # fmt: skip
        whole = welcome.num_blocks // blocks_each
        lines.append(
            f"{name} on {welcome.host}, process {welcome.pid}: {format_bytes(num_bytes)} of {layout.dtype} KV = "
            f"{welcome.num_blocks * welcome.block_tokens} tokens = {f'{whole} sequences' if whole else 'a part'} of "
            f"{max_model_len} tokens, {welcome.num_threads} threads"
        )
    return lines
