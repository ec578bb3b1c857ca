"""An event loop in virtual time, with the methods that the batcher uses.

It is not asyncio's: that one polls its selector in each iteration, which costs more than the batcher itself.
"""

from collections import deque
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import Any


class Timer:
    """A callback with its arguments. A cancelled one stays in the heap until its time."""

    __slots__ = ("args", "callback")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self.callback: Callable[..., object] | None = callback
        self.args = args

    def cancel(self) -> None:
        """Do not call it."""
        self.callback = None
        self.args = ()


class VirtualLoop:
    """A loop that starts at 0 s and advances its time from event to event.

    Events of the same time run in this order: arrivals, then timers; callbacks of `call_soon` run after each.
    Callbacks take no time unless they call `spend`; events that fall due meanwhile run late. `due_s` is the
    time that the current event was due.
    """

    __slots__ = ("_numbers", "_ready", "_timers", "due_s", "now_s")

    def __init__(self) -> None:
        self.now_s = self.due_s = 0.0
        self._ready: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = count()

    def time(self) -> float:
        """Return the seconds since the start."""
        return self.now_s

    def call_soon(self, callback: Callable[..., object], *args: Any) -> None:
        """Call after the current callback has returned."""
        self._ready.append((callback, args))

    call_soon_threadsafe = call_soon  # the simulation has one thread

    def call_later(self, delay_s: float, callback: Callable[..., object], *args: Any) -> Timer:
        """Call after a delay."""
        return self.call_at(self.now_s + delay_s, callback, *args)

    def call_at(self, due_s: float, callback: Callable[..., object], *args: Any) -> Timer:
        """Call at a time, or at once if it has passed."""
        timer = Timer(callback, args)
        heappush(self._timers, (due_s, next(self._numbers), timer))
        return timer

    def spend(self, seconds: float) -> None:
        """Make the current callback take this long."""
        self.now_s += seconds

    def run(self, times: Iterator[float], arrive: Callable[[], object], end_s: float = inf) -> None:
        """Call `arrive` at each of the ascending times, and timers between them, until `end_s`."""
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
                # Arrivals that are due by now; those that fall due while these are handled wait.
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
