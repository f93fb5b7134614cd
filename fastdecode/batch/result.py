"""How far a job is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class BatchResult:
    """Of the whole file, earlier runs included."""

    num_lines: int
    num_done: int  # have a result, be it an error
    num_errors: int
    num_new_tokens: int = 0  # of this run

    @property
    def is_complete(self) -> bool:
        return self.num_done == self.num_lines
