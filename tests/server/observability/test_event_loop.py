"""The event loop's lag, on a loop whose time the test moves."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from cobatch.server.observability.event_loop import LoopLag


class Loop:
    """Timers, and a clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.timers: list[tuple[float, Any, tuple[Any, ...]]] = []

    def time(self) -> float:
        return self.now_s

    def call_at(self, when_s: float, callback: Any, *arguments: Any) -> asyncio.TimerHandle:
        entry = (when_s, callback, arguments)
        self.timers.append(entry)
        handle: Any = type("Handle", (), {"cancel": lambda _: self.timers.remove(entry)})()
        return cast("asyncio.TimerHandle", handle)

    def pass_(self, late_s: float) -> None:
        """Call the next timer, this late."""
        ((when_s, callback, arguments),) = self.timers
        self.timers.clear()
        self.now_s = when_s + late_s
        callback(*arguments)


def test_each_timer_says_how_late_it_was() -> None:
    loop, lag = Loop(), LoopLag()
    lag.start(cast("asyncio.AbstractEventLoop", loop))
    for late_s in (0.0, 0.5, -0.0001):
        loop.pass_(late_s)
    assert lag.lags.count == 3
    # A timer that is a little early, as uvloop's may be, is not late.
    assert lag.lags.sum_s == pytest.approx(0.5)
    lag.stop()
    assert not loop.timers


async def test_the_loops_thread_uses_the_processor() -> None:
    lag = LoopLag()
    assert lag.cpu_s is None
    lag.start(asyncio.get_running_loop())
    before_s = lag.cpu_s
    assert before_s is not None
    sum(range(200_000))
    after_s = await asyncio.to_thread(lambda: lag.cpu_s)
    assert after_s is not None
    assert after_s > before_s
    lag.stop()
    assert lag.cpu_s is None
