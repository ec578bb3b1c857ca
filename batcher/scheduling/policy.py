"""The policy, when a batch leaves: a pure function of the queue, the time and the predictions.

While the engine is idle, waiting only adds latency, so a batch leaves at once, with two exceptions: with
`max_delay_s` it waits until its oldest request has waited that long, a deadline comes first, or no other
request is expected; and it waits for closed-loop clients that are predicted to be back soon
(`batcher.scheduling.arrivals`). While the engine is busy, waiting is free, so the next batch grows until the
engine is done. A full batch gains nothing from waiting: it leaves as soon as a slot is free and is packed
while the engine runs. Where tenants or shapes compete, or deadlines are missed, it is formed as late as that
allows, so that a request that comes meanwhile is not a whole batch too late (deferred batch scheduling:
Symphony, Chen et al., 2023). A batch is full at `full_rows`, the size past which a row gets no cheaper
(`batcher.scheduling.run_times`).
"""

from dataclasses import dataclass

import msgspec

from cobatch.batcher.scheduling.fair_queueing import Group
from cobatch.batcher.scheduling.queue import RequestQueue
from cobatch.batcher.scheduling.tuning import LEAD_S, WORTH_WAITING_ROWS

FULL = "full"  # it has grown as far as growing pays
IDLE = "idle"  # the engine is idle
SHAPE = "shape"  # the other rows in the queue have another shape
DELAY = "delay"  # the oldest request has waited as long as it may for others
DEADLINE = "deadline"  # a deadline leaves no time to wait or to grow
DRAIN = "drain"  # the server stops
RETRY = "retry"  # a part of a batch that failed
SUSPECT = "suspect"  # requests of sources whose rows have failed, apart from others
# For a person: the batch left because ...
REASONS = {
    FULL: "more rows would not have raised throughput",
    IDLE: "the engine was idle",
    SHAPE: "the other queued requests had another shape, or belonged to tenants whose turn was later",
    DELAY: "its oldest request had waited for the longest delay, or the expected requests had come",
    DEADLINE: "a deadline left no time to wait or to grow",
    DRAIN: "the server was stopping",
    RETRY: "it is a part of a failed batch, run again to find the request at fault, "
    "or it was behind a run that hung",
    SUSPECT: "rows of its client have failed: they ride apart from others until they run again, in a "
    "bounded part of the time",
}


@dataclass(slots=True)  # not frozen, which would make it four times as expensive
class Now:
    """The moment of a decision, for an engine with a free slot. Times are seconds of the batcher's clock.

    `running`: whether the engine is busy; `free_s`: when it is expected to be idle. `run_s`: the 95th
    percentile of the next run. `rows_per_s`: the arrival rate, None if unknown. `expected_rows`: with the
    closed-loop clients that are expected back, this many rows are queued by `expected_by_s`; 0 if a wait
    does not pay. `overloaded`: requests miss deadlines for want of engine time. `uncertain`: runs vary by
    more than `LEAD_S`.
    """

    time_s: float
    running: bool
    free_s: float
    run_s: float = 0.0
    rows_per_s: float | None = None
    expected_rows: int = 0
    expected_by_s: float = 0.0
    draining: bool = False
    overloaded: bool = False
    uncertain: bool = False


class Release(msgspec.Struct):
    """Form a batch of this group now."""

    group: Group
    reason: str


class WaitUntil(msgspec.Struct):
    """Send nothing before this time, or before `rows` rows are queued (0: no number is waited for)."""

    time_s: float
    rows: int = 0


def decide(queue: RequestQueue, now: Now, max_delay_s: float = 0.0) -> Release | WaitUntil | None:
    """Decide what to do now. None: wait until a request is queued or a batch ends."""
    if not queue.rows:
        return None
    if now.running:
        return _while_busy(queue, now)
    group = queue.next_group
    if now.draining:
        return Release(group, DRAIN)
    if group.rows >= queue.full_rows:
        return Release(group, FULL)
    if max_delay_s > 0:
        return _after_delay(queue, now, max_delay_s)
    if len(queue.groups) > 1:
        return Release(group, SHAPE)
    return _with_returns(queue, now) if now.expected_rows else Release(group, IDLE)


def _with_returns(queue: RequestQueue, now: Now) -> Release | WaitUntil:
    group = queue.next_group
    due_s = min(now.expected_by_s, queue.extremes.urgent_s - now.run_s)
    if now.time_s >= due_s:
        return Release(group, DELAY if due_s == now.expected_by_s else DEADLINE)
    return Release(group, DELAY) if group.rows >= now.expected_rows else WaitUntil(due_s, now.expected_rows)


def _while_busy(queue: RequestQueue, now: Now) -> Release | WaitUntil | None:
    """Release only when a batch is full. The group whose turn it is goes then, even if another one is full:
    it would wait for ever behind full ones."""
    if queue.full_group is None or (now.overloaded and now.uncertain):
        return None  # until the run ends: behind a long one a batch that is packed now would be late
    competing = queue.contended or len(queue.groups) > 1 or now.overloaded
    if competing and now.time_s < now.free_s - LEAD_S:
        return WaitUntil(now.free_s - LEAD_S)
    group = queue.next_group
    return Release(group, FULL if group.rows >= queue.full_rows else SHAPE)


def _after_delay(queue: RequestQueue, now: Now, max_delay_s: float) -> Release | WaitUntil:
    delay_s = queue.extremes.oldest_s + max_delay_s
    urgent_s = queue.extremes.urgent_s - now.run_s
    due_s = min(delay_s, urgent_s)
    if now.time_s >= due_s:
        return Release(queue.next_group, DELAY if delay_s <= urgent_s else DEADLINE)
    full = queue.full_group
    if full is not None:
        return Release(full, FULL)
    if now.rows_per_s is not None and now.rows_per_s * (due_s - now.time_s) < WORTH_WAITING_ROWS:
        return Release(queue.next_group, IDLE)
    return WaitUntil(due_s)
