"""The scheduler: which requests are accepted, when a batch leaves, and which requests are in it.

It owns the queue, the admission, the learned run times, the arrivals and the policy, and answers each
question at once: `admit` a request or say why not; `next` says dispatch this batch, wait until then, or
nothing. It knows no event loop, thread or clock: the time is an argument. `batcher.batcher` asks and acts.
"""

from collections.abc import Mapping
from math import inf

import msgspec

from cobatch.batcher.errors import BatcherError
from cobatch.batcher.request import Batch, Request
from cobatch.batcher.scheduling.admission import Admission
from cobatch.batcher.scheduling.arrivals import ArrivalRate, ClosedLoopEstimator
from cobatch.batcher.scheduling.fair_queueing import Group
from cobatch.batcher.scheduling.formation import StartPlan, form
from cobatch.batcher.scheduling.policy import DEADLINE, RETRY, SUSPECT, Now, WaitUntil, decide
from cobatch.batcher.scheduling.queue import RequestQueue
from cobatch.batcher.scheduling.run_times import RunTimeModel
from cobatch.batcher.scheduling.shape_times import ShapeRunTimes
from cobatch.batcher.scheduling.suspects import Suspects
from cobatch.batcher.scheduling.tuning import (
    BACKLOG,
    CREDIT,
    LEAD_S,
    LONE_BATCHES,
    LONG_RUN_S,
    OTHERS_S,
    OVERHEAD_GAIN,
    PEAK_DECAY,
    SHORT_RUN_S,
    SUSPECT_PART,
)
from cobatch.batcher.statistics import Counters
from cobatch.batcher.tenant import Tenant


class Dispatch(msgspec.Struct, eq=False):
    """Send these requests now, if any. Those in `late` are out of the queue too: they would be too late."""

    requests: list[Request]
    reason: str
    shares: dict[Tenant | None, int]
    late: list[Request]


