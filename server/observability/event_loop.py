"""How late the event loop is: what every request waits for that no queue shows.

A timer that is due every quarter of a second says by how much it was late. uvloop's timers are due on whole
milliseconds, so a lag of up to one means nothing.
"""

from __future__ import annotations

import asyncio
import threading
import time

from cobatch.batcher.durations import PENDING_LIMIT, DurationHistogram

_EVERY_S = 0.25


class LoopLag:
    """Of one loop, from `start` to `stop`. `lags` are the samples."""

    def __init__(self) -> None:
        self.lags = DurationHistogram()
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._cpu_clock: int | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Called on the loop's thread."""
        if hasattr(time, "pthread_getcpuclockid"):
            self._cpu_clock = time.pthread_getcpuclockid(threading.get_ident())
        self._arm(loop)

    def stop(self) -> None:
        """The loop is about to end, and its thread's clock with it."""
        if self._timer is not None:
            self._timer.cancel()
        self._cpu_clock = None

    @property
    def cpu_s(self) -> float | None:
        """Seconds of the processor that the loop's thread has used; None where the system does not say."""
        return None if self._cpu_clock is None else time.clock_gettime(self._cpu_clock)

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due_s = loop.time() + _EVERY_S
        self._timer = loop.call_at(self._due_s, self._tick, loop)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self.lags.values.append(max(0.0, loop.time() - self._due_s))
        if len(self.lags.values) >= PENDING_LIMIT:
            self.lags.count_in()
        self._arm(loop)
