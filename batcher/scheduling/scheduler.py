"""When a batch leaves and what is in it: brings policy, queue and dispatcher together.

The decisions are the policy's (`batcher.scheduling.policy`), the order is the queue's; this file asks when
something has changed, and tells the policy what it has to know: what has been learned of run times, arrivals
and of those who come back.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from cobatch.batcher.lanes import Lane, Lanes
from cobatch.batcher.request import Batch, Request
from cobatch.batcher.scheduling.admission import Admission
from cobatch.batcher.scheduling.arrivals import ClosedLoopEstimator
from cobatch.batcher.scheduling.formation import StartPlan
from cobatch.batcher.scheduling.policy import DEADLINE, LEAD_S, Dispatch, Limits, Now, WaitUntil, decide
from cobatch.batcher.scheduling.queue import Group, RequestQueue
from cobatch.batcher.scheduling.run_times import Arrivals, LatencyModel, ShapeTimes
from cobatch.batcher.statistics import Counters

# How many more iterations of the loop a batch may grow by while each brings someone new.
_SETTLE_ITERATIONS = 6
# After so many lone requests the next does not wait for that iteration either, where a run is so short that
# somebody right behind it loses next to nothing.
_ALONE = 16
_SHORT_RUN_S = 0.0002
# Only for a run of this length can it pay to wait for those who have just been answered: they take about a
# millisecond to come back.
_LONG_RUN_S = 0.001


class Scheduler:
    """Of one model. Whoever makes it sets `lanes`; `on_late`, to be told of requests that cannot be in
    time; and `check_drained`, to be called when something has left and nothing more is accepted."""

    lanes: Lanes
    on_late: Callable[[Request], None]
    check_drained: Callable[[], None]

    def __init__(
        self,
        queue: RequestQueue,
        latency: LatencyModel,
        times: ShapeTimes,
        admission: Admission,
        counters: Counters,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        *,
        limits: Limits,
        latency_target_s: float,
    ) -> None:
        self._queue = queue
        self._latency = latency
        self._times = times
        self._admission = admission
        self._counters = counters
        self._loop = loop
        self._clock = clock
        self._limits = limits
        self._latency_target_s = latency_target_s
        self._arrivals = Arrivals(clock())
        self._returns = ClosedLoopEstimator()
        self._moment = Now(0.0, 0, 0, 0.0)
        self._lost = 0  # requests for want of time, when a batch was last made up
        self._overloaded = False  # there were some since the one before
        self._waits = False  # for those who have just been answered
        self._alone = 0  # so many batches in a row were of one request with none behind it
        self._soon = False  # it is going to be decided
        self._seen = 0
        self._timer: asyncio.TimerHandle | None = None
        self.learn()

    def on_enqueued(self, group: Group, request: Request, lane: Lane) -> None:
        """A request was queued that fills a batch, or while this lane, which has room, is idle."""
        if self._waits and group.rows < self._moment.expected_rows and request.timeout_s is None:
            return  # it is decided when they are all there, or when the time for that is over
        if self._alone < _ALONE or lane.running or self._soon or self._queue.deadlines:
            self.decide_later()
        else:
            self.decide()

    def decide_later(self) -> None:
        """Once those who are about to come are there; see `_settle`."""
        if not self._soon:
            self._soon = True
            self._seen = self._counters.accepted
            self._loop.call_soon(self._settle, _SETTLE_ITERATIONS)

    def _settle(self, iterations: int) -> None:
        """Decide once an iteration of the loop has brought nobody new.

        While sockets are being read one after another, the next request is microseconds away and the
        loop has nothing better to do than to read it; a batch that leaves in between costs a wake-up
        of the worker, two hand-overs of the interpreter lock and a callback, about as much as ten
        requests. Never waits for time to pass: a lone request leaves in the next iteration.
        """
        arriving = self._counters.accepted != self._seen
        if arriving and iterations and self._queue.rows < self._queue.full_rows:
            self._seen = self._counters.accepted
            self._loop.call_soon(self._settle, iterations - 1)
        else:
            self.decide()

    def decide(self) -> None:
        """Send what is to leave now, and see to it that it is asked again when something else is."""
        self._soon = self._waits = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lanes = self.lanes
        while True:
            lane = lanes.next_lane()
            if lane is None:
                break
            if lanes.retries:
                lanes.send_retry(lane)
                continue
            if not self._queue.rows:
                break
            decision = decide(self._queue, self._now(lane), self._limits)
            if isinstance(decision, Dispatch):
                self._send(lane, decision.group, decision.reason)
                continue
            if isinstance(decision, WaitUntil):
                self._waits = self._moment.expected_rows > 0
                delay_s = max(0.0, decision.time_s - self._clock())
                self._timer = self._loop.call_later(delay_s, self.decide)
            break
        if self._admission.closed is not None:
            self.check_drained()

    def _now(self, lane: Lane) -> Now:
        # One object, filled anew each time: there is a decision for every batch, and often two.
        now = self._moment
        now.time_s = self._clock()
        now.in_slots = lane.in_slots
        now.running = len(lane.running)
        now.free_s = lane.free_s
        now.draining = self._admission.closed is not None
        now.overloaded = self._queue.deadlines > 0 and (
            self._overloaded or self._counters.missed_deadlines != self._lost
        )
        if self._limits.max_delay_s > 0 or self._queue.deadlines:
            # Early enough for a timer that is late: when only the run is left, a request is taken out.
            times = self._times.of(self._queue.next_group.row_shapes)
            now.run_s = times.high_s(min(self._queue.rows, self._queue.full_rows)) + LEAD_S
        if self._limits.max_delay_s > 0:
            now.rows_per_s = self._arrivals.rate(now.time_s, self._counters.accepted)
        return now

    def _send(self, lane: Lane, group: Group, reason: str) -> None:
        """Take a batch of the group and send it, if anybody in it can still be in time."""
        queue = self._queue
        most, plan = queue.full_rows, None
        if queue.deadlines:
            lost = self._counters.missed_deadlines
            times = self._times.of(group.row_shapes)
            self._overloaded = lost != self._lost
            plan = StartPlan(max(self._clock(), lane.free_s), times, self._overloaded)
            self._lost = lost
            if plan.overloaded and self._latency_target_s == math.inf:
                most = self._latency.overloaded_rows
        taken = queue.take(group, most, plan)
        if taken.requests:
            alone = self._prompt and plan is None and len(taken.requests) == 1 and not queue.rows
            self._alone = self._alone + 1 if alone else 0
            if self._slow:
                self._returns.left(taken.requests)
                self._moment.expected_rows = 0
                self._waits = False
            self.lanes.send(lane, taken.requests, DEADLINE if taken.capped else reason, taken.shares)
        for request in taken.late:
            self.on_late(request)

    def on_idle(self, lane: Lane, batch: Batch) -> bool:
        """A batch has ended. Whether others wait: then the engine has been given some of them."""
        if self._slow:
            self._expect_back(lane, batch)
        if not self._queue.rows and not self.lanes.retries:
            return False
        self.on_ran(batch)
        self.decide()
        return True

    def _expect_back(self, lane: Lane, batch: Batch) -> None:
        """Those whom it answers may soon be back, and then it may pay to wait for them. With several engines
        some are back while others run."""
        if len(self.lanes.lanes) > 1:
            return
        now_s = self._clock()
        self._returns.ended(now_s, batch)
        if not lane.running and not self._limits.max_delay_s:
            company = self._returns.expected_returns(self._queue.rows, self._queue.full_rows, self._latency)
            if company is not None:
                self._moment.expected_rows, wait_s = company
                self._moment.expected_by_s = now_s + wait_s

    def on_ran(self, batch: Batch) -> None:
        """Learn from it, and let its tenants pay for what it took."""
        run_s = batch.finished_s - batch.started_s
        self._queue.settle(batch.shares, run_s, batch.rows)
        if self._times.observe(batch.row_shapes, batch.rows, run_s, batch.finished_s):
            self.learn()

    def learn(self) -> None:
        """Let the queue know what the latency model has come to."""
        most = self._latency.full_rows
        if self._latency_target_s < math.inf:
            # While a batch runs the next one gathers: a request waits for one and rides in one.
            most = max(1, self._latency.most_rows(self._latency_target_s / 2, most))
        self._queue.full_rows = most
        self._queue.row_s = self._latency.row_s
        self._prompt = self._latency.expected_s(1) <= _SHORT_RUN_S
        self._slow = self._latency.expected_s(most) >= _LONG_RUN_S
