"""No request is refused for ever because runs were slow once: old run times are doubted, and tried.

What would be too late is not run, and only a run can teach that it would not be.
"""

from __future__ import annotations

import asyncio

import pytest

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import DeadlineTooShortError, DeadlineUnreachableError, ExpiredError
from cobatch.batcher.scheduling.tuning import DOUBT_S
from tests.support.virtual.loop import Call, make_batcher, run
from tests.support.virtual.tenants import Metered, affine

EPSILON_S = 1e-5
SLOW = 20.0
TIMEOUT_S = 0.040
BETWEEN_S = 0.050


def call(rows: int = 1, timeout_s: float = TIMEOUT_S, width: int = 1) -> Call:
    one = Call([[7] * width] * rows)
    one.timeout_s = timeout_s
    return one


class Disturbed:
    """A worker whose runs take `SLOW` times as long until `mended`."""

    def __init__(self) -> None:
        self.slow = SLOW
        self.worker = Metered(affine)
        self.worker.run_s = lambda rows: affine(rows) * self.slow
        self.batcher: Batcher = make_batcher(self.worker)

    def mend(self) -> None:
        self.slow = 1.0


async def ask(batcher: Batcher, seconds: float, **what: int) -> list[str]:
    """The outcome of one request after another; before the next comes there is time for a quick run."""
    told = []
    for _ in range(round(seconds / BETWEEN_S)):
        one = call(**what)
        try:
            batcher.submit(one)
        except (DeadlineTooShortError, DeadlineUnreachableError):
            told.append("refused")
        else:
            told.append("let in")
        await asyncio.sleep(BETWEEN_S)
    return told


@pytest.mark.parametrize("what", [{"rows": 1}, {"rows": 5}, {"rows": 11}, {"width": 3}])
def test_after_a_disturbance_requests_are_let_in_again(what: dict[str, int]) -> None:
    async def main() -> None:
        disturbed = Disturbed()
        batcher = disturbed.batcher
        batcher.submit(Call([[7]]))  # the shape that others are compared with
        await asyncio.sleep(1)
        await ask(batcher, 4, **what)
        assert (await ask(batcher, 0.5, **what)).count("let in") <= 1
        disturbed.mend()
        await ask(batcher, 12, **what)
        assert "refused" not in await ask(batcher, 2, **what)

    run(main())


def test_a_warm_up_that_was_held_up_is_not_believed_for_ever() -> None:
    async def main() -> None:
        worker = Metered(affine)
        worker.warmup_us = {rows: run_us * SLOW for rows, run_us in worker.warmup_us.items()}
        batcher = make_batcher(worker)
        assert "let in" not in await ask(batcher, DOUBT_S)
        await ask(batcher, 10)
        assert "refused" not in await ask(batcher, 2)

    run(main())


def test_other_sizes_that_run_do_not_hide_that_one_does_not() -> None:
    async def main() -> None:
        disturbed = Disturbed()
        batcher = disturbed.batcher
        for _ in range(8):
            batcher.submit(Call([[7]] * 8))
        await asyncio.sleep(3)
        disturbed.mend()
        for _ in range(150):
            batcher.submit(Call([[7]]))
            await asyncio.sleep(0.030)
        await ask(batcher, 10, rows=8)
        assert "refused" not in await ask(batcher, 2, rows=8)

    run(main())


def test_while_runs_are_slow_one_request_a_second_is_admitted_on_trial() -> None:
    async def main() -> None:
        batcher = Disturbed().batcher
        await ask(batcher, 3)
        expired = batcher.counters.expired
        told = await ask(batcher, 20)
        run_s = affine(1) * SLOW
        assert 20 / (DOUBT_S + run_s) - 1 <= told.count("let in") <= 20 / DOUBT_S + 1
        await asyncio.sleep(DOUBT_S + run_s)
        assert batcher.counters.expired - expired == told.count("let in")

    run(main())


def test_a_trial_fails_at_its_timeout_and_its_run_is_measured() -> None:
    async def main() -> None:
        disturbed = Disturbed()
        batcher, worker = disturbed.batcher, disturbed.worker
        await ask(batcher, 3)
        await asyncio.sleep(DOUBT_S + affine(1) * SLOW)
        ran, expired = worker.batches, batcher.counters.expired
        late = call()
        batcher.submit(late)
        await asyncio.sleep(TIMEOUT_S - EPSILON_S)
        assert not late.answers
        await asyncio.sleep(2 * EPSILON_S)
        assert isinstance(late.answer, ExpiredError)
        assert (worker.batches, batcher.counters.expired) == (ran + 1, expired + 1)
        disturbed.mend()
        await asyncio.sleep(DOUBT_S + affine(1) * SLOW)
        quick = call()
        batcher.submit(quick)
        await asyncio.sleep(affine(1) + EPSILON_S)
        quick.check()
        assert batcher.counters.expired == expired + 1

    run(main())


@pytest.mark.parametrize("rows", [1, 20])
def test_a_timeout_that_no_run_can_meet_is_never_answered(rows: int) -> None:
    async def main() -> None:
        batcher = make_batcher(Metered(affine))
        await asyncio.sleep(5)
        hopeless = call(rows=rows, timeout_s=1e-6)
        batcher.submit(hopeless)
        await asyncio.sleep(1)
        assert isinstance(hopeless.answer, ExpiredError)
        batcher.submit(Call([[7]]))
        assert await batcher.drain(1)

    run(main())


@pytest.mark.parametrize(("more_s", "tried"), [(-EPSILON_S, False), (EPSILON_S, True)])
def test_a_trial_needs_a_second_without_a_run(more_s: float, tried: bool) -> None:
    async def main() -> None:
        batcher = make_batcher(Metered(affine))
        await asyncio.sleep(5)
        batcher.submit(Call([[7]]))
        await asyncio.sleep(affine(1) + DOUBT_S + more_s)
        one = call(timeout_s=affine(1) / 2)
        if tried:
            batcher.submit(one)
            with pytest.raises((DeadlineTooShortError, DeadlineUnreachableError)):
                batcher.submit(call(timeout_s=affine(1) / 2))  # one is enough
            await asyncio.sleep(1)
            assert isinstance(one.answer, ExpiredError)
        else:
            with pytest.raises(DeadlineTooShortError):
                batcher.submit(one)

    run(main())


def test_no_trial_while_other_requests_would_wait_for_it() -> None:
    async def main() -> None:
        batcher = make_batcher(Metered(affine))
        await asyncio.sleep(5)
        batcher.submit(Call([[7]]))
        with pytest.raises((DeadlineTooShortError, DeadlineUnreachableError)):
            batcher.submit(call(timeout_s=affine(1) / 2))
        await asyncio.sleep(affine(1) / 2)  # it runs
        with pytest.raises((DeadlineTooShortError, DeadlineUnreachableError)):
            batcher.submit(call(timeout_s=affine(1) / 2))

    run(main())