class Scheduler:
    """Schedules the requests of one model. Seconds are of the batcher's clock.

    `warmup_us` maps rows to the microseconds of a run. `vary`: rows may differ in shape.
    `latency_target_s` limits the batch size so that a request is answered within it while the engine keeps
    up. `deadline_s` is the timeout of requests without one.
    """

    def __init__(
        self,
        counters: Counters,
        warmup_us: Mapping[int, float],
        *,
        max_batch_size: int,
        vary: bool,
        max_queue_rows: int,
        max_delay_s: float,
        latency_target_s: float | None,
        deadline_s: float | None,
        now_s: float,
    ) -> None:
        self.run_times = RunTimeModel(max_batch_size, warmup_us)
        self.shape_times = ShapeRunTimes(self.run_times, vary=vary)
        self.queue = RequestQueue(
            1, self.run_times.row_s, ages=max_delay_s > 0, run_s=self.run_times.expected_s
        )
        apart = RequestQueue(max_batch_size, self.run_times.row_s, ages=False)
        self.suspects = Suspects(apart, self.queue)
        self.admission, self._suspects_admission = [
            Admission(
                queue,
                self.run_times,
                self.shape_times,
                max_batch_size=max_batch_size,
                max_queue_rows=max_queue_rows,
                timeout_s=deadline_s,
                now_s=now_s,
            )
            for queue in (self.queue, apart)
        ]
        self.draining = False
        self.counters = counters
        self.max_batch_size = max_batch_size
        self._max_delay_s = max_delay_s
        self._latency_target_s = inf if latency_target_s is None else latency_target_s
        self._rate = ArrivalRate(now_s)
        self._closed_loop = ClosedLoopEstimator()
        self._now = Now(0.0, running=False, free_s=0.0)  # filled anew for each decision
        self._missed = 0  # missed deadlines when the last batch was formed
        self._overloaded = False  # there were new ones since the batch before
        self._was_short = False  # the last batch, for the sake of a light tenant
        self._formed_s = -inf  # when the last batch without suspects left
        self.lone = False  # the next request will probably have no other right behind it
        self._peak_rows = 0.0  # queued when a batch was formed, decaying
        self._backlogged = 0  # batches in a row that left a long queue
        self._lone_batches = 0  # in a row, of one request with none behind it
        self.learn()

    # In

    def admit(self, request: Request, now_s: float, free_s: float) -> BatcherError | None:
        """Account for a new request and set its deadline; return why it is refused, or None.

        `free_s`: when the first engine is expected to be idle.
        """
        queue, admission, tenant = self.queue, self.admission, request.tenant
        if self.suspects.marks and admission.closed is None and self.suspects.holds(request):
            queue, admission = self.suspects.queue, self._suspects_admission
            admission.engines, admission.overhead_s = self.admission.engines, self.admission.overhead_s
        if queue.rows >= admission.open_rows or tenant is not None or request.rows > 1:
            error = admission.refusal(request.rows, tenant, request.entrants, now_s)
            if error is not None:
                return error
        if request.timeout_s is not None or admission.timeout_s is not None:
            apart = admission is self._suspects_admission
            wait_s = self._suspect_wait_s(request, now_s, free_s) if apart else None
            error = admission.set_deadline(request, now_s, free_s, wait_s)
            if error is not None:
                return error
        if tenant is not None:
            tenant.enter(request.entrants, now_s)
        self.counters.accepted += request.callers
        return None

    def _suspect_wait_s(self, request: Request, now_s: float, free_s: float) -> float:
        part = self._suspect_part(now_s)
        begin_s = free_s if part == 1 else max(free_s, self.suspects.due_s(part))
        ahead_s = self.suspects.ahead_s(request, self.run_times.expected_s)
        return max(0.0, begin_s - now_s) + ahead_s / (part * self.admission.engines)

    def retry(self, batch: Batch, requests: list[Request]) -> None:
        """Queue a part of a batch that was sent in vain, before other requests of the same tenants."""
        self.counters.retries += 1
        queue = self.suspects.queue if batch.reason == SUSPECT else self.queue
        queue.push_apart(requests, object(), sum([one.rows for one in requests]), again=True)

    def withdraw(self, request: Request) -> None:
        """Remove a queued request whose caller left."""
        queue = self.suspects.queue if self.suspects.has_queued(request) else self.queue
        queue.cancel(request)

    def waiting(self) -> list[Request]:
        """Return all queued requests, in no particular order. O(n)."""
        return self.queue.waiting() + self.suspects.queue.waiting()

    def take_all(self) -> list[Request]:
        """Empty the queues."""
        return self.queue.take_all() + self.suspects.queue.take_all()

    def slack_s(self, request: Request, rows: int, now_s: float) -> float:
        """Return how long `rows` rows of a request may still wait and meet its deadline alone."""
        return request.deadline_s - self.admission.run_s(rows, request.row_shapes) - now_s

    # Out

    def next(self, now_s: float, *, running: bool, free_s: float) -> Dispatch | WaitUntil | None:
        """Decide what an engine with a free slot does now: see `policy.decide`.

        `running`: whether it is busy, until `free_s` as far as is known.
        """
        queue, now = self.queue, self._now
        if self.suspects.queue.rows:
            apart = self._next_suspects(now_s, running, free_s)
            if apart is not None:
                return apart
        now.time_s = now_s
        now.running = running
        now.free_s = free_s
        now.draining = self.draining
        if self._max_delay_s or queue.deadlines:
            self._look_ahead(now)
        else:
            now.overloaded = False
        answer = decide(queue, now, self._max_delay_s)
        if answer is None or isinstance(answer, WaitUntil):
            return answer
        reason = RETRY if answer.group.again else answer.reason
        return self._form(queue, answer.group, reason, max(now_s, free_s))

    def _next_suspects(self, now_s: float, running: bool, free_s: float) -> Dispatch | WaitUntil | None:
        """Decide about the requests of suspects; None: the others are next.

        They are not packed ahead, unless others are, who would always be ahead of them.
        """
        queue, suspects = self.queue, self.suspects
        if running and queue.full_group is None:
            return None
        part = self._suspect_part(now_s)
        due_s = suspects.due_s(part)
        if part < 1 and now_s < due_s:
            if queue.rows:
                return None
            if not self.draining:
                return WaitUntil(min(due_s, self._formed_s + OTHERS_S))
        return self._form(suspects.queue, suspects.queue.next_group, SUSPECT, max(now_s, free_s))

    def _suspect_part(self, now_s: float) -> float:
        """Return the part of the engines' time that suspects get, as far as is known now."""
        if self.queue.rows:
            return SUSPECT_PART / 2
        # The last batches before a source became suspect may be its own.
        others = self.suspects.grown_s < self._formed_s and now_s < self._formed_s + OTHERS_S
        return SUSPECT_PART if others else 1.0

    def _look_ahead(self, now: Now) -> None:
        """Add the predictions that a delay or a deadline asks for."""
        queue, missed = self.queue, self.counters.missed_deadlines
        now.overloaded = queue.deadlines > 0 and (self._overloaded or missed != self._missed)
        if queue.rows:
            run_times = self.shape_times.of(queue.next_group.row_shapes)
            # With a margin for late timers: when only the run is left, a request is removed.
            now.run_s = run_times.planned_s(min(queue.rows, queue.full_rows)) + LEAD_S
        if self._max_delay_s:
            now.rows_per_s = self._rate.per_s(now.time_s, self.counters.accepted)

    def _form(self, queue: RequestQueue, group: Group, reason: str, start_s: float) -> Dispatch:
        """Form a batch of the group that would start at `start_s`."""
        most_rows, plan = queue.full_rows, None
        if self.run_times.spacing_s:
            self._peak_rows = max(self.queue.rows, self._peak_rows * (1 - PEAK_DECAY))
        if queue.deadlines:
            missed = self.counters.missed_deadlines
            self._overloaded = missed != self._missed
            self._missed = missed
            plan = StartPlan(start_s, self.shape_times.of(group.row_shapes), self._overloaded)
        if (self._overloaded or self._backlogged >= BACKLOG) and self._latency_target_s == inf:
            most_rows = self.run_times.overloaded_rows
        most_rows = min(most_rows, group.most_rows)
        formed = queue.take_plain(group, most_rows)
        if formed is None:
            formed = form(queue, group, most_rows, plan, was_short=self._was_short)
        self._was_short = formed.was_short
        requests = formed.requests
        if requests and queue is self.queue:
            backlog = queue.rows >= BACKLOG * queue.full_rows and not queue.contended
            self._backlogged = self._backlogged + 1 if backlog else 0
            if not (self.suspects.marks and self.suspects.holds(requests[0])):
                self._formed_s = start_s
            lone = self._short_runs and plan is None and len(requests) == 1 and not queue.rows
            self._lone_batches = self._lone_batches + 1 if lone else 0
            self.lone = self._lone_batches >= LONE_BATCHES
            self._now.expected_rows = 0
            if self._long_runs:
                self._closed_loop.on_formed(requests)
        elif requests:
            rows = sum(formed.shares.values())
            end_s = start_s + self.shape_times.of(group.row_shapes).expected_s(rows)
            self.suspects.pace(start_s, end_s, self.admission.engines)  # corrected when it has ended
        if formed.capped and queue is self.queue:
            reason = DEADLINE
        return Dispatch(requests, reason, formed.shares, formed.late)

    # After a run

    def on_ended(self, batch: Batch, noticed_s: float, *, idle: bool) -> None:
        """Learn from a run that was noticed then: its clients may soon be back, and its tenants are charged
        for the measured time. `idle`: no other batch is with the engine."""
        if self._long_runs and self.admission.engines == 1 and batch.reason != SUSPECT:
            # With several engines some clients come back while others run: there is nothing to wait for.
            self._closed_loop.on_ended(noticed_s, batch)
        waits = idle and (self._long_runs or self.run_times.spacing_s) and not self._max_delay_s
        if waits and self.admission.engines == 1 and batch.reason != SUSPECT:
            self._expect_rows(noticed_s, batch.started_s)
        if self.queue.shares.several or batch.reason == SUSPECT:
            self.charge(batch, noticed_s)
        if self.suspects.marks:
            self.suspects.on_ran(batch, noticed_s)
        run_s = batch.finished_s - batch.started_s
        if self.shape_times.observe(batch.row_shapes, batch.rows, run_s, batch.finished_s):
            self.learn()

    def charge(self, batch: Batch, now_s: float) -> None:
        """Charge the tenants of a batch that has ended, well or not, for the measured time."""
        queue = self.queue
        if batch.reason == SUSPECT:
            queue = self.suspects.queue
            self.suspects.pace(batch.started_s, now_s, self.admission.engines)
        if queue.shares.several:
            run_s = batch.finished_s - batch.started_s
            queue.shares.settle(batch.shares, run_s / batch.rows - queue.row_s)

    def _expect_rows(self, now_s: float, started_s: float) -> None:
        """Let the idle engine wait for closed-loop clients, or for the spacing since a run that began then.

        In a closed loop no more than all of its clients come, so the wait ends with as many rows as were
        queued at once lately.
        """
        queue, now, returns = self.queue, self._now, None
        if self._long_runs:
            returns = self._closed_loop.expected_returns(queue.rows, queue.full_rows, self.run_times)
        if returns is not None:
            now.expected_rows, wait_s = returns
            now.expected_by_s = now_s + wait_s
        elif self.run_times.spacing_s:
            now.expected_rows = min(queue.full_rows, int(self._peak_rows))
            now.expected_by_s = started_s + self.run_times.spacing_s

    def on_answered(self, batch: Batch, noticed_s: float) -> None:
        """Learn the overhead of a batch whose end was noticed then and whose answers are written: a request
        lies unread for as long as a finished batch lies unnoticed."""
        overhead_s = noticed_s + batch.answered_s - 2 * batch.finished_s
        self.admission.overhead_s += (overhead_s - self.admission.overhead_s) * OVERHEAD_GAIN

    def learn(self) -> None:
        """Apply the learned run times to the queue."""
        full_rows = self.run_times.full_rows
        if self._latency_target_s < inf:
            # While a batch runs the next one gathers: a request waits for one and runs in one.
            full_rows = max(1, self.run_times.most_rows(self._latency_target_s / 2, full_rows))
        self.queue.set_full_rows(full_rows)
        self.queue.row_s = self.suspects.queue.row_s = self.run_times.row_s
        run_s = self.run_times.expected_s(full_rows)
        # A short run is packed ahead all the same: packing takes a larger part of it.
        self._now.uncertain = min(run_s, self.run_times.sure_s(full_rows) - run_s) > LEAD_S
        self.queue.shares.credit_s = CREDIT * self.run_times.mean_s(full_rows)
        self._short_runs = self.run_times.expected_s(1) <= SHORT_RUN_S
        self._long_runs = self.run_times.mean_s(full_rows) >= LONG_RUN_S
