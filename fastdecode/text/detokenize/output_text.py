"""The text of one output: all of it, what is new, and where its tokens stand in it."""

from __future__ import annotations

from collections.abc import Sequence

from fastdecode.text.detokenize.stop_strings import StopMatch, StopScan, StopStrings
from fastdecode.text.detokenize.streams import Stream


class OutputText:
    """Grows by a token at a time; a caller takes what it will not take back.

    text       ███████████████████░░░░░
               told        untold │ may become a stop string
    """

    def __init__(self, stream: Stream, stops: StopStrings | None) -> None:
        self._stream = stream
        self._scan = StopScan(stops) if stops else None
        self._parts: list[str] = []
        self._untold: list[str] = []  # the last of them
        self._num_told = 0
        self.is_finished = False
        self.num_characters = 0
        self.offsets: list[int] = []  # per token: where in the text its own begins

    def push(self, token_id: int) -> StopMatch | None:
        """The first stop string that it completes, if any.  The text goes on, so that the caller may ignore it."""
        text = self._stream.push([token_id])
        self.offsets.append(self.num_characters + self._stream.num_before)
        return self._add(text)

    def push_all(self, token_ids: Sequence[int]) -> None:
        """Many at once, of a text that nobody watches while it grows: no stop strings, no offsets."""
        self._add(self._stream.push(token_ids))

    def push_hidden(self) -> None:
        """A token that is not to be in the text, after all others."""
        self.finish()
        self.offsets.append(self.num_characters)

    def finish(self) -> StopMatch | None:
        """No token follows: what was half a character, or might have changed, is text too.  May be called twice."""
        if self.is_finished:
            return None
        self.is_finished = True
        return self._add(self._stream.flush())

    def take_certain(self) -> str:
        """What was not told yet and is not the beginning of a stop string, either."""
        return self.take(self.num_characters - (self._scan.num_uncertain if self._scan else 0))

    def take(self, end: int) -> str:
        """What was not told yet, up to the place `end`."""
        untold = "".join(self._untold)
        count = max(0, end - self._num_told)
        taken, rest = untold[:count], untold[count:]
        self._untold = [rest] if rest else []
        self._num_told += len(taken)
        return taken

    def whole(self, end: int) -> str:
        self._parts = ["".join(self._parts)]
        return self._parts[0][:end]

    def _add(self, text: str) -> StopMatch | None:
        if not text:
            return None  # half a character, or a special token
        self._parts.append(text)
        self._untold.append(text)
        self.num_characters += len(text)
        return self._scan.push(text) if self._scan else None
