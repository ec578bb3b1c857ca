"""Failed batches: an exception of the user's code reaches the caller at fault as it is."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from cobatch.batcher.errors import DeadlineExceeded, ExpiredError
from cobatch.engines.errors import CallerError
from tests.support.virtual.loop import Array, FakeEngine, FakeWorker, calls, make_batcher, run


@pytest.mark.parametrize("bad", [(2,), (0, 3), (0, 1, 2, 3)])
def test_the_exception_of_a_run_reaches_only_the_callers_that_fail_alone(
    bad: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    raised: list[ValueError] = []

    async def main() -> None:
        engine = FakeEngine(max_batch_size=4, slots=1)
        group = calls(4, width=1)

        def fails(rows: Array) -> CallerError | None:
            if not np.isin(rows, [group[n].values[0, 0] for n in bad]).any():
                return None
            raised.append(ValueError("bad"))
            return CallerError(raised[-1])

        engine.fails = fails
        batcher = make_batcher(FakeWorker(engine))
        for call in group:
            batcher.submit(call)
        await asyncio.sleep(1)
        for n, call in enumerate(group):
            if n in bad:
                assert any(call.answer is one for one in raised)
            else:
                call.check()
        assert batcher.counters.failed == len(bad)

    run(main())
    assert not caplog.records  # the callers have it


def test_a_missed_deadline_is_a_timeout_error() -> None:
    assert issubclass(DeadlineExceeded, TimeoutError)
    assert str(ExpiredError(0.5)) == "the request could not be run within its timeout of 500 ms"
    assert vars(ExpiredError(0.5)) == {"timeout_s": 0.5}  # members of a problem
