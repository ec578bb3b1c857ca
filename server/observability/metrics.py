"""Metrics in the form of Prometheus' client, from the table of families and the counters."""

from collections.abc import Iterable, Mapping

import numpy as np
from prometheus_client.core import HistogramMetricFamily, Metric

from cobatch.batcher.durations import EDGES_S, DurationHistogram
from cobatch.server.observability.metric_families import TIME_BOUNDS, Family

# Rows of a table: the values of the labels, and the metric's value.
Rows = Iterable[tuple[tuple[object, ...], float]]
# Of a histogram: labels, upper bounds with the number of values up to each, all values and their sum.
Series = tuple[tuple[str, ...], Iterable[tuple[float, float]], float, float]

_SUFFIXES = {"counter": "_total", "gauge": "", "info": "_info"}
# Index of the first bucket above each bound.
_ABOVE = np.searchsorted(EDGES_S, TIME_BOUNDS) + 1


def metric(family: Family, rows: Rows) -> Metric:
    """Return a counter, a gauge or an info."""
    made = Metric(family.name, family.help, family.kind)
    for values, value in rows:
        labels = dict(zip(family.labels, map(str, values), strict=True))
        made.add_sample(family.name + _SUFFIXES[family.kind], labels, float(value))
    return made


def times_metric(family: Family, rows: Iterable[tuple[tuple[str, ...], DurationHistogram]]) -> Metric:
    """Return a histogram of seconds."""

    def series(labels: tuple[str, ...], durations: DurationHistogram) -> Series:
        counts, sum_s = durations.read()
        upto = np.cumsum(counts)
        return labels, zip(TIME_BOUNDS, upto[_ABOVE - 1], strict=True), upto[-1], sum_s

    return histogram_metric(family, [series(*row) for row in rows])


def histogram_metric(family: Family, series: Iterable[Series]) -> Metric:
    """Return a histogram."""
    made = HistogramMetricFamily(family.name, family.help, labels=family.labels)
    for labels, buckets, count, total in series:
        texts = [(str(float(bound)), float(upto)) for bound, upto in buckets]
        made.add_metric(labels, [*texts, ("+Inf", float(count))], float(total))
    return made


def sizes_metric(family: Family, batches: Iterable[tuple[str, int, Mapping[int, int]]]) -> Metric:
    """Return a histogram of the sizes of batches, from the name, the largest size and the counts by size."""
    series: list[Series] = []
    for name, most, counts in batches:
        bounds = [*(1 << power for power in range((most - 1).bit_length())), most]
        buckets = [(float(bound), sum(n for size, n in counts.items() if size <= bound)) for bound in bounds]
        total = sum(size * n for size, n in counts.items())
        series.append(((name,), buckets, sum(counts.values()), total))
    return histogram_metric(family, series)
