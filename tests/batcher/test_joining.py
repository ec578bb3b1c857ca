"""Long answers of requests that were cut: put together in a thread, while the loop goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import AbandonedError, BatchFailedError, ExpiredError
from tests.support.virtual.loop import Call, FakeEngine, FakeWorker, make_batcher, run

WIDTH = 100_000  # three rows of it are more than the loop joins


class HeldExecutor(ThreadPoolExecutor):
    """Runs the work that it was given when `go` is called."""

    def __init__(self) -> None:
        super().__init__(1)
        self.held: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, work: Any, /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.held.append((future, work))
        return future

    def go(self) -> None:
        for future, work in self.held:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except Exception as error:  # noqa: BLE001 - as an executor does
                    future.set_exception(error)
        self.held.clear()


async def joining(timeout_s: float | None = None) -> tuple[Batcher, Call, HeldExecutor]:
    """Return a batcher, a request of it whose parts have run, and the executor that holds their joining."""
    executor = HeldExecutor()
    asyncio.get_running_loop().set_default_executor(executor)
    batcher = make_batcher(FakeWorker(FakeEngine(max_batch_size=2)))
    large = Call([[n] * WIDTH for n in range(3)])
    large.timeout_s = timeout_s
    batcher.submit(large)
    await asyncio.sleep(0.1)
    assert batcher.running_batches == 0
    assert not large.answers
    assert len(executor.held) == 1
    return batcher, large, executor


def test_the_loop_answers_others_meanwhile() -> None:
    async def main() -> None:
        batcher, large, executor = await joining()
        small = Call([[1, 2]])
        batcher.submit(small)
        await asyncio.sleep(1)
        small.check()
        executor.go()
        await asyncio.sleep(1)
        large.check()

    run(main())


def test_a_caller_that_left_gets_nothing() -> None:
    async def main() -> None:
        batcher, large, executor = await joining()
        batcher.cancel(large)
        executor.go()
        await asyncio.sleep(1)
        assert not large.answers
        assert batcher.open_requests() == ({}, 0)

    run(main())


def test_its_timeout_ends_it() -> None:
    async def main() -> None:
        batcher, large, executor = await joining(timeout_s=0.5)
        batcher.end_late(large)
        assert isinstance(large.answer, ExpiredError)
        executor.go()
        await asyncio.sleep(1)
        assert len(large.answers) == 1

    run(main())


def test_draining_waits_for_it() -> None:
    async def main() -> None:
        batcher, large, executor = await joining()
        assert batcher.open_requests() == ({}, 1)
        drained = asyncio.create_task(batcher.drain(5))
        await asyncio.sleep(1)
        assert not drained.done()
        executor.go()
        assert await drained
        large.check()

    run(main())


def test_draining_abandons_it_at_its_end() -> None:
    async def main() -> None:
        batcher, large, executor = await joining()
        assert not await batcher.drain(5)
        assert isinstance(large.answer, AbandonedError)
        executor.go()
        await asyncio.sleep(1)
        assert len(large.answers) == 1

    run(main())


def test_parts_that_cannot_be_joined_fail_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        _, large, executor = await joining()
        executor.go()
        await asyncio.sleep(1)
        assert isinstance(large.answer, BatchFailedError)

    def fails(outputs: tuple[np.ndarray[Any, Any], ...]) -> np.ndarray[Any, Any]:
        raise MemoryError

    monkeypatch.setattr("cobatch.batcher.rows.splitting.np.concatenate", fails)
    run(main())
