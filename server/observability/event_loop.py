"""The event loop's lag, which delays every request and is in no queue, and its thread's CPU time.

A timer due four times a second measures how late it is. uvloop's timers are due on whole milliseconds, so a
lag of up to one means nothing.
"""

import asyncio
import threading
import time

from cobatch.batcher.durations import PENDING_LIMIT, DurationHistogram

_INTERVAL_S = 0.25


class LoopLag:
    """Measures one loop from `start` to `stop`. `lags` are the samples."""

    def __init__(self) -> None:
        self.lags = DurationHistogram()
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._cpu_clock: int | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin, on the loop's thread."""
        if hasattr(time, "pthread_getcpuclockid"):
            self._cpu_clock = time.pthread_getcpuclockid(threading.get_ident())
        self._arm(loop)

    def stop(self) -> None:
        """End, before the loop and its thread's clock do."""
        if self._timer is not None:
            self._timer.cancel()
        self._cpu_clock = None

    @property
    def cpu_s(self) -> float | None:
        """CPU seconds of the loop's thread; None if the system cannot tell."""
        return None if self._cpu_clock is None else time.clock_gettime(self._cpu_clock)

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due_s = loop.time() + _INTERVAL_S
        self._timer = loop.call_at(self._due_s, self._tick, loop)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self.lags.values.append(max(0.0, loop.time() - self._due_s))
        if len(self.lags.values) >= PENDING_LIMIT:
            self.lags.count_in()
        self._arm(loop)
