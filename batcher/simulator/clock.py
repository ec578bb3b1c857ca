"""An event loop whose time jumps from one event to the next: as much of a loop as the batcher needs.

Not asyncio's: that one asks its selector in each turn, which costs more than all that the batcher does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from math import inf
from typing import Any


class Timer:
    """A callback at a time."""

    __slots__ = ("args", "callback")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.callback: Callable[..., object] | None = callback
        self.args = args

    def cancel(self) -> None:
        """It is not called any more; its place in the heap stays until its time."""
        self.callback = None
        self.args = ()


class VirtualLoop:
    """Starts at 0 s. What happens at one time happens in the order: arrivals, then timers, and after
    each what it called for soon.

    Callbacks take no time unless they `spend` some; what is due meanwhile happens late. `due_s` is when what
    happens now should have.
    """

    __slots__ = ("_number", "_ready", "_timers", "due_s", "now_s")

    def __init__(self) -> None:
        self.now_s = self.due_s = 0.0
        self._ready: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._number = 0

    def time(self) -> float:
        """Seconds since the start."""
        return self.now_s

    def call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        """Once what runs now has returned."""
        self._ready.append((callback, args))

    call_soon_threadsafe = call_soon  # there are no threads here

    def call_later(self, delay_s: float, callback: Callable[..., object], *args: Any) -> Timer:
        """After so many seconds."""
        return self.call_at(self.now_s + delay_s, callback, *args)

    def call_at(self, due_s: float, callback: Callable[..., object], *args: Any) -> Timer:
        """At this time, or at once where it is over."""
        timer = Timer(callback, args)
        self._number += 1
        heappush(self._timers, (due_s, self._number, timer))
        return timer

    def spend(self, seconds: float) -> None:
        """What runs now takes so long."""
        self.now_s += seconds

    def run(self, times: Iterator[float], arrive: Callable[[], object], end_s: float = inf) -> None:
        """Call `arrive` at each of the times, which must not fall, and everything in between.

        Until nothing is left to happen, or until `end_s`.
        """
        ready, timers = self._ready, self._timers
        next_s = next(times, inf)
        while True:
            while ready:
                callback, args = ready.popleft()
                callback(*args)
            due_s = timers[0][0] if timers else inf
            if min(next_s, due_s) >= end_s or next_s == due_s == inf:
                self.now_s = max(self.now_s, end_s) if end_s < inf else self.now_s
                return
            if next_s <= due_s:
                # Those that are due by now; who comes while they are seen to waits for his turn.
                self.now_s = now_s = max(self.now_s, next_s)
                while next_s <= now_s:
                    self.due_s = next_s
                    arrive()
                    next_s = next(times, inf)
                continue
            timer = heappop(timers)[2]
            if timer.callback is not None:
                self.now_s = max(self.now_s, due_s)
                self.due_s = due_s
                timer.callback(*timer.args)
