"""A log cannot be filled by one line of the program, whoever makes it run in a loop; and nothing is left out unsaid."""

from __future__ import annotations

import logging

import pytest

from transport import log_limit
from transport.log_limit import LogLimit, limited_handler


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_a_line_in_a_loop_is_written_once_a_second() -> None:
    now = 0.0
    handler, logger = Lines(), logging.Logger("x")
    handler.addFilter(LogLimit(lambda: now))
    logger.addHandler(handler)
    for turn in range(100_000):
        now = turn / 10_000  # ten seconds
        logger.warning("no more of %s", "these")
        if turn == 50_000:
            logger.warning("something else")
    assert log_limit.BURST + 8 <= len(handler.lines) <= log_limit.BURST + 12
    assert handler.lines.count("something else") == 1
    assert handler.lines[0] == "no more of these"
    left_out = [int(line.split("(and ")[1].split()[0]) for line in handler.lines if "left out" in line]
    assert all(9_000 < number < 11_000 for number in left_out[1:]) and len(left_out) >= 8


def test_a_quiet_place_may_speak_again() -> None:
    now = 0.0
    handler, logger = Lines(), logging.Logger("x")
    handler.addFilter(LogLimit(lambda: now))
    logger.addHandler(handler)
    for begin_s in (0.0, 1000.0):
        now = begin_s
        for _ in range(log_limit.BURST):
            logger.warning("line")
    assert len(handler.lines) == 2 * log_limit.BURST and not any("left out" in line for line in handler.lines)


def test_programs_write_to_standard_error_within_the_limit(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("x")
    logger.addHandler(limited_handler())
    for _ in range(500):
        logger.warning("line")
    assert capsys.readouterr().err.splitlines()[:2] == ["line", "line"]
    handler = logger.handlers[0]
    assert [type(each) for each in handler.filters] == [LogLimit]
