"""The order and times of requests, and a timer that keeps them to the microsecond."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice, takewhile

import numpy as np

from cobatch.batcher.simulator.traffic import Trace
from cobatch.server.loadtest.messages import Plan, PreparedRequest, Trial

_CHUNK = 4096
_CLOCK_MONOTONIC = 1  # the clock of time.monotonic
_ABSOLUTE_TIME = 1
_TIMER_FLAGS = os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)

Due = tuple[float, PreparedRequest]


def schedule(plan: Plan, trial: Trial, number: int, processes: int) -> Iterator[Due]:
    """Yield (seconds from the start, request) for generator process `number` of `processes`.

    Requests are dealt to the processes in rotation, so that together they send the same load as one would.
    """
    arrivals = trial.arrivals
    assert arrivals is not None
    times = arrivals.times(np.random.default_rng([plan.seed, trial.seed, 0]))
    load = zip(times, choices(plan, trial), strict=False)
    return takewhile(lambda due: due[0] < trial.lasts_s, islice(load, number, None, processes))


def choices(plan: Plan, trial: Trial, number: int = 0) -> Iterator[PreparedRequest]:
    """Yield requests: callers in proportion to their shares, each caller's examples in rotation."""
    rotations = {key: cycle(_rotated(requests, number)) for key, requests in plan.requests.items()}
    if isinstance(trial.arrivals, Trace):
        callers = {name: caller for caller, name in enumerate(plan.names)}
        for recorded in trial.arrivals.requests:
            yield next(rotations[callers[recorded.tenant] if recorded.tenant else 0, recorded.rows])
        return
    by_caller = [rotations[caller, rows] for caller, rows in enumerate(plan.rows)]
    if len(by_caller) == 1:
        yield from by_caller[0]
    shares = np.cumsum(plan.shares)
    rng = np.random.default_rng([plan.seed, trial.seed, 1, number])
    while True:
        drawn = np.searchsorted(shares, rng.random(_CHUNK) * shares[-1], side="right")
        for caller in drawn.tolist():
            yield next(by_caller[caller])


def _rotated(requests: Sequence[PreparedRequest], number: int) -> list[PreparedRequest]:
    at = number % len(requests)
    return [*requests[at:], *requests[:at]]


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


class _Itimerspec(ctypes.Structure):
    _fields_ = (("it_interval", _Timespec), ("it_value", _Timespec))


class Timer:
    """Calls `callback` once for each `set`, at its time or right after.

    uvloop rounds its timers to milliseconds, too coarse for answers within 0.1 ms. Linux has timers that are
    file descriptors (timerfd); elsewhere the loop's timers are used, and the report shows the send delay.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._handle: asyncio.TimerHandle | None = None
        self._file = -1
        if sys.platform == "linux":
            self._libc = ctypes.CDLL(None, use_errno=True)
            self._file = self._libc.timerfd_create(_CLOCK_MONOTONIC, _TIMER_FLAGS)
        if self._file >= 0:
            self._spec = _Itimerspec()
            self._pointer = ctypes.byref(self._spec)
            loop.add_reader(self._file, self._on_expired)

    def set(self, at_s: float) -> None:
        """Replace the time to call back: a time of `time.monotonic`; at once if it has passed."""
        if self._file < 0:
            if self._handle is not None:
                self._handle.cancel()
            self._handle = self._loop.call_at(at_s, self._callback)
            return
        seconds = int(at_s)
        value = self._spec.it_value
        value.tv_sec = seconds
        value.tv_nsec = int((at_s - seconds) * 1e9)
        self._libc.timerfd_settime(self._file, _ABSOLUTE_TIME, self._pointer, None)

    def _on_expired(self) -> None:
        try:
            os.read(self._file, 8)
        except BlockingIOError:  # set again after the loop saw it expire
            return
        self._callback()

    def close(self) -> None:
        """Cancel the timer and free its file descriptor."""
        if self._handle is not None:
            self._handle.cancel()
        if self._file >= 0:
            self._loop.remove_reader(self._file)
            os.close(self._file)
            self._file = -1
