"""Every accepted request is answered exactly once, with its own rows or with an error that is its due.

A story is drawn at random: limits, arrivals, sizes, shapes, callers that leave at any moment, runs that
fail, an engine that dies, callbacks that raise or call the batcher again. It is played in virtual time,
and afterwards each caller's outcome must follow from the engine's observed runs.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from itertools import chain, repeat

import numpy as np
import pytest
from hypothesis import event, given

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import (
    AbandonedError,
    BatcherError,
    BatchFailedError,
    DeadlineTooShortError,
    DeadlineUnreachableError,
    DrainingError,
    EngineGoneError,
    ExpiredError,
    InputRejectedError,
    QueueFullError,
    TooManyRowsError,
)
from cobatch.batcher.scheduling.policy import RETRY
from cobatch.batcher.tenant import Tenant
from cobatch.engines.errors import EngineRunError
from tests.support.examples import examples
from tests.support.virtual.loop import Call, FakeEngine, FakeWorker, make_batcher, run
from tests.support.virtual.stories import (
    LONG_S,
    POISON,
    STORIES,
    TENANT,
    Act,
    Run,
    ScriptedWorker,
    Story,
    StrictEngine,
    Submit,
)


class Caller(Call):
    """A call that knows what became of it beside its answers."""

    __slots__ = ("act", "answered_before_leaving", "left", "refusal", "then")

    def __init__(self, number: int, act: Submit, then: Callable[[Caller], None]) -> None:
        super().__init__(
            [[POISON if bad else 100 * number + n] * act.width for n, bad in enumerate(act.rows)]
        )
        self.timeout_s = act.timeout_s
        self.priority = act.priority
        self.act = act
        self.then = then
        self.refusal: BatcherError | None = None
        self.left = False
        self.answered_before_leaving = False

    @property
    def source(self) -> Hashable:
        return self.tenant or self.act.source

    def done(self) -> None:
        super().done()
        self.then(self)
        if self.act.raises:
            raise ValueError("this caller's own trouble")


@dataclass
class Stage:
    """A story being played."""

    story: Story
    callers: list[Caller] = field(default_factory=list)
    draining: bool = False
    last_s: float = 0.0  # when the last caller left, or draining began

    def __post_init__(self) -> None:
        story = self.story
        fates = chain(story.fates, repeat((0.010, "runs")))
        self.tenant = Tenant("ann")
        self.engine = StrictEngine(story.max_batch_size, story.slots)
        self.worker = ScriptedWorker(self.engine, dict(story.run_us), fates)
        loop = asyncio.get_running_loop()
        self.batcher = Batcher(
            "fake",
            [self.worker],
            max_queue_rows=story.max_queue_rows,
            max_delay_ms=story.max_delay_ms,
            loop=loop,
            clock=loop.time,
        )

    def do(self, act: Act) -> None:
        """Carry one act out, now."""
        if isinstance(act, Submit):
            self._submit(act)
        elif self.callers:
            self._cancel(self.callers[-1 - act.back % len(self.callers)])

    def _submit(self, act: Submit) -> None:
        caller = Caller(len(self.callers) + 1, act, self._answered)
        caller.tenant = self.tenant if act.source == TENANT else None
        self.callers.append(caller)
        queued = max(self.batcher.queue.rows, self.batcher._apart.rows)
        try:
            self.batcher.submit(caller)
        except BatcherError as error:
            caller.refusal = error
            self._check_refusal(caller, error, queued)
        assert self.batcher.queue.rows <= self.story.max_queue_rows

    def _check_refusal(self, caller: Caller, error: BatcherError, queued: int) -> None:
        limit = self.story.max_queue_rows
        match error:
            case TooManyRowsError():
                assert caller.rows > limit
            case QueueFullError():
                assert caller.rows <= limit
                # Of the room that is left, a tenant may have eight times as much.
                assert limit < queued + caller.rows or (caller.tenant and 9 * queued > 8 * limit)
                assert error.retry_after_s > 0
            case EngineGoneError():
                assert self.worker.dead
            case DeadlineTooShortError() | DeadlineUnreachableError():
                assert caller.act.timeout_s is not None
            case _:
                assert isinstance(error, DrainingError)
                assert self.draining

    def _cancel(self, caller: Caller) -> None:
        self.last_s = asyncio.get_running_loop().time()
        if not caller.left:
            caller.left = True
            caller.answered_before_leaving = bool(caller.answers)
        self.batcher.cancel(caller)

    def _answered(self, caller: Caller) -> None:
        if caller.act.then is not None:
            try:
                self.do(caller.act.then)
            except AssertionError as error:
                # The batcher logs an exception of a callback, and goes on.
                self.engine.wrong.append(error)

    async def play(self) -> None:
        """From the first act until nothing can happen any more."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.engine.wrong.append(context))
        acts = self.story.acts
        await self._do_all(acts[: self.story.drain_after])
        self.draining = True
        self.last_s = loop.time()
        drained = asyncio.ensure_future(self._drain())
        await asyncio.sleep(0)
        await self._do_all(acts[self.story.drain_after :])
        await drained
        await asyncio.sleep(LONG_S)

    async def _do_all(self, acts: list[tuple[float | None, Act]]) -> None:
        for gap_s, act in acts:
            if gap_s is not None:
                await asyncio.sleep(gap_s)
            self.do(act)

    async def _drain(self) -> None:
        """Drain, which ends as soon as no request is open, and no sooner."""
        loop = asyncio.get_running_loop()
        in_time = await self.batcher.drain(self.story.drain_s)
        for caller in self.callers:
            assert caller.left or caller.refusal or caller.answers, "drained with an open request"
        assert in_time or self.story.drain_s < LONG_S
        assert loop.time() <= max([self.last_s, *(caller.at_s for caller in self.callers)])
        assert await self.batcher.drain(LONG_S), "every request has been answered"

    # The state afterwards

    def check(self) -> None:
        """Check that every request ended rightly, and the batcher is as it was before the first."""
        assert self.engine.wrong == []
        for caller in self.callers:
            self._check_caller(caller)
        self._check_rest()
        self._check_counters()
        self._check_retries()

    def _check_caller(self, caller: Caller) -> None:
        expected = 0 if caller.refusal else int(caller.answered_before_leaving) if caller.left else 1
        assert len(caller.answers) == expected
        if not caller.answers:
            return
        answer = caller.answer
        alone = [run.error for run in self.worker.runs if self._only(run, caller)]
        if isinstance(answer, np.ndarray):
            caller.check()
        elif isinstance(answer, InputRejectedError):
            assert any(isinstance(error, EngineRunError) for error in alone), "others' fault"
            # Rows of a source that is suspect are taken to be at fault while the engine runs others.
            source = caller.source
            alike = [one for one in self.callers if source is not None and one.source == source]
            assert any(any(one.act.rows) for one in [caller, *alike]), "the engine's fault"
        elif isinstance(answer, BatchFailedError):
            assert any(isinstance(error, EngineRunError) for error in alone), "others' fault"
        elif isinstance(answer, EngineGoneError):
            assert self.worker.dead
        elif isinstance(answer, ExpiredError):
            assert caller.timeout_s is not None
            # As soon as it is certain: a run before its time is over, or when its last batch has failed.
            own = {caller, *(caller.parts or ())}
            ends_s = [run.ended_s for run in self.worker.runs if run.error and own & set(run.requests)]
            latest_s = max([caller.enqueued_s + caller.timeout_s, *ends_s])
            assert caller.enqueued_s <= caller.at_s <= latest_s + 1e-9
        else:
            assert isinstance(answer, AbandonedError)
            assert self.story.drain_s < LONG_S

    @staticmethod
    def _only(run: Run, caller: Caller) -> bool:
        """True if a run held only rows of this caller."""
        (first, *others) = run.requests
        return not others and (first is caller or first in (caller.parts or ()))

    def _check_rest(self) -> None:
        batcher = self.batcher
        assert batcher.queue.rows == 0
        assert not batcher.queue.groups
        assert not batcher._apart.groups
        assert batcher.running_batches == 0
        for lane in batcher._lanes.lanes:  # none where the engine died
            assert sorted(lane.free_slots) == list(range(self.story.slots))
        assert not self.engine.taken
        assert (self.tenant.open_requests, self.tenant.queued_rows) == (0, 0)

    def _check_counters(self) -> None:
        counters = self.batcher.counters
        accepted = [caller for caller in self.callers if not caller.refusal]
        assert counters.accepted == len(accepted)
        assert counters.refused == len(self.callers) - len(accepted)
        assert counters.cancelled == sum(not caller.answers for caller in accepted)
        assert counters.expired == sum(isinstance(a, ExpiredError) for c in accepted for a in c.answers)
        assert counters.failed == sum(isinstance(a, Exception) for c in accepted for a in c.answers)
        ran = [run for run in self.worker.runs if run.error is None]
        assert counters.batches == len(ran)
        assert counters.rows == sum(request.rows for run in ran for request in run.requests)
        assert counters.failed_runs == len(self.worker.runs) - len(ran)

    def _check_retries(self) -> None:
        if any(fate != "runs" for _, fate in self.story.fates):
            return
        allowed = 0
        for one in self.worker.runs:
            if one.error is not None and one.reason != RETRY:
                allowed += one.poisoned * 2 * math.ceil(math.log2(len(one.requests)))
        assert sum(run.reason == RETRY for run in self.worker.runs) <= allowed


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """Thousands of failures are made here on purpose."""
    logger = logging.getLogger("cobatch")
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.setLevel(logging.NOTSET)


