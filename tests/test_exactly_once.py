"""Every accepted request is answered exactly once, with its own rows or with an error that is its due.

A story is drawn at random: limits, arrivals, sizes, shapes, callers that leave at any moment, runs that
fail, an engine that dies, callbacks that raise or call the batcher again. It is played in virtual time,
and afterwards each caller's fate must follow from what the engine was seen to do.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, repeat

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from batcher.batcher import Batcher
from batcher.errors import (
    AbandonedError,
    BatcherError,
    BatchFailedError,
    DrainingError,
    EngineGoneError,
    ExpiredError,
    QueueFullError,
    TooManyRowsError,
)
from batcher.policy import RETRY
from batcher.request import Batch, Request, State
from batcher.split import Part
from engines.base import RowShapes
from engines.errors import EngineDeadError, EngineError, EngineRunError
from engines.worker import Deliver, Job, Outcome
from tests.virtual import Array, Call, FakeEngine, run

POISON = -666
SPOILED = -1
LONG_S = 100_000.0
# Gaps between events: none at all, the next iteration of the loop, and times that fall before, on and
# after the ends of runs and delays.
GAPS_S = [None, None, None, 0.0, 0.001, 0.005, 0.010, 0.0101]
RUNS_S = [0.0, 0.001, 0.005, 0.010, 0.030]


# What is drawn


@dataclass(frozen=True)
class Submit:
    """A caller: its rows (True: poisoned), and what its callback does."""

    rows: tuple[bool, ...]
    width: int
    timeout_s: float | None = None
    raises: bool = False
    then: Act | None = None


@dataclass(frozen=True)
class Cancel:
    """Some caller leaves, wherever it is by then: a number modulo the callers so far."""

    which: int


Act = Submit | Cancel


@dataclass(frozen=True)
class Story:
    """Everything that chance decides."""

    max_batch_size: int
    slots: int
    max_queue_rows: int
    max_delay_ms: float
    run_us: dict[int, float]
    acts: list[tuple[float | None, Act]]
    fates: list[tuple[float, str]]
    drain_s: float


ROWS = st.one_of(st.integers(1, 2), st.integers(1, 14)).flatmap(
    lambda rows: st.one_of(
        st.just((False,) * rows),
        st.tuples(*[st.sampled_from([False, False, False, True])] * rows),
    )
)
CANCELS = st.builds(Cancel, st.integers(0, 40))
LATER = st.one_of(st.none(), st.none(), CANCELS, st.builds(Submit, ROWS, st.integers(1, 2)))
SUBMITS = st.builds(
    Submit,
    ROWS,
    width=st.sampled_from([0, 1, 1, 1, 2]),
    timeout_s=st.sampled_from([None] * 6 + [0.0, 0.005, 0.010, LONG_S]),
    raises=st.sampled_from([False] * 9 + [True]),
    then=LATER,
)
ACTS = st.tuples(st.sampled_from(GAPS_S), st.one_of(SUBMITS, SUBMITS, SUBMITS, CANCELS))
STORIES = st.builds(
    Story,
    max_batch_size=st.integers(1, 6),
    slots=st.integers(1, 3),
    max_queue_rows=st.one_of(st.integers(1, 8), st.just(40), st.just(1000)),
    max_delay_ms=st.sampled_from([0.0, 0.0, 1.0, 5.0]),
    run_us=st.sampled_from([{}, {1: 1e4, 2: 1.5e4, 4: 3.2e4}, {1: 1e4, 2: 2e4, 4: 4e4}]),
    acts=st.one_of(st.lists(ACTS, max_size=8), st.lists(ACTS, min_size=12, max_size=40)),
    fates=st.lists(
        st.tuples(st.sampled_from(RUNS_S), st.sampled_from(["runs"] * 12 + ["fails"] * 2 + ["dies"])),
        min_size=1,
        max_size=8,
    ),
    drain_s=st.sampled_from([0.0, 0.005, 0.010, LONG_S, LONG_S]),
)


# What it is played on


class StrictEngine(FakeEngine):
    """Keeps one input and one output buffer per slot and spoils both as soon as they may be reused."""

    def __init__(self, max_batch_size: int, slots: int) -> None:
        super().__init__(max_batch_size, slots)
        self.taken: set[int] = set()
        self.outputs: dict[int, Array] = {}

    def inputs(self, slot: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        assert slot not in self.taken, "rows are packed into a slot that still runs"
        if slot in self.outputs:
            self.outputs[slot].fill(SPOILED)
        return super().inputs(slot, row_shapes)

    def outputs_of(self, slot: int, rows: int) -> Array:
        """Twice the slot's rows."""
        self.outputs[slot] = self.buffers[slot][:rows] * 2
        return self.outputs[slot]


@dataclass
class Run:
    """A batch as the worker got it, and what came of it."""

    requests: tuple[Request, ...]
    reason: str
    at_s: float
    error: EngineError | None = None


