"""Stop strings in a text that comes in parts: which is complete first, and how much may still become one.

The automaton of Knuth, Morris and Pratt (1977) for each string: a step for each character, however
parts begin and end.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class _Stop:
    text: str
    borders: array[int]  # [len(text)], of its first i + 1 characters: how many of their last are the first ones again


class StopStrings:
    """Immutable; shared by all who look for them."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = [_Stop(text, _borders(text)) for text in dict.fromkeys(stops)]


def _borders(text: str) -> array[int]:
    borders = array("l", [0])
    length = 0
    for character in text[1:]:
        while length and text[length] != character:
            length = borders[length - 1]
        length += text[length] == character
        borders.append(length)
    return borders


@dataclass(frozen=True)
class StopMatch:
    position: int  # in the text, where it begins
    stop: str

    @property
    def end(self) -> int:
        return self.position + len(self.stop)


class StopScan:
    """Of one text."""

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops.stops
        self._begun = [0] * len(self._stops)  # per stop string: how many of its characters the text ends with
        self._num_characters = 0

    @property
    def num_uncertain(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        return max(self._begun)

    def push(self, text: str) -> StopMatch | None:
        """The first that is complete in it; of several that end with the same character the longest."""
        ends = [
            (end, stop.text)
            for i, stop in enumerate(self._stops)
            if (self._begun[i] or stop.text[0] in text) and (end := self._step(i, stop, text))
        ]
        self._num_characters += len(text)
        if not ends:
            return None
        end, stop_text = min(ends, key=lambda found: (found[0], -len(found[1])))
        return StopMatch(self._num_characters - len(text) + end - len(stop_text), stop_text)

    def _step(self, index: int, stop: _Stop, text: str) -> int:
        """Where in the text it is complete for the first time; 0: nowhere."""
        wanted, borders, begun = stop.text, stop.borders, self._begun[index]
        end = 0
        for i, character in enumerate(text):
            while begun and wanted[begun] != character:
                begun = borders[begun - 1]
            begun += wanted[begun] == character
            if begun == len(wanted):
                end = end or i + 1
                begun = borders[begun - 1]
        self._begun[index] = begun
        return end
