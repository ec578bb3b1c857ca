"""Closed-loop clients share a batch if that pays; no request waits for others."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from statistics import fmean

import pytest

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.request import Batch, Request
from cobatch.batcher.scheduling.arrivals import ClosedLoopEstimator
from cobatch.batcher.scheduling.policy import DEADLINE, DELAY, IDLE
from cobatch.batcher.scheduling.run_times import RunTimeModel
from cobatch.batcher.scheduling.tuning import LEAD_S
from tests.support.virtual.loop import Call, FakeEngine, FakeWorker, make_batcher, run

CALLERS = 16


def steep(rows: int) -> float:
    """Hardly dearer with more rows: both groups together are worth waiting for."""
    return 0.010 + 0.0002 * rows


def linear(rows: int) -> float:
    """Nothing is gained by larger batches."""
    return 0.002 * rows


def quick(rows: int) -> float:
    """Over before a caller could be back."""
    return 0.0015


class Again(Call):
    """A caller that asks again `back_s` after its answer, `left` times, and whose deadline may be near."""

    __slots__ = ("ask", "left")

    def __init__(self, left: int, ask: Callable[[int], None]) -> None:
        super().__init__([[1]])
        self.left = left
        self.ask = ask

    def done(self) -> None:
        super().done()
        self.check()
        if self.left:
            self.ask(self.left - 1)


def warmed_up(run_s: Callable[[int], float]) -> FakeWorker:
    """Takes batches of up to 64 rows, and knows their times from its warm-up."""
    worker = FakeWorker(FakeEngine(max_batch_size=64), run_s)
    worker.warmup_us = {1 << power: run_s(1 << power) * 1e6 for power in range(7)}
    return worker


def ask_again_and_again(
    batcher: Batcher,
    times: Callable[[int], int],
    back_s: Callable[[int], float],
    timeout_s: float | None = None,
) -> None:
    """Start callers that ask again, caller n `times(n)` times, each time `back_s(left)` seconds after its
    last answer, where `left` requests are left."""
    loop = asyncio.get_running_loop()

    def submit(left: int) -> None:
        caller = Again(left, lambda less: void(loop.call_later(back_s(left), submit, less)))
        caller.timeout_s = timeout_s
        batcher.submit(caller)

    for number in range(CALLERS):
        loop.call_later(0.0001 * number, submit, times(number))


def void(_: object) -> None:
    """Nothing."""


def sizes(
    run_s: Callable[[int], float],
    back_s: float,
    *,
    times: int = 60,
    timeout_s: float | None = None,
    reasons: dict[str, int] | None = None,
) -> list[int]:
    """The sizes of the batches in which closed-loop clients are answered."""
    worker = warmed_up(run_s)

    async def main() -> None:
        batcher = make_batcher(worker)
        ask_again_and_again(batcher, lambda number: times, lambda left: back_s, timeout_s)
        await asyncio.sleep(times)
        assert batcher.queue.rows == batcher.running_batches == 0
        if reasons is not None:
            reasons.update(batcher.counters.reasons)

    run(main())
    return [rows for _, rows in worker.ran]


@pytest.mark.parametrize("back_s", [0.0001, 0.001, 0.002, 0.003])
def test_two_groups_become_one(back_s: float) -> None:
    reasons: dict[str, int] = {}
    assert set(sizes(steep, back_s, reasons=reasons)[30:-2]) == {CALLERS}
    assert reasons[DELAY] > 20


@pytest.mark.parametrize(("run_s", "back_s"), [(linear, 0.0001), (quick, 0.001), (steep, 0.005)])
def test_no_wait_if_it_does_not_pay(run_s: Callable[[int], float], back_s: float) -> None:
    reasons: dict[str, int] = {}
    sizes(run_s, back_s, reasons=reasons)
    assert DELAY not in reasons


def calls(*callers: int) -> list[Request]:
    """Requests of one row for each caller: of several, bundles."""
    requests: list[Request] = [Call([[1]] * count) for count in callers]
    for request, count in zip(requests, callers, strict=True):
        request.callers = count
    return requests


@pytest.mark.parametrize("back", [(1,) * 8, (3, 3, 2)], ids=["alone", "bundled"])
@pytest.mark.parametrize(("unnoticed_s", "waits"), [(0.0, False), (0.002, True)])
def test_an_engine_that_stands_idle_after_each_run_should_run_less_often(
    unnoticed_s: float, waits: bool, back: tuple[int, ...]
) -> None:
    """Two runs of 8 ms, or one of 14 after a wait of 1.5 ms: it depends on what else a run costs."""
    latency = RunTimeModel(16, {8: 8000.0, 16: 14000.0})
    returns = ClosedLoopEstimator()
    for number in range(12):
        end_s = number * 0.010
        batch = Batch(calls(*([1] * 8 if len(back) == 8 else [7, 1])), 8, ((1,),), IDLE)
        batch.gathered_s = batch.started_s = end_s - 0.009
        batch.finished_s = end_s - unnoticed_s
        returns.on_ended(end_s, batch)
        requests = calls(*back)
        for request in requests:
            request.enqueued_s = end_s + 0.0015
        returns.on_formed(requests)
    company = returns.expected_returns(8, 16, latency)
    assert (company is not None) == waits
    if company is not None:
        rows, wait_s = company
        assert rows == 16
        assert wait_s == pytest.approx(0.004)


def test_requests_with_deadlines_wait_while_they_can() -> None:
    reasons: dict[str, int] = {}
    assert set(sizes(steep, 0.001, timeout_s=0.1, reasons=reasons)[30:-2]) == {CALLERS}
    assert DEADLINE not in reasons


def test_a_request_without_time_ends_the_wait() -> None:
    async def main() -> None:
        batcher = make_batcher(warmed_up(steep))
        loop = asyncio.get_running_loop()
        # Half of them are back after 0.2 ms, the others after 2 ms.
        ask_again_and_again(batcher, lambda number: 60 + number, lambda left: 0.002 if left % 2 else 0.0002)
        await asyncio.sleep(0.5)
        tight = Call([[1]])
        tight.timeout_s = steep(CALLERS + 1) + LEAD_S / 4

        def come_in_a_wait() -> None:
            if batcher._wait_rows and batcher.queue.rows >= 2:
                batcher.submit(tight)
            else:
                loop.call_later(0.00005, come_in_a_wait)

        come_in_a_wait()
        await asyncio.sleep(1)
        tight.check()
        assert tight.at_s <= tight.deadline_s
        assert tight.batch is not None
        assert tight.batch.gathered_s < tight.enqueued_s + 0.0002  # as soon as no other request comes
        assert batcher.counters.reasons[DEADLINE] == 1

    run(main())


def test_callers_at_random_are_not_waited_for() -> None:
    """However many they are: that some come soon after a batch has ended does not make them callers of it."""

    async def main() -> None:
        chance = random.Random(1)
        for load in (0.1, 0.5, 0.9):
            batcher = make_batcher(warmed_up(steep))
            callers = []
            for _ in range(3000):
                callers.append(Call([[1]]))
                batcher.submit(callers[-1])
                await asyncio.sleep(chance.expovariate(load * 64 / steep(64)))
            await asyncio.sleep(1)
            waited = batcher.counters.reasons[DELAY]
            assert waited <= 0.002 * batcher.counters.batches
            assert batcher.counters.reasons[IDLE] > 50

    run(main())


def test_clients_that_do_not_return_are_waited_for_once() -> None:
    """The wait is short, and the expectation is forgotten."""

    async def main() -> None:
        batcher = make_batcher(warmed_up(steep))
        ask_again_and_again(batcher, lambda number: 30, lambda left: 0.001)
        await asyncio.sleep(5)
        late = []
        for _ in range(20):
            lone = Call([[1]])
            batcher.submit(lone)
            await asyncio.sleep(0.5)
            lone.check()
            late.append(lone.at_s - lone.enqueued_s - steep(1))
        assert fmean(late) == pytest.approx(0.0, abs=1e-9)

    run(main())
