"""Prometheus' kinds of numbers, kept as plain ones: to observe is to add, and text is made when it is asked for."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric


@dataclass
class Histogram:
    """`prometheus_client` has one, too, but takes one value at a time: a step observes hundreds that are equal."""

    bounds: tuple[float, ...]  # upper ones, ascending; there is one more bucket, without
    counts: list[int] = field(init=False)  # [len(bounds) + 1], of each bucket alone
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, how many lie below it), as Prometheus writes them."""
        below, buckets = 0, []
        for bound, count in zip((*map(repr, self.bounds), "+Inf"), self.counts, strict=True):
            below += count
            buckets.append((bound, float(below)))
        return buckets


class Families:
    """Metric families that all have the same first label."""

    def __init__(self, label: str, value: str) -> None:
        self._label, self._value = label, value
        self._families: list[Metric] = []

    def __iter__(self) -> Iterator[Metric]:
        return iter(self._families)

    def gauge(self, name: str, text: str, value: float) -> None:
        self._add_all(GaugeMetricFamily(name, text, labels=[self._label]), [((), value)])

    def counter(self, name: str, text: str, value: float) -> None:
        """name: without the `_total` that it gets."""
        self._add_all(CounterMetricFamily(name, text, labels=[self._label]), [((), value)])

    def gauges(self, name: str, text: str, label: str, values: Sequence[tuple[str, float]]) -> None:
        """values: (of the second label, value)."""
        self._add_all(GaugeMetricFamily(name, text, labels=[self._label, label]), [((of,), v) for of, v in values])

    def counters(self, name: str, text: str, label: str, values: Sequence[tuple[str, float]]) -> None:
        self._add_all(CounterMetricFamily(name, text, labels=[self._label, label]), [((of,), v) for of, v in values])

    def histogram(self, name: str, text: str, histogram: Histogram) -> None:
        family = HistogramMetricFamily(name, text, labels=[self._label])
        family.add_metric([self._value], histogram.buckets(), histogram.total)
        self._families.append(family)

    def _add_all(
        self, family: GaugeMetricFamily | CounterMetricFamily, values: Sequence[tuple[tuple[str, ...], float]]
    ) -> None:
        """values: (of the labels beside the first, value)."""
        for labels, value in values:
            family.add_metric([self._value, *labels], value)
        self._families.append(family)