@examples(100)
@given(story=STORIES)
def test_every_accepted_request_is_answered_exactly_once(story: Story) -> None:
    async def main() -> None:
        stage = Stage(story)
        await stage.play()
        stage.check()
        for caller in stage.callers:
            fate = caller.refusal or (caller.answers[0] if caller.answers else "left")
            event(fate if isinstance(fate, str) else type(fate).__name__)

    run(main())


# What chance finds seldom


def test_the_fault_of_a_cancelled_request_fails_no_other() -> None:
    async def main() -> None:
        engine = FakeEngine()
        engine.fails = lambda rows: EngineRunError("failed") if POISON in rows else None
        worker = FakeWorker(engine)
        batcher = make_batcher(worker)
        leaving, staying = Call([[POISON]]), Call([[1]])
        batcher.submit(leaving)
        batcher.submit(staying)
        await asyncio.sleep(0.005)
        batcher.cancel(leaving)
        await asyncio.sleep(1)
        staying.check()
        assert leaving.answers == []
        assert [rows for _, rows in worker.ran] == [2, 1]

    run(main())


def test_draining_does_not_wait_for_a_run_without_live_requests() -> None:
    async def main() -> None:
        batcher = make_batcher(FakeWorker(FakeEngine(), run_s=lambda rows: LONG_S))
        leaving = Call([[1]])
        batcher.submit(leaving)
        await asyncio.sleep(1)
        drained = asyncio.ensure_future(batcher.drain(1000))
        await asyncio.sleep(1)
        assert not drained.done()
        batcher.cancel(leaving)
        assert await drained
        assert asyncio.get_running_loop().time() == 2

    run(main())
