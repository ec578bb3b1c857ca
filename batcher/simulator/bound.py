"""An upper bound of what any policy can answer in time.

**Capacity.** A run of b rows occupies the engine for L(b) with any policy, and none of its rows is answered
in time if L(b) exceeds the deadline. So in the long run a second of the engine yields at most max over b of b
* P(L(b) <= deadline) / E[L(b)] answers in time (runs are renewals; no policy knows L(b) beforehand).

**Bound on a path.** Given times of arrival allow a tighter bound. Give each row that was answered in time an
equal part of its run: at least 1 / capacity seconds, between its arrival and its deadline, and parts do not
overlap. So these rows could be jobs of that length on one machine, each finished between its arrival and its
deadline. For equal jobs with deadlines in the order of arrival, first come first served that skips late jobs
finishes the most (exchange argument: sort the jobs of an optimal schedule by arrival, and swap the first that
differs). N nodes are at most one machine N times as fast. The bound is exact for constant run times, and
holds in the mean for others. It ignores that a batch starts only when its last row has arrived.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from cobatch.batcher.simulator.engine import Profile

_STEPS = 200


def capacity(profile: Profile, max_batch_size: int, deadline_s: float | None = None) -> tuple[float, int]:
    """Return the most rows per second that one engine can answer in time, and the batch size for that."""
    best, best_rows = 0.0, 1
    for rows in range(1, min(max_batch_size, profile.max_rows) + 1):
        rate = rows * _share_in_time(profile, rows, deadline_s) / profile.mean_s(rows)
        if rate > best:
            best, best_rows = rate, rows
    return best, best_rows


def _share_in_time(profile: Profile, rows: int, deadline_s: float | None) -> float:
    """Return the part of runs that take no longer than the deadline."""
    if deadline_s is None or profile.quantile_s(rows, 1.0) <= deadline_s:
        return 1.0
    levels = [(step + 0.5) / _STEPS for step in range(_STEPS)]
    return sum(profile.quantile_s(rows, level) <= deadline_s for level in levels) / _STEPS


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
