"""One turn: a server, or the model alone, measured for a few seconds; and several made into one."""

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
    """`who` is floor, cobatch or offline. Per request (offline: per run): microseconds of CPU, p50, p99.

    `per_s` is requests, or rows for offline, per second; `batch` the rows in the batch of a mean
    request. What was not measured is 0.
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
    """Load on a server, which must be idle or become so. With `trace`, a rate between two batches.

    `rotating` is a header's name and the values that the requests have in turn.
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
    """The model alone, in batches of `rows`."""
    speed = offline.measure(rows, seconds)
    return Turn("offline", speed.rows_per_s, speed.median_us, batch=rows)


def mean_turn(turns: Sequence[Turn]) -> Turn:
    """Turns of one kind and of one length as one."""
    return Turn(
        turns[0].who,
        fmean(turn.per_s for turn in turns),
        fmean(turn.p50_us for turn in turns),
        fmean(turn.p99_us for turn in turns),
        fmean(turn.cpu_us for turn in turns),
        fmean(turn.batch for turn in turns),
    )


def steady_rate(load: Load) -> float:
    """Answers per second from the middle of one gap between answers to the middle of a later one.

    Answers come in bursts, one per batch, up to a second apart where the model is slow: counting
    them over a fixed time would be wrong by up to a batch at either end. So the count runs between
    the longest gap of the first and of the last two fifths.
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
    """Wait while the process works off what a client that has left had sent it: until it takes no more than
    this share of a core."""
    give_up = time.monotonic() + _IDLE_TIMEOUT_S
    before = cpu_us(pid)
    while time.monotonic() < give_up:
        time.sleep(_IDLE_WINDOW_S)
        now = cpu_us(pid)
        if now - before < share * _IDLE_WINDOW_S * 1e6:
            return
        before = now
    raise WrkError(f"process {pid} is still busy {_IDLE_TIMEOUT_S:.0f} s after its clients left")
