"""Hypothesis strategies for random scenarios of the batcher, and the engine and worker that run them.

tests/batcher/test_exactly_once.py runs them and checks the outcome.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from cobatch.batcher.request import Batch, Request, State
from cobatch.engines.base import RowShapes
from cobatch.engines.errors import EngineDeadError, EngineError, EngineRunError
from cobatch.engines.worker import Deliver, Job, Outcome
from tests.support.virtual.loop import Array, FakeEngine

POISON = -666
SPOILED = -1
TENANT = 3
LONG_S = 100_000.0
# Gaps between events: none, the next iteration of the loop, and times before, at and after the ends of runs
# and delays.
GAPS_S = [None, None, None, 0.0, 0.001, 0.005, 0.010, 0.0101]
RUNS_S = [0.0, 0.001, 0.005, 0.010, 0.030]


# Scenarios


@dataclass(frozen=True)
class Submit:
    """Submit a request with these rows (True: poisoned); its callback may raise or act.

    `source`: its connection, None if unknown; TENANT: it is of a tenant.
    """

    rows: tuple[bool, ...]
    width: int
    timeout_s: float | None = None
    raises: bool = False
    then: Act | None = None
    source: int | None = None
    priority: int = 0


@dataclass(frozen=True)
class Cancel:
    """Cancel a request in any state: an index back from the latest, modulo their number."""

    back: int


Act = Submit | Cancel


@dataclass(frozen=True)
class Story:
    """All random choices. Draining starts after `drain_after` acts, at the latest after all."""

    max_batch_size: int
    slots: int
    max_queue_rows: int
    max_delay_ms: float
    run_us: dict[int, float]
    acts: list[tuple[float | None, Act]]
    fates: list[tuple[float, str]]
    drain_after: int
    drain_s: float


ROWS = st.one_of(st.integers(1, 2), st.integers(1, 14)).flatmap(
    lambda rows: st.one_of(
        st.just((False,) * rows),
        st.tuples(*[st.sampled_from([False, False, False, True])] * rows),
    )
)
CANCELS = st.builds(Cancel, st.one_of(st.integers(0, 3), st.integers(0, 40)))
LATER = st.one_of(st.none(), st.none(), CANCELS, st.builds(Submit, ROWS, st.integers(1, 2)))
SUBMITS = st.builds(
    Submit,
    ROWS,
    width=st.sampled_from([0, 1, 1, 1, 2]),
    timeout_s=st.sampled_from([None] * 6 + [0.0, 0.005, 0.010, LONG_S]),
    raises=st.sampled_from([False] * 9 + [True]),
    then=LATER,
    source=st.sampled_from([None, None, 1, 2, TENANT]),
    priority=st.sampled_from([0] * 6 + [1, 8]),
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
    drain_after=st.one_of(st.integers(0, 20), st.just(40)),
    drain_s=st.sampled_from([0.0, 0.005, 0.010, LONG_S, LONG_S]),
)


# Engine and worker


class StrictEngine(FakeEngine):
    """Reuses one input and one output buffer per slot, and overwrites both as early as allowed."""

    def __init__(self, max_batch_size: int, slots: int) -> None:
        super().__init__(max_batch_size, slots)
        self.taken: set[int] = set()
        self.wrong: list[object] = []
        self.outputs: dict[int, Array] = {}

    def inputs(self, slot: int, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        if slot in self.taken:
            # Not raised: the batcher would take an exception for a failure of the engine.
            self.wrong.append(f"rows are packed into slot {slot}, which still runs")
        if slot in self.outputs:
            self.outputs[slot].fill(SPOILED)
        return super().inputs(slot, rows, row_shapes)

    def outputs_of(self, slot: int, rows: int) -> Array:
        """Return twice the slot's rows."""
        self.outputs[slot] = self.buffers[slot][:rows] * 2
        return self.outputs[slot]


@dataclass
class Run:
    """A batch as the worker received it, and its outcome."""

    requests: tuple[Request, ...]
    poisoned: int
    reason: str
    error: EngineError | None = None
    ended_s: float = 0.0


def _is_poisoned(request: Request) -> bool:
    (payload,) = request.payloads
    return bool(len(payload)) and POISON in np.frombuffer(payload, np.int64)  # type: ignore[arg-type]


class ScriptedWorker:
    """Runs jobs one after another in virtual time, each with the next fate of the scenario."""

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
        assert all(request.state is State.RUNNING for request in batch.requests), (
            "an ended request was packed"
        )
        assert {request.row_shapes for request in batch.requests} == {job.row_shapes}
        assert job.slot not in self.engine.taken
        self.engine.taken.add(job.slot)
        poisoned = sum(_is_poisoned(request) for request in batch.requests)
        entry = Run(tuple(batch.requests), poisoned, batch.reason)
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
        # As from a thread: in a new iteration of the loop.
        entry.ended_s = now_s = asyncio.get_running_loop().time()
        zeros_run = fate != "fails" if job.explain and entry.error is not None else None
        self.deliver(job, Outcome(outputs, entry.error, started_s, now_s, zeros_run))
        if self._jobs:
            self._start()
