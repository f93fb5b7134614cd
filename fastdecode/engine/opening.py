"""From a configuration to an engine that runs: workers, tokenizer, scheduler, step log, timeline; and the way back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch

from fastdecode.api.sampling_params import SamplingParams
from fastdecode.ending import Ending
from fastdecode.engine.capacity import (
    calibrated_times,
    completed,
    describe_device,
    describe_places,
    make_scheduler,
    max_model_len,
)
from fastdecode.engine.config import EngineConfig
from fastdecode.engine.engine import Engine
from fastdecode.engine.measuring import measure
from fastdecode.engine.runtime import Runtime, open_runtime
from fastdecode.errors import ConfigError
from fastdecode.modelling.perf_model import PerfModel
from fastdecode.observe.step_log import StepLog, StepRecord
from fastdecode.observe.timeline import Timeline
from fastdecode.text.tokenizer import Tokenizer
from gpu_sworker import EmulatedSWorker, ModelFacts, SWorker

logger = logging.getLogger(__name__)

_MEASURED_BATCHES = (1, 32, 128, 512, 2048)  # tokens, and the largest that there may be
_SAMPLING_WISHES = ("top_p", "temperature", "top_k", "min_p")
_UNSUPPORTED_WISHES = (
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "sequence_bias",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class OpenEngine:
    """An engine and what it stands on, which ends when this is closed, garbage, or the interpreter's end comes."""

    config: EngineConfig
    engine: Engine
    tokenizer: Tokenizer | None
    facts: ModelFacts
    default_params: SamplingParams  # the model's own
    max_model_len: int
    kv_places: list[str]  # a line for the device, if it has some, and one per R-worker: where its KV is, and how much
    cleanup: InitVar[ExitStack]
    ending: Ending = field(init=False)

    def __post_init__(self, cleanup: ExitStack) -> None:
        object.__setattr__(self, "ending", Ending(self, cleanup.close))

    def close(self) -> None:
        """Ends the R-workers started here and says goodbye to the others."""
        self.ending.close()


def open_engine(config: EngineConfig, on_step: Callable[[StepRecord], None] | None = None) -> OpenEngine:
    """on_step: told of every step.  Raises ConfigError (options), ModelError (the model directory), RWorkerError."""
    config = completed(config)
    with ExitStack() as cleanup:
        listeners = [on_step] if on_step else []
        if config.step_log:
            step_log = StepLog(config.step_log)
            cleanup.callback(step_log.close)
            listeners.append(step_log.write)
        timeline = Timeline() if config.trace else None
        if timeline and config.trace:
            timeline.write(config.trace)  # now, so that a path that cannot be written costs nobody a run
            cleanup.callback(timeline.write, config.trace)
        runtime = open_runtime(config, timeline)
        cleanup.callback(runtime.close)
        tokenizer = None if config.skip_tokenizer_init else Tokenizer(config.tokenizer or config.model)
        facts = runtime.sworker.facts
        device_blocks = runtime.device.num_blocks if runtime.device else 0
        times = _times(config, runtime)
        longest = max_model_len(config, facts, runtime.layout, runtime.welcomes, device_blocks)
        engine = Engine(
            sworker=runtime.sworker,
            rpool=runtime.rpool,
            tokenizer=tokenizer,
            max_model_len=longest,
            seed=config.seed,
            eos_token_ids=_eos_token_ids(runtime.sworker, tokenizer),
            scheduler=make_scheduler(
                config,
                facts,
                [welcome.num_blocks for welcome in runtime.welcomes],
                runtime.sworker.prompt_kv,
                device_blocks,
                times,
            ),
            device=runtime.device,
            on_step=_all_of(listeners),
            timeline=timeline,
        )
        names = runtime.rpool.names
        places = describe_places(names, runtime.welcomes, runtime.layout, config.kv_cache_memory, longest)
        if device_blocks:
            places = [describe_device(facts, runtime.layout, device_blocks), *places]
        for line in places:
            logger.info("%s", line)
        default_params = _default_params(runtime.sworker)
        return OpenEngine(config, engine, tokenizer, facts, default_params, longest, places, cleanup.pop_all())


def _times(config: EngineConfig, runtime: Runtime) -> PerfModel | None:
    """To place KV by; None: on the device first.  Raises ConfigError, RWorkerError."""
    if runtime.device is None or not runtime.welcomes or config.placement == "device-first":
        if config.placement == "planned":
            raise ConfigError(
                "placement=planned is between the device and R-workers: set device_kv_memory, and num_r_workers above 0"
            )
        if config.calibration is not None and config.max_step_s is None:
            raise ConfigError(
                "calibration is for max_step_s, or for placement beside device_kv_memory: set one of them"
            )
        return None
    facts = runtime.sworker.facts
    known = calibrated_times(config, facts)
    if known is not None and known.device_kv_token_seconds is not None:
        return known
    if config.placement == "auto" and facts.device == "cpu":
        return None
    batches = [size for size in _MEASURED_BATCHES if size < config.max_num_batched_tokens]
    try:
        return measure(runtime, [*batches, config.max_num_batched_tokens], logger.info, config.max_num_seqs)
    except (ConfigError, torch.OutOfMemoryError) as error:
        if config.placement == "planned":
            raise
        logger.warning("KV goes to the device first, for times to place it by could not be measured: %s", error)
        return None


def _all_of(listeners: list[Callable[[StepRecord], None]]) -> Callable[[StepRecord], None] | None:
    def tell(record: StepRecord) -> None:
        for listener in listeners:
            listener(record)

    return tell if listeners else None


def _eos_token_ids(sworker: SWorker | EmulatedSWorker, tokenizer: Tokenizer | None) -> frozenset[int]:
    """The model's, and the tokenizer's beside them, as vLLM, TGI and llama.cpp do.

    The configuration of a fine-tune for chats often names the base model's end alone, and only the tokenizer the one
    that it was taught.
    """
    named = frozenset(sworker.facts.eos_token_ids)
    end = tokenizer.end if tokenizer else None
    if end is None or end.token_id in named or isinstance(sworker, EmulatedSWorker):  # whose tokens mean nothing
        return named
    logger.info("also stops at %s (%d), the tokenizer's end of sequence", end.text, end.token_id)
    return named | {end.token_id}


def _default_params(sworker: SWorker | EmulatedSWorker) -> SamplingParams:
    """What ``transformers.generate`` would take from generation_config.json; greedy if it does not ask for sampling.

    A value that cannot be is left at our default, with a warning.
    """
    wishes = sworker.generation_config
    ignored = [name for name in _UNSUPPORTED_WISHES if getattr(wishes, name, None)]
    if ignored:
        logger.warning("generation_config.json asks for %s, which is not supported here", ", ".join(ignored))
    is_sampled = bool(getattr(wishes, "do_sample", False))
    fields: dict[str, Any] = {} if is_sampled else {"temperature": 0.0}
    for name in (*(_SAMPLING_WISHES if is_sampled else ()), "repetition_penalty"):
        value = getattr(wishes, name, None)
        if value is None:
            continue
        if name == "top_p" and value == 0 and not isinstance(value, bool):
            fields["temperature"] = 0.0  # the likeliest token is always kept, and it alone here
            continue
        if name == "top_k" and isinstance(value, float) and value.is_integer():
            value = int(value)
        try:
            SamplingParams(**dict[str, Any]({name: value}))
        except ValueError as error:
            logger.warning("generation_config.json: %s; the default is taken", error)
        else:
            fields.setdefault(name, value)
    return SamplingParams(**fields)