class ScriptedWorker:
    """Runs jobs one after another in virtual time, each with the next fate of the story."""

    def __init__(
        self, engine: StrictEngine, warmup_us: dict[int, float], fates: Iterator[tuple[float, str]]
    ) -> None:
        self.engine = engine
        self.deliver: Deliver | None = None
        self.warmup_us = warmup_us
        self.runs: list[Run] = []
        self.dead = False
        self._fates = fates
        self._jobs: deque[tuple[Job, Run]] = deque()

    def submit(self, job: Job) -> None:
        batch = job.context
        assert isinstance(batch, Batch)
        assert batch.rows == job.rows == sum(request.rows for request in batch.requests)
        assert 0 < job.rows <= self.engine.max_batch_size
        assert all(request.state is State.RUNNING for request in batch.requests), "nobody waits for these"
        assert {request.row_shapes for request in batch.requests} == {job.row_shapes}
        assert job.slot not in self.engine.taken
        self.engine.taken.add(job.slot)
        entry = Run(tuple(batch.requests), batch.reason, asyncio.get_running_loop().time())
        self.runs.append(entry)
        self._jobs.append((job, entry))
        if len(self._jobs) == 1:
            self._start()

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        run_s, fate = next(self._fates)
        loop.call_later(run_s, self._end, fate, loop.time())

    def _end(self, fate: str, started_s: float) -> None:
        job, entry = self._jobs.popleft()
        self.dead = self.dead or fate == "dies"
        if self.dead:
            entry.error = EngineDeadError("dead")
        elif fate == "fails" or (self.engine.buffers[job.slot][: job.rows] == POISON).any():
            entry.error = EngineRunError("failed")
        outputs = None if entry.error else (self.engine.outputs_of(job.slot, job.rows),)
        self.engine.taken.discard(job.slot)
        assert self.deliver is not None
        # As from a thread: the loop hears of it in an iteration of its own.
        self.deliver(job, Outcome(outputs, entry.error, started_s, asyncio.get_running_loop().time()))
        if self._jobs:
            self._start()


class Caller(Call):
    """A call that knows what became of it beside its answers."""

    __slots__ = ("act", "answered_before_leaving", "left", "refusal", "then")

    def __init__(self, number: int, act: Submit, then: Callable[[Caller], None]) -> None:
        super().__init__(
            [[POISON if bad else 100 * number + n] * act.width for n, bad in enumerate(act.rows)]
        )
        self.timeout_s = act.timeout_s
        self.act = act
        self.then = then
        self.refusal: BatcherError | None = None
        self.left = False
        self.answered_before_leaving = False

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

    def __post_init__(self) -> None:
        story = self.story
        fates = chain(story.fates, repeat((0.010, "runs")))
        self.engine = StrictEngine(story.max_batch_size, story.slots)
        self.worker = ScriptedWorker(self.engine, dict(story.run_us), fates)
        loop = asyncio.get_running_loop()
        self.batcher = Batcher(
            "fake",
            self.worker,
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
            self._cancel(self.callers[act.which % len(self.callers)])

    def _submit(self, act: Submit) -> None:
        caller = Caller(len(self.callers) + 1, act, self._answered)
        self.callers.append(caller)
        queued = self.batcher.queued_rows
        try:
            self.batcher.submit(caller)
        except BatcherError as error:
            caller.refusal = error
            self._check_refusal(caller, error, queued)
        assert self.batcher.queued_rows <= self.story.max_queue_rows

    def _check_refusal(self, caller: Caller, error: BatcherError, queued: int) -> None:
        limit = self.story.max_queue_rows
        match error:
            case TooManyRowsError():
                assert caller.rows > limit
            case QueueFullError():
                assert caller.rows <= limit < queued + caller.rows
                assert error.retry_after_s > 0
            case EngineGoneError():
                assert self.worker.dead
            case _:
                assert isinstance(error, DrainingError)
                assert self.draining

    def _cancel(self, caller: Caller) -> None:
        if not caller.left:
            caller.left = True
            caller.answered_before_leaving = bool(caller.answers)
        self.batcher.cancel(caller)

    def _answered(self, caller: Caller) -> None:
        if caller.act.then is not None:
            self.do(caller.act.then)

    async def play(self) -> None:
        """From the first act until nothing can happen any more."""
        for gap_s, act in self.story.acts:
            if gap_s is not None:
                await asyncio.sleep(gap_s)
            self.do(act)
        self.draining = True
        unanswered = await self.batcher.drain(self.story.drain_s)
        for caller in self.callers:
            assert caller.left or caller.refusal or caller.answers, "drained, and somebody still waits"
        assert unanswered or self.story.drain_s < LONG_S
        await asyncio.sleep(LONG_S)

    # What must be true afterwards

    def check(self) -> None:
        """Everybody got what was due, and the batcher is as it was before the first."""
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
        elif isinstance(answer, BatchFailedError):
            assert any(isinstance(error, EngineRunError) for error in alone), "others' fault"
        elif isinstance(answer, EngineGoneError):
            assert self.worker.dead
        elif isinstance(answer, ExpiredError):
            assert caller.timeout_s is not None
            assert caller.at_s == pytest.approx(caller.enqueued_s + caller.timeout_s)
        else:
            assert isinstance(answer, AbandonedError)
            assert self.story.drain_s < LONG_S

    @staticmethod
    def _only(run: Run, caller: Caller) -> bool:
        """Whether a run held nothing but rows of this caller."""
        (first, *others) = run.requests
        return not others and (first is caller or first in (caller.parts or ()))

    def _check_rest(self) -> None:
        batcher = self.batcher
        assert batcher.queued_rows == 0
        assert not batcher._queue.groups
        assert not batcher._retries
        assert batcher.running_batches == 0
        assert sorted(batcher._free_slots) == list(range(self.story.slots))
        assert not self.engine.taken

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
                bad = sum(_poisoned(request) for request in one.requests)
                allowed += bad * 2 * math.ceil(math.log2(len(one.requests)))
        assert sum(run.reason == RETRY for run in self.worker.runs) <= allowed


def _poisoned(request: Request) -> bool:
    if isinstance(request, Part):
        return POISON in np.frombuffer(request.payloads[0], np.int64)  # type: ignore[arg-type]
    assert isinstance(request, Caller)
    return POISON in request.values


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    """Thousands of failures are made here on purpose."""
    logger = logging.getLogger("cobatch")
    logger.setLevel(logging.CRITICAL + 1)
    yield
    logger.setLevel(logging.NOTSET)


@settings(deadline=None, max_examples=400)
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
