"""Where a step's time went: spans on one track per worker, for a trace viewer and for shares in percent.

    S-worker     S-block │ stage │ send │ S-block │ … │ wait │ receive │ S-block │ …      of the thread that drives it
    its device  S-block │         S-block │ …                 where it works by itself; then the thread has `launch`
    R-worker 0             attention │       attention │ …                                as the R-worker timed itself
    S-worker     forward │ sample │ commit │ …                while no R-worker has anything to do: all layers of a step

`wait` ends when the R-worker has ended its attention; what remains until o is there is `receive`.  Spans of a track do
not overlap.  They lie in a ring of fixed size, so a long run keeps its end.
"""

from __future__ import annotations

import bisect
import json
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from fastdecode.errors import ConfigError

S_WORKER = "S-worker"
S_DEVICE = "S-worker's device"
CAPACITY = 1 << 18  # spans; about 100 bytes each


class Span(NamedTuple):
    track: str
    name: str
    begin_ns: int  # of the monotonic clock
    end_ns: int
    micro_batch: int  # -1: none
    layer: int  # -1: none


class Count(NamedTuple):
    name: str
    time_ns: int
    value: int


class Timeline:
    def __init__(self, capacity: int = CAPACITY) -> None:
        self.spans: deque[Span] = deque(maxlen=capacity)
        self.counts: deque[Count] = deque(maxlen=capacity)

    @contextmanager
    def span(self, name: str, micro_batch: int = -1, layer: int = -1) -> Iterator[None]:
        """What the S-worker's thread does meanwhile.  Kept however it ends."""
        begin = time.monotonic_ns()
        try:
            yield
        finally:
            self.spans.append(Span(S_WORKER, name, begin, time.monotonic_ns(), micro_batch, layer))

    def add(self, track: str, name: str, begin_ns: int, end_ns: int, micro_batch: int = -1, layer: int = -1) -> None:
        self.spans.append(Span(track, name, begin_ns, end_ns, micro_batch, layer))

    def count(self, name: str, value: int) -> None:
        self.counts.append(Count(name, time.monotonic_ns(), value))

    def shares(self, track: str = S_WORKER) -> dict[str, float]:
        """Of the time between the track's first and last span, how much each kind of span took; they add up to 1.

        Of an S-worker whose device works by itself: the device's S-blocks, and what the thread did while it was idle.
        """
        spans = [span for span in self.spans if span.track == track]
        if not spans:
            return {}
        begin, end = spans[0].begin_ns, spans[-1].end_ns
        busy = [(max(s.begin_ns, begin), min(s.end_ns, end)) for s in self.spans if s.track == S_DEVICE != track]
        busy = sorted(span for span in busy if span[0] < span[1]) if track == S_WORKER else []
        ends = [end for _, end in busy]
        taken: Counter[str] = Counter()
        if busy:
            taken["S-block"] = sum(end - begin for begin, end in busy)
        for span in spans:
            taken[span.name] += span.end_ns - span.begin_ns
            for busy_begin, busy_end in busy[bisect.bisect_right(ends, span.begin_ns) :]:
                if busy_begin >= span.end_ns:
                    break
                taken[span.name] -= min(busy_end, span.end_ns) - max(busy_begin, span.begin_ns)
        whole = end - begin
        taken["other"] = whole - sum(taken.values())
        return {name: nanoseconds / max(1, whole) for name, nanoseconds in taken.most_common()}

    def write(self, path: str | Path) -> None:
        """As Chrome's trace events, which Perfetto (ui.perfetto.dev) and chrome://tracing show.  Raises ConfigError."""
        tracks = {track: number for number, track in enumerate(dict.fromkeys(span.track for span in self.spans))}
        events: list[dict[str, object]] = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": track}}
            for track, number in tracks.items()
        ]
        for span in self.spans:
            known = {"micro_batch": span.micro_batch, "layer": span.layer}
            events.append(
                {
                    "ph": "X",
                    "name": span.name,
                    "pid": 0,
                    "tid": tracks[span.track],
                    "ts": span.begin_ns / 1e3,  # microseconds
                    "dur": (span.end_ns - span.begin_ns) / 1e3,
                    "args": {name: value for name, value in known.items() if value >= 0},
                }
            )
        for count in self.counts:
            fields = {"ph": "C", "name": count.name, "pid": 0, "ts": count.time_ns / 1e3}
            events.append(fields | {"args": {count.name: count.value}})
        try:
            Path(path).write_text(json.dumps({"traceEvents": events}), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write the trace: {error}") from error


class NoTimeline(Timeline):
    """Keeps nothing and costs next to nothing."""

    def __init__(self) -> None:
        super().__init__(capacity=0)
        self._nothing = _Nothing()

    def span(self, name: str, micro_batch: int = -1, layer: int = -1) -> _Nothing:  # type: ignore[override]
        return self._nothing

    def add(self, track: str, name: str, begin_ns: int, end_ns: int, micro_batch: int = -1, layer: int = -1) -> None:
        pass

    def count(self, name: str, value: int) -> None:
        pass


class _Nothing:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass
