"""Batching libraries on PyPI, each as a coroutine function on single items, with the same function on lists.

All run the function in a thread, in batches of at most `BATCH`, and are set to wait as little as they can.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.metadata
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from cobatch import batched

BATCH = 64

Call = Callable[[str], Awaitable[int]]


def work(texts: list[str]) -> list[int]:
    """Return the lengths of texts: next to no work."""
    return [len(text) for text in texts]


@contextlib.asynccontextmanager
async def cobatch() -> AsyncIterator[Call]:
    yield batched(max_batch_size=BATCH)(work)


@contextlib.asynccontextmanager
async def by_hand() -> AsyncIterator[Call]:
    """The least that a batcher does: a list of futures, and one thread for the function."""
    loop = asyncio.get_running_loop()
    waiting: list[tuple[str, asyncio.Future[int]]] = []
    running: list[asyncio.Future[None]] = []

    async def run() -> None:
        while waiting:
            batch = waiting[:BATCH]
            del waiting[:BATCH]
            results = await loop.run_in_executor(None, work, [text for text, _ in batch])
            for (_, future), result in zip(batch, results, strict=True):
                future.set_result(result)
        running.clear()

    async def call(text: str) -> int:
        future: asyncio.Future[int] = loop.create_future()
        waiting.append((text, future))
        if not running:
            running.append(asyncio.ensure_future(run()))
        return await future

    yield call


@contextlib.asynccontextmanager
async def batched_library() -> AsyncIterator[Call]:
    aio = importlib.import_module("batched").aio
    yield aio.dynamically(work, batch_size=BATCH, timeout_ms=1.0)


@contextlib.asynccontextmanager
async def async_batcher() -> AsyncIterator[Call]:
    module = importlib.import_module("async_batcher.batcher")
    options: dict[str, Any] = {"max_batch_size": BATCH, "max_queue_time": 0.001}
    made = type("Lengths", (module.AsyncBatcher,), {"process_batch": lambda _, batch: work(batch)})(**options)
    yield made.process
    await made.stop()


@contextlib.asynccontextmanager
async def batchlet() -> AsyncIterator[Call]:
    module = importlib.import_module("batchlet.core")
    policy = importlib.import_module("batchlet").BatchPolicy(max_items=BATCH)
    batcher = module.AsyncBatcher(module.threaded(work), policy=policy, max_wait_ms=0)
    async with batcher:
        yield batcher.submit


@contextlib.asynccontextmanager
async def aioautobatch() -> AsyncIterator[Call]:
    module = importlib.import_module("aioautobatch")

    async def lengths(arguments: list[tuple[str]]) -> list[int]:
        return await asyncio.to_thread(work, [text for (text,) in arguments])

    queue = module.autobatch(lengths, batch_size=BATCH, max_delay=0.001, max_concurrent_batches=1)

    async def call(text: str) -> int:
        result: int = await (await queue(text))
        return result

    yield call


@contextlib.asynccontextmanager
async def aiodataloader() -> AsyncIterator[Call]:
    module = importlib.import_module("aiodataloader")

    async def lengths(texts: list[str]) -> list[int]:
        return await asyncio.to_thread(work, texts)

    yield module.DataLoader(lengths, max_batch_size=BATCH, cache=False).load


@dataclass(frozen=True)
class Library:
    """A library: its name on PyPI, and its `call`s, which end with the context."""

    name: str
    calls: Callable[[], AbstractAsyncContextManager[Call]]

    @property
    def version(self) -> str | None:
        """The installed version, None if there is none."""
        try:
            return importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return None


OURS = Library("cobatch", cobatch)
PEERS = (
    Library("batched", batched_library),
    Library("async-batcher", async_batcher),
    Library("batchlet", batchlet),
    Library("aioautobatch", aioautobatch),
    Library("aiodataloader", aiodataloader),
)
BY_HAND = Library("by hand", by_hand)
