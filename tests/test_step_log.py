"""A line for each step, which is read back; and a disk that is full costs the lines alone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from test_metrics import step

from fastdecode.errors import ConfigError
from fastdecode.observe.step_log import StepLog, read_step_log


def test_what_is_written_is_read(tmp_path: Path) -> None:
    records = [step(0, attention_s=(0.1, None)), step(1, num_preempted=3)]
    log = StepLog(tmp_path / "steps")
    for record in records:
        log.write(record)
    log.close()
    assert list(read_step_log(tmp_path / "steps")) == records


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
@pytest.mark.parametrize("num_steps", [1, 1000])  # told when it is closed, and in the middle
def test_a_full_disk_ends_the_log_and_not_the_steps(num_steps: int, caplog: pytest.LogCaptureFixture) -> None:
    log = StepLog("/dev/full")
    with caplog.at_level(logging.WARNING, "fastdecode"):
        for number in range(num_steps):
            log.write(step(number))
        log.close()
    assert [record.getMessage() for record in caplog.records] == [
        "the step log /dev/full ends before the steps do: [Errno 28] No space left on device"
    ]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write the step log"):
        StepLog(tmp_path)
