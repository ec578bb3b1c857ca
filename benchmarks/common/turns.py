"""Turns: a server, or the model alone, measured for a few seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from benchmarks.common import wire
from benchmarks.common.offline import Offline
from benchmarks.common.processes import Server
from benchmarks.common.procstat import cpu_us
from benchmarks.common.wrk import Load, WrkError, run_wrk

_IDLE_WINDOW_S = 0.05
_IDLE_SHARE = 0.04
_IDLE_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Turn:
    """The figures of `who` (floor, cobatch or offline). Times are microseconds per request; offline: per run.

    `per_s` is requests per second; offline: rows. `batch` is the mean batch size of a request. Figures that
    were not measured are 0.
    """

    who: str
    per_s: float
    p50_us: float
    p99_us: float = 0.0
    cpu_us: float = 0.0
    batch: float = 0.0


def serve_turn(
    who: str,
    server: Server,
    path: str,
    request: wire.Message,
    connections: int,
    seconds: int,
    trace: bool,
    rotating: tuple[str, Sequence[str]] | None = None,
) -> Turn:
    """Measure a server under load, once it is idle. With `trace`, its rate is that between two batches.

    `rotating` is the name of a header, and its values in turn.
    """
    wait_until_idle(server.pid)
    before = cpu_us(server.pid)
    url = f"http://{server.address}{path}"
    load = run_wrk(url, request.body, request.headers, connections, seconds, trace, rotating)
    used = cpu_us(server.pid) - before
    return Turn(
        who,
        steady_rate(load) if trace else load.requests / load.duration_us * 1e6,
        load.p50_us,
        load.p99_us,
        used / load.requests,
        fmean(load.batches) if load.batches else 0.0,
    )


def offline_turn(offline: Offline, rows: int, seconds: float) -> Turn:
    """Measure the model alone, in batches of `rows`."""
    speed = offline.measure(rows, seconds)
    return Turn("offline", speed.rows_per_s, speed.median_us, batch=rows)


def mean_turn(turns: Sequence[Turn]) -> Turn:
    """Return the mean of turns of the same kind and length."""
    return Turn(
        turns[0].who,
        fmean(turn.per_s for turn in turns),
        fmean(turn.p50_us for turn in turns),
        fmean(turn.p99_us for turn in turns),
        fmean(turn.cpu_us for turn in turns),
        fmean(turn.batch for turn in turns),
    )


def steady_rate(load: Load) -> float:
    """Return answers per second, from the middle of a gap between answers to the middle of a later one.

    Answers come in bursts, one for each batch, up to a second apart for a slow model: a count over a fixed
    time would be off by up to a batch at either end. So it runs from the longest gap in the first two fifths
    to the longest in the last two.
    """
    times = load.times
    span = times[-1] - times[0]
    if span < load.duration_us / 2:
        raise WrkError(f"all {len(times)} answers came within {span / 1e6:.1f} s: measure longer")
    gaps = [(after - at, index) for index, (at, after) in enumerate(pairwise(times))]
    first = max(gap for gap in gaps if times[gap[1]] <= times[0] + 0.4 * span)[1]
    last = max(gap for gap in gaps if times[gap[1] + 1] >= times[0] + 0.6 * span)[1]
    middle = [(times[index] + times[index + 1]) / 2 for index in (first, last)]
    return (last - first) / (middle[1] - middle[0]) * 1e6


def wait_until_idle(pid: int, share: float = _IDLE_SHARE) -> None:
    """Wait until the process uses less than this share of a core: requests of a client that left may run."""
    give_up = time.monotonic() + _IDLE_TIMEOUT_S
    before = cpu_us(pid)
    while time.monotonic() < give_up:
        time.sleep(_IDLE_WINDOW_S)
        now = cpu_us(pid)
        if now - before < share * _IDLE_WINDOW_S * 1e6:
            return
        before = now
    raise WrkError(f"process {pid} is still busy {_IDLE_TIMEOUT_S:.0f} s after its clients left")
