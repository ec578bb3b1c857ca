"""An upper bound of what any policy can answer in time; docs/scheduling.md has the proof.

A run of b rows occupies the engine for L(b). So a second of it yields at most the maximum over b of b *
P(L(b) <= deadline) / E[L(b)] answers in time: the capacity. Given the times of arrival, no policy answers
more in time than one machine with equal jobs of 1 / capacity seconds that serves first come first and skips
late jobs.
"""

from bisect import bisect_right
from collections.abc import Iterable
from math import inf

from cobatch.batcher.simulator.engine import Profile

_LEVELS = [(step + 0.5) / 200 for step in range(200)]


def capacity(profile: Profile, max_batch_size: int, deadline_s: float | None = None) -> tuple[float, int]:
    """Return the most rows per second that one engine can answer in time, and the batch size for that."""
    limit_s = inf if deadline_s is None else deadline_s
    rates = {
        rows: rows * _share_in_time(profile, rows, limit_s) / profile.mean_s(rows)
        for rows in range(1, min(max_batch_size, profile.max_rows) + 1)
    }
    best_rows = max(rates, key=rates.__getitem__)
    return rates[best_rows], best_rows


def _share_in_time(profile: Profile, rows: int, limit_s: float) -> float:
    """Return the part of runs that take no longer than the limit."""
    return bisect_right(_LEVELS, limit_s, key=lambda level: profile.quantile_s(rows, level)) / len(_LEVELS)


def path_bound(
    times: Iterable[float], rate: float, deadline_s: float | None, begin_s: float, end_s: float
) -> int:
    """Count the one-row requests at these times that can be answered in time within [begin_s, end_s)."""
    each_s = 1 / rate
    limit_s = inf if deadline_s is None else deadline_s
    free_s, answered = 0.0, 0
    for time_s in times:
        if time_s >= end_s:
            break
        done_s = max(free_s, time_s) + each_s
        if done_s <= time_s + limit_s:
            free_s = done_s
            answered += begin_s <= done_s < end_s
    return answered
