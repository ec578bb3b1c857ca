"""The most that any policy could answer in time: an upper bound, with its reasons.

**Capacity.** A run of b rows holds the engine for L(b), whatever the policy, and none of its rows is answered
in time if L(b) is longer than the deadline. So in the long run a second of the engine yields at most
max over b of b * P(L(b) <= deadline) / E[L(b)] answers in time (each run is a renewal; no policy knows
L(b) beforehand).

**A path.** For given times of arrival there is more to say. Give each row that was answered in time an
equal part of its run: at least 1 / capacity seconds, within the time from its arrival to its deadline, and
parts do not overlap. So these rows could all be jobs of that length on one machine, each finished between
its arrival and its deadline. Of equal jobs whose deadlines come in the order of their arrivals, first come
first served, leaving out each that would be late, finishes as many as can be (exchange argument: in an
optimal schedule put jobs in order of arrival, and swap the first that differs). N nodes are at most one
machine N times as fast. Exact for runs that always take the same time, in the mean for others. What it
does not count: a batch starts only when its last row is there.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from cobatch.batcher.simulator.profile import Profile

_STEPS = 200


def capacity(profile: Profile, max_batch_size: int, deadline_s: float | None = None) -> tuple[float, int]:
    """Rows per second of one engine that can be in time at all, and the batch size for that."""
    best, best_rows = 0.0, 1
    for rows in range(1, min(max_batch_size, profile.max_rows) + 1):
        rate = rows * _in_time(profile, rows, deadline_s) / profile.mean_s(rows)
        if rate > best:
            best, best_rows = rate, rows
    return best, best_rows


def _in_time(profile: Profile, rows: int, deadline_s: float | None) -> float:
    """The part of runs that take no longer than the deadline."""
    if deadline_s is None or profile.quantile_s(rows, 1.0) <= deadline_s:
        return 1.0
    levels = [(step + 0.5) / _STEPS for step in range(_STEPS)]
    return sum(profile.quantile_s(rows, level) <= deadline_s for level in levels) / _STEPS


def path_bound(
    times: Iterable[float], rate: float, deadline_s: float | None, begin_s: float, end_s: float
) -> int:
    """How many of the one-row requests that come at these times can be answered in time, in this stretch."""
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
