"""What every step did, in a line: for plots, and to see a scheduler at work."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from fastdecode.errors import ConfigError
from fastdecode.observe.totals import Lap
from fastdecode.scheduling.plan import Step

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepRecord:
    number: int
    begin_s: float  # since the first step
    seconds: float
    num_decodes: int
    num_prompt_tokens: int
    num_running: int
    num_waiting: int
    num_preempted: int  # in this step
    kv_tokens: tuple[int, ...]  # [num_r_workers] of the live sequences, prompts on their way in counted whole
    num_sampled: int = 0  # new tokens
    wait_s: float = 0.0  # the S-worker's thread, for answers; 0 in virtual time
    attention_s: tuple[float | None, ...] = ()  # [num_r_workers]; None: it does not serve; empty in virtual time
    lane: int = 0
    device_kv_tokens: int = 0  # as kv_tokens, on the S-worker's device
    elapsed_s: float | None = None  # of it, what lies after the end of another lane's step; None: all of it

    @property
    def busy_s(self) -> float:
        """Its own share of the time: of all steps together, that in which any was under way."""
        return self.seconds if self.elapsed_s is None else self.elapsed_s

    @property
    def load(self) -> int:
        """W, of all R-workers together."""
        return sum(self.kv_tokens)


def round_record(
    steps: Sequence[Step],
    *,
    begin_s: float,
    seconds: float,
    num_running: int,
    num_waiting: int,
    kv_tokens: tuple[int, ...],
    device_kv_tokens: int = 0,
) -> StepRecord:
    """Of the steps of all lanes that were scheduled together, as if they were one."""
    return StepRecord(
        number=steps[0].number,
        begin_s=begin_s,
        seconds=seconds,
        num_decodes=sum(len(step.decodes) for step in steps),
        num_prompt_tokens=sum(step.num_prompt_tokens for step in steps),
        num_running=num_running,
        num_waiting=num_waiting,
        num_preempted=sum(step.num_preempted for step in steps),
        kv_tokens=kv_tokens,
        device_kv_tokens=device_kv_tokens,
        num_sampled=sum(step.num_sampled for step in steps),
    )


def make_record(
    step: Step,
    *,
    begin_s: float,
    seconds: float,
    num_running: int,
    num_waiting: int,
    kv_tokens: tuple[int, ...],
    elapsed_s: float,
    lap: Lap,
    device_kv_tokens: int = 0,
) -> StepRecord:
    """Of a step as it was scheduled; the numbers are those before it was committed."""
    return StepRecord(
        number=step.number,
        begin_s=begin_s,
        seconds=seconds,
        num_decodes=len(step.decodes),
        num_prompt_tokens=step.num_prompt_tokens,
        num_running=num_running,
        num_waiting=num_waiting,
        num_preempted=step.num_preempted,
        kv_tokens=kv_tokens,
        num_sampled=step.num_sampled,
        wait_s=lap.wait_s,
        attention_s=lap.attention_s,
        lane=step.lane,
        device_kv_tokens=device_kv_tokens,
        elapsed_s=elapsed_s,
    )


class StepLog:
    """A file with a JSON line per step."""

    def __init__(self, path: str | Path) -> None:
        """Raises ConfigError if it cannot be written."""
        try:
            self._file: TextIO = open(path, "w", encoding="utf-8")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise ConfigError(f"cannot write the step log: {error}") from error
        self._is_broken = False

    def write(self, record: StepRecord) -> None:
        """A disk that is full ends the log, with a warning, and not the steps."""
        if not self._is_broken:
            with self._warned():
                self._file.write(json.dumps(asdict(record)) + "\n")

    def close(self) -> None:
        with self._warned():
            self._file.close()

    @contextmanager
    def _warned(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._is_broken:
                logger.warning("the step log %s ends before the steps do: %s", self._file.name, error)
            self._is_broken = True


def read_step_log(path: str | Path) -> Iterator[StepRecord]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            fields = json.loads(line)
            lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
            yield StepRecord(**fields | lists)
