"""Time before a request is read and after its run counts for its deadline too."""

from __future__ import annotations

import asyncio

import pytest

from cobatch.batcher.errors import DeadlineTooShortError
from cobatch.batcher.scheduling.tuning import MOST_OVERHEAD
from cobatch.batcher.tenant import Tenant
from cobatch.engines.worker import Job, Outcome
from tests.support.virtual.loop import Call, make_batcher, run
from tests.support.virtual.tenants import Metered, affine

EPSILON_S = 1e-5


class Unnoticed(Metered):
    """Its outcomes lie unnoticed for a while, as where the event loop is busy."""

    def __init__(self, lag_s: float) -> None:
        super().__init__(affine)
        self.lag_s = lag_s

    def late(self, job: Job, outcome: Outcome) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(self.lag_s, self._on_time, job, outcome)

    def begin(self) -> None:
        assert self.deliver is not None
        self._on_time = self.deliver
        self.deliver = self.late


def call(timeout_s: float) -> Call:
    one = Call([[7]])
    one.timeout_s = timeout_s
    return one


@pytest.mark.parametrize("suspect", [False, True])
@pytest.mark.parametrize(("lag_s", "overhead_s"), [(0.0, 0.0), (0.0005, 0.001), (0.1, 1.0)])
@pytest.mark.parametrize(("more_s", "in_time"), [(-EPSILON_S, False), (EPSILON_S, True)])
def test_a_request_that_a_busy_loop_would_answer_late_is_refused(
    lag_s: float, overhead_s: float, more_s: float, in_time: bool, suspect: bool
) -> None:
    """`overhead_s` is twice the lag, before reading and before answering; at most a part of the timeout."""

    async def main() -> None:
        worker = Unnoticed(lag_s)
        batcher = make_batcher(worker)
        worker.begin()
        for _ in range(100):
            batcher.submit(Call([[7]]))
            await asyncio.sleep(0.2)
        timeout_s = min(affine(1) + overhead_s, affine(1) / (1 - MOST_OVERHEAD))
        one = call(timeout_s + more_s)
        if suspect:
            one.tenant = Tenant("suspect")
            batcher._suspects.add(one, asyncio.get_running_loop().time())
        if in_time:
            batcher.submit(one)
            await asyncio.sleep(1)
            one.check()
            assert lag_s > timeout_s or one.at_s <= one.enqueued_s + timeout_s + more_s - lag_s
        else:
            with pytest.raises(DeadlineTooShortError) as refused:
                batcher.submit(one)
            assert refused.value.needed_s > timeout_s + more_s

    run(main())
