"""When a batch leaves: a pure function of what is queued, the clock and the limits.

The theory in five lines. While the engine is idle, waiting can only add latency, so whatever is there
leaves at once (unless `max_delay_s` asks for a wait, which runs from the oldest request, and ends where a
deadline does or where nobody else is to be expected; or unless those who have just been answered are known
to be back in no time, see `batcher.scheduling.arrivals`). While the engine is busy, waiting is free, so the
next batch grows until the engine is done. A full batch gains nothing from waiting, so it leaves as soon as a
slot is free and lies ready when the engine finishes; but where tenants or shapes compete, or deadlines are
missed, it is made up as late as that allows, so that whoever comes meanwhile is not a whole batch too late
and those in it are as fresh as can be (Symphony, Chen et al., 2023, defers a batch for as long as that costs
nothing). What is full is `full_rows`: the size past which a row no longer gets cheaper (see
`batcher.scheduling.run_times`), at most the largest batch the engine takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

FULL = "full"  # it has grown as far as growing pays
IDLE = "idle"  # the engine is idle
SHAPE = "shape"  # what else waits has another shape
DELAY = "delay"  # the oldest request has waited as long as it may for company
DEADLINE = "deadline"  # a deadline leaves no time to wait or to grow
DRAIN = "drain"  # the server stops
RETRY = "retry"  # a part of a batch that failed

# Before the running batch is expected to end, a full one is packed so early: what that takes, and what
# timers are late by.
LEAD_S = 0.002


class GroupView(Protocol):
    """What the policy sees of a group: rows that may share a batch."""

    @property
    def rows(self) -> int: ...


G_co = TypeVar("G_co", bound=GroupView, covariant=True)


class QueueView(Protocol[G_co]):
    """What the policy sees of the queue. `oldest_s`, `next_group`: only where there are rows."""

    @property
    def rows(self) -> int: ...

    @property
    def full_rows(self) -> int: ...

    @property
    def contended(self) -> bool: ...

    @property
    def next_group(self) -> G_co: ...

    @property
    def full_group(self) -> G_co | None: ...

    @property
    def oldest_s(self) -> float: ...

    @property
    def urgent_s(self) -> float: ...

    @property
    def shapes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_delay_s` may be spent waiting for company; `slots` is how many batches the engine holds."""

    max_delay_s: float
    slots: int


@dataclass(slots=True)  # not frozen: that makes it four times as dear
class Now:
    """The moment of a decision. Times are seconds of the batcher's clock.

    `running` batches are with the engine, `in_slots` (>= running) occupy its slots: a batch whose answers
    are being handed out still holds its slot. `free_s`: when the engine is expected to be idle.
    `run_s`: how long the next batch hardly ever takes. `rows_per_s`: how many rows arrive, None where that
    is not known yet. `expected_rows`: those who have just been answered are expected to be back, so that so
    many rows are there, by `expected_by_s`; 0 where it does not pay to wait for them. `overloaded`:
    requests miss deadlines for want of engine time.
    """

    time_s: float
    in_slots: int
    running: int
    free_s: float
    run_s: float = 0.0
    rows_per_s: float | None = None
    expected_rows: int = 0
    expected_by_s: float = 0.0
    draining: bool = False
    overloaded: bool = False


@dataclass(slots=True)
class Dispatch(Generic[G_co]):
    """Send a batch of this group now."""

    group: G_co
    reason: str


@dataclass(frozen=True, slots=True)
class WaitUntil:
    """Nothing to send before this time, unless something changes."""

    time_s: float


def decide(queue: QueueView[G_co], now: Now, limits: Limits) -> Dispatch[G_co] | WaitUntil | None:
    """What to do now. None: wait until something is queued or done."""
    if now.in_slots >= limits.slots or not queue.rows:
        return None
    if now.running:
        return _while_busy(queue, now)
    group = queue.next_group
    if now.draining:
        return Dispatch(group, DRAIN)
    if group.rows >= queue.full_rows:
        return Dispatch(group, FULL)
    if limits.max_delay_s > 0:
        return _after_a_wait(queue, now, limits.max_delay_s)
    if queue.shapes > 1:
        return Dispatch(group, SHAPE)
    return _wait_for_returns(queue, now) if now.expected_rows else Dispatch(group, IDLE)


def _wait_for_returns(queue: QueueView[G_co], now: Now) -> Dispatch[G_co] | WaitUntil:
    """The engine has just become idle, and those who were answered will be back."""
    group = queue.next_group
    due_s = min(now.expected_by_s, queue.urgent_s - now.run_s)
    if now.time_s >= due_s:
        return Dispatch(group, DELAY if due_s == now.expected_by_s else DEADLINE)
    return Dispatch(group, DELAY) if group.rows >= now.expected_rows else WaitUntil(due_s)


def _while_busy(queue: QueueView[G_co], now: Now) -> Dispatch[G_co] | WaitUntil | None:
    """Nothing leaves unless a batch is full. Where tenants or shapes compete, or requests are lost, one
    leaves when it is about to be run, and whose turn it is goes even if it has not filled a batch: always
    behind full ones, it would wait for ever."""
    if queue.full_group is None:
        return None
    if (queue.contended or queue.shapes > 1 or now.overloaded) and now.time_s < now.free_s - LEAD_S:
        return WaitUntil(now.free_s - LEAD_S)
    group = queue.next_group
    return Dispatch(group, FULL if group.rows >= queue.full_rows else SHAPE)


def _after_a_wait(queue: QueueView[G_co], now: Now, max_delay_s: float) -> Dispatch[G_co] | WaitUntil:
    delay_s = queue.oldest_s + max_delay_s
    urgent_s = queue.urgent_s - now.run_s
    due_s = min(delay_s, urgent_s)
    if now.time_s >= due_s:
        return Dispatch(queue.next_group, DELAY if delay_s <= urgent_s else DEADLINE)
    full = queue.full_group
    if full is not None:
        return Dispatch(full, FULL)
    if now.rows_per_s is not None and now.rows_per_s * (due_s - now.time_s) < 0.5:
        # Nobody is expected in the time that is left.
        return Dispatch(queue.next_group, IDLE)
    return WaitUntil(due_s)
