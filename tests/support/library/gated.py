"""A function on lists whose runs wait for a gate."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from cobatch import Statistics

WAIT_S = 60.0


class Gated:
    """Call it as the function: it returns twice each item once `gate` is set. `batches` are its arguments, in
    the order in which they began; `fails` raises for a bad item."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.gate = threading.Event()
        self.began = threading.Event()
        self.batches: list[list[int]] = []
        self.fails: Callable[[int], None] = lambda item: None
        if is_open:
            self.gate.set()

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(list(items))
        self.began.set()
        if not self.gate.wait(WAIT_S):
            raise AssertionError("the gate has not opened")
        for item in items:
            self.fails(item)
        return [item * 2 for item in items]


async def blocked(function: Gated, call: Callable[[int], Awaitable[Any]], item: int) -> asyncio.Task[Any]:
    """Call with an item that nothing else is in a batch with, and return when its run waits at the gate."""

    async def wait() -> Any:
        return await call(item)

    task = asyncio.ensure_future(wait())
    await asyncio.to_thread(function.began.wait, WAIT_S)
    return task


async def until(condition: Callable[[], bool]) -> None:
    """Let other tasks run until it is true."""
    while not condition():  # noqa: ASYNC110 - no event to wait for
        await asyncio.sleep(0)


async def queued(statistics: Callable[[], Statistics], count: int) -> None:
    """Return once this many calls are queued."""
    await until(lambda: statistics().queued == count)
