"""The bugs that stopped other servers' batching loops, one test each."""

from __future__ import annotations

import asyncio
import logging

import pytest

from cobatch.batcher.errors import BatchFailedError, EngineGoneError, InputRejectedError
from cobatch.batcher.scheduling.scheduler import Scheduler
from cobatch.engines.errors import EngineRunError
from tests.support.virtual.loop import Call, FakeEngine, FakeWorker, calls, make_batcher, run

RUN_S = 0.010
EPSILON_S = 1e-6
# Before it is queued for certain, while it is, while it runs, as its batch ends, and afterwards.
MOMENTS_S = [0.0, RUN_S / 2, RUN_S - EPSILON_S, RUN_S, RUN_S + EPSILON_S, 1.5 * RUN_S, 2 * RUN_S, 1.0]


class Future(Call):
    """A caller whose answer is set on a future, as in those servers; its own task may have cancelled that."""

    __slots__ = ("future",)

    def __init__(self, values: list[list[int]]) -> None:
        super().__init__(values)
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(self) -> None:
        super().done()
        self.future.set_result(None)  # raises InvalidStateError if it was cancelled


@pytest.mark.parametrize("at_s", MOMENTS_S)
@pytest.mark.parametrize("tells", [True, False], ids=["cancels", "only goes"])
def test_ray_41057_a_cancelled_request_does_not_stop_the_batcher(
    at_s: float, tells: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """`set_result` on the future of a client that had gone ended the task that batched for all."""
    caplog.set_level(logging.CRITICAL)

    async def main() -> None:
        batcher = make_batcher(FakeWorker(FakeEngine(max_batch_size=4)))
        callers = [Future([[n]]) for n in range(11)]

        async def ask(caller: Future) -> None:
            batcher.submit(caller)
            try:
                await caller.future
            except asyncio.CancelledError:
                if tells:
                    batcher.cancel(caller)
                raise

        tasks = [asyncio.create_task(ask(caller)) for caller in callers]
        await asyncio.sleep(at_s)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(1)
        for caller in callers[1::2]:
            caller.check()
        assert batcher.queue.rows == batcher.running_batches == 0
        after = Future([[1]])
        await ask(after)
        after.check()

    run(main())


@pytest.mark.parametrize("at_s", MOMENTS_S)
def test_ray_50046_a_batch_of_cancelled_requests_does_not_hang(at_s: float) -> None:
    """It waited for the data of requests that had been cancelled, and all requests behind it with it."""

    async def main() -> None:
        batcher = make_batcher(FakeWorker(FakeEngine(max_batch_size=4, slots=1)))
        for _ in range(30):
            gone, after = calls(9), calls(2)
            for caller in gone:
                batcher.submit(caller)
            await asyncio.sleep(at_s)
            for caller in gone:
                batcher.cancel(caller)
            for caller in after:
                batcher.submit(caller)
            await asyncio.sleep(3 * RUN_S + EPSILON_S)
            for caller in after:
                caller.check()

    run(main())


def test_ray_42631_the_rest_behind_a_full_batch_does_not_wait() -> None:
    """Only an arrival woke the batcher, although more were queued than fitted the batch."""

    async def main() -> None:
        for slots in (1, 2, 3):
            batcher = make_batcher(FakeWorker(FakeEngine(max_batch_size=4, slots=slots)))
            callers = calls(4 * 5 + 1)
            for caller in callers:
                batcher.submit(caller)
            await asyncio.sleep(6 * RUN_S + EPSILON_S)
            for caller in callers:
                caller.check()

    run(main())


def test_ray_66140_one_bad_request_does_not_fail_the_others() -> None:
    """Here: one whose rows are fewer bytes than it says."""

    async def main() -> None:
        batcher = make_batcher(FakeWorker(FakeEngine()))
        callers = calls(8)
        callers[3].payloads = [b"short"]
        for caller in callers:
            batcher.submit(caller)
        await asyncio.sleep(1)
        for n, caller in enumerate(callers):
            if n == 3:
                assert isinstance(caller.answer, BatchFailedError)
            else:
                caller.check()
        (after,) = calls(1)
        batcher.submit(after)
        await asyncio.sleep(1)
        after.check()

    run(main())


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("slots", [1, 2])
def test_mlserver_1306_every_caller_gets_its_own_rows(same: bool, slots: int) -> None:
    """Three at once, also with the same values: each has as many rows in its answer as it asked for."""

    async def main() -> None:
        batcher = make_batcher(FakeWorker(FakeEngine(max_batch_size=40, slots=slots)))
        for rows in ((1, 1, 1), (1, 5, 2), (40, 1, 39), (41, 80, 3)):
            callers = [
                Call([[7 if same else 100 * n + row] for row in range(count)]) for n, count in enumerate(rows)
            ]
            for caller in callers:
                batcher.submit(caller)
            await asyncio.sleep(1)
            for caller in callers:
                caller.check()

    run(main())


@pytest.mark.parametrize("leaving", [0, 1, 2])
def test_mlserver_1306_a_cancelled_request_does_not_shift_rows(leaving: int) -> None:
    async def main() -> None:
        for at_s in MOMENTS_S:
            batcher = make_batcher(FakeWorker(FakeEngine(max_batch_size=8)))
            (first,) = calls(1)
            batcher.submit(first)
            callers = [Call([[100 * n + row] for row in range(n + 1)]) for n in range(3)]
            for caller in callers:
                batcher.submit(caller)
            await asyncio.sleep(at_s)
            batcher.cancel(callers[leaving])
            await asyncio.sleep(1)
            for n, caller in enumerate(callers):
                if n != leaving or caller.answers:
                    caller.check()

    run(main())


def test_litserve_340_one_bad_request_fails_alone() -> None:
    async def main() -> None:
        engine = FakeEngine()
        engine.fails = lambda rows: EngineRunError("bad") if -1 in rows else None
        batcher = make_batcher(FakeWorker(engine))
        callers = [Call([[-1 if n == 5 else n]]) for n in range(8)]
        for caller in callers:
            batcher.submit(caller)
        await asyncio.sleep(1)
        for n, caller in enumerate(callers):
            if n == 5:
                assert isinstance(caller.answer, InputRejectedError)
            else:
                caller.check()

    run(main())


def test_triton_7077_requests_of_disconnected_clients_do_not_run() -> None:
    async def main() -> None:
        worker = FakeWorker(FakeEngine(max_batch_size=4, slots=1))
        batcher = make_batcher(worker)
        callers = calls(100)
        for caller in callers:
            batcher.submit(caller)
        await asyncio.sleep(RUN_S / 2)
        for caller in callers[:-1]:
            batcher.cancel(caller)
        await asyncio.sleep(1)
        assert [rows for _, rows in worker.ran] == [4, 1]
        assert batcher.counters.cancelled == 99

    run(main())


def test_a_failing_scheduler_fails_the_model_and_nothing_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A wrong entry in the queue made every decision raise: all waited, and the health was good."""
    caplog.set_level(logging.CRITICAL + 1)

    def broken(*_: object, **__: object) -> None:
        raise KeyError("gone")

    async def main() -> None:
        batcher = make_batcher(FakeWorker(FakeEngine(max_batch_size=4)))
        first, *waiting = callers = calls(6)
        batcher.submit(first)
        await asyncio.sleep(RUN_S / 2)  # it runs
        monkeypatch.setattr(Scheduler, "next", broken)
        for caller in waiting:
            batcher.submit(caller)
        await asyncio.sleep(1)
        assert [len(caller.answers) for caller in callers] == [1] * 6
        assert first.error is None
        assert all(isinstance(caller.error, EngineGoneError) for caller in waiting)
        assert isinstance(batcher.refusal(), EngineGoneError)
        assert batcher.queue.rows == 0

    run(main())
