"""The workers of a configuration, ready: the S-worker with its model, the R-workers with a session open."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from cpu_attention import KVBudgetExceeded, KVLayout, num_usable_cores
from fastdecode.engine.capacity import device_kv_bytes, kv_layout, local_kv_bytes, prompt_kv_bytes
from fastdecode.engine.config import EngineConfig
from fastdecode.errors import ConfigError, DeviceKVFailed, ModelError, RWorkerFailed
from fastdecode.holders.device import DeviceHolder, EmulatedStore, HostStore, TorchStore
from fastdecode.holders.launch import RWorkers, find_r_workers, read_key_file, start_r_workers
from fastdecode.holders.launch_mpi import mpi_addresses
from fastdecode.holders.rpool import RPool
from fastdecode.modelling.emulation import PREFIX, emulated_sworker
from fastdecode.modelling.simulation.devices import MEMORY, DeviceMemory
from fastdecode.observe.timeline import NoTimeline, Timeline
from gpu_sworker import DeviceKVFull, EmulatedSWorker, ModelFacts, SWorker, SWorkerError
from transport import Hello, LayerSpec, Welcome, keep_freed_memory

_OPEN_TIMEOUT_S = 120.0  # an R-worker compiles its kernels when a session opens


@dataclass(frozen=True)
class Runtime:
    sworker: SWorker | EmulatedSWorker
    rpool: RPool
    layout: KVLayout
    welcomes: list[Welcome]  # of each R-worker
    device: DeviceHolder | None  # of sequences that stay on the S-worker's device
    cleanup: ExitStack

    def close(self) -> None:
        """Ends the R-workers started here and says goodbye to the others."""
        self.cleanup.close()


def open_runtime(config: EngineConfig, timeline: Timeline | None = None) -> Runtime:
    """config: see `completed`.  Raises ConfigError (options), ModelError (the model directory), RWorkerError."""
    keep_freed_memory()
    keys = read_key_file(config.key_file)  # before the model, which takes longer to complain
    with ExitStack() as cleanup:
        addresses = mpi_addresses() if config.transport == "mpi" else list(config.r_worker_addresses)
        try:
            sworker = _load_sworker(config)
        except SWorkerError as error:
            raise ModelError(str(error)) from error
        layout = kv_layout(config, sworker.facts)
        device = _open_device(config, sworker, layout)
        if device:
            cleanup.callback(device.close)
        if addresses:
            workers = find_r_workers(addresses, keys)
        elif not config.num_r_workers:
            workers = RWorkers()
        else:
            workers = start_r_workers(
                transport=config.transport or "inproc",
                num_workers=config.num_r_workers,
                threads_each=config.r_worker_threads,
                kv_cache_bytes_each=local_kv_bytes(config, sworker.facts, layout, device.host_bytes if device else 0),
                key_file=config.key_file,
            )
        cleanup.callback(workers.close)
        rpool = RPool(workers.handles, config.worker_timeout_s, timeline or NoTimeline())
        rpool.is_needed = device is None
        cleanup.callback(rpool.close)
        welcomes = open_session(
            rpool,
            sworker.facts,
            layout,
            kv_cache_bytes=config.kv_cache_memory,
            timeout_s=min(_OPEN_TIMEOUT_S, config.worker_timeout_s) if config.r_worker_addresses else _OPEN_TIMEOUT_S,
        )
        return Runtime(sworker, rpool, layout, welcomes, device, cleanup.pop_all())


def _load_sworker(config: EngineConfig) -> SWorker | EmulatedSWorker:
    """Raises SWorkerError, ConfigError (an emulated device that is not known, a budget that is not there)."""
    if config.device.startswith(PREFIX):
        return emulated_sworker(config.model, config.device.removeprefix(PREFIX))
    try:
        return SWorker(
            config.model,
            dtype=config.dtype,
            device=config.device,
            linear_kernel=config.linear_kernel,
            prompt_kv_bytes=prompt_kv_bytes(config),
            block_tokens=config.block_tokens,
        )
    except DeviceKVFull as error:
        raise ConfigError(f"{error}: set a lower prompt_kv_memory") from error


def _open_device(config: EngineConfig, sworker: SWorker | EmulatedSWorker, layout: KVLayout) -> DeviceHolder | None:
    """Raises ConfigError."""
    num_bytes = device_kv_bytes(config, sworker.facts, layout)
    if not num_bytes:
        return None
    if isinstance(sworker, EmulatedSWorker):
        memory = MEMORY[config.device.removeprefix(PREFIX)]
        layer_bytes = layout.token_bytes / len(sworker.facts.layers)
        num_blocks = num_bytes // layout.block_bytes
        return DeviceHolder(EmulatedStore(num_blocks, sworker.spend, partial(_attention_seconds, memory, layer_bytes)))
    try:
        if sworker.device.type == "cpu":
            # All cores, also beside R-workers on this machine: their shares go to whoever is free, while with half of
            # the cores each a step was slower, most where their rows are unequal.
            threads = config.r_worker_threads or num_usable_cores()
            hello = _hello(sworker.facts, layout, num_bytes)
            return DeviceHolder(HostStore(hello, kv_bytes=num_bytes, num_threads=threads), host_bytes=num_bytes)
        return DeviceHolder(TorchStore(sworker.device_kv(num_bytes, layout.block_tokens), sworker.facts.layers))
    except (DeviceKVFull, DeviceKVFailed) as error:
        raise ConfigError(f"{error}: set another device_kv_memory") from error


def _attention_seconds(memory: DeviceMemory, token_bytes: float, num_tokens: int) -> float:
    """Of one layer of an emulated device.  token_bytes: of a token's K and V in the layer."""
    return memory.attention_seconds(num_tokens * token_bytes)


def _hello(facts: ModelFacts, layout: KVLayout, kv_cache_bytes: int | None) -> Hello:
    """What a holder of KV will attend to."""
    return Hello(
        layers=tuple(
            LayerSpec(s.num_q_heads, s.num_kv_heads, s.head_dim, s.scale, s.window, s.softcap, s.sinks)
            for s in facts.layers
        ),
        kv_dtype=layout.dtype,
        block_tokens=layout.block_tokens,
        kv_cache_bytes=kv_cache_bytes,
    )


def open_session(
    rpool: RPool, facts: ModelFacts, layout: KVLayout, *, kv_cache_bytes: int | None, timeout_s: float
) -> list[Welcome]:
    """Tells every R-worker what it will attend to.  Raises ConfigError, RWorkerError."""
    try:
        return rpool.open(_hello(facts, layout, kv_cache_bytes), timeout_s)
    except RWorkerFailed as error:
        if error.kind == KVBudgetExceeded.__name__:
            raise ConfigError(f"{error}: raise kv_cache_memory") from error
        raise
