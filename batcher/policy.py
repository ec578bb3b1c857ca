"""When a batch leaves: a pure function of what is queued, the clock and the limits.

The theory in four lines. While the engine is idle, waiting can only add latency, so whatever is
there leaves at once (unless `max_delay_s` asks for a wait, which runs from the oldest request).
While the engine is busy, waiting is free, so the next batch grows until the engine is done. A full
batch gains nothing from waiting, so it leaves as soon as a slot is free and lies ready when the
engine finishes. What is full is `Limits.full_rows`: the size past which a row no longer gets cheaper
(see `batcher.cost`), at most the largest batch the engine takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

FULL = "full"
IDLE = "idle"
DELAY = "delay"
DRAIN = "drain"
RETRY = "retry"


class GroupView(Protocol):
    """What the policy sees of a group: rows that may share a batch."""

    @property
    def rows(self) -> int: ...

    @property
    def oldest_s(self) -> float: ...


G = TypeVar("G", bound=GroupView)


@dataclass(frozen=True, slots=True)
class Limits:
    """`full_rows` and `max_delay_s` decide; `slots` is how many batches the engine holds at once."""

    full_rows: int
    max_delay_s: float
    slots: int


@dataclass(frozen=True, slots=True)
class Dispatch(Generic[G]):
    """Send a batch of this group now."""

    group: G
    reason: str


@dataclass(frozen=True, slots=True)
class WaitUntil:
    """Nothing to send before this time, unless something changes."""

    time_s: float


def decide(
    groups: Iterable[G], now_s: float, in_slots: int, running: int, draining: bool, limits: Limits
) -> Dispatch[G] | WaitUntil | None:
    """What to do now.

    `running` batches are with the engine, `in_slots` (>= running) occupy its slots: a batch whose
    answers are being handed out still holds its slot. None: wait until something is queued or done.
    """
    if in_slots >= limits.slots:
        return None
    oldest: G | None = None
    oldest_full: G | None = None
    for group in groups:
        if oldest is None or group.oldest_s < oldest.oldest_s:
            oldest = group
        if group.rows >= limits.full_rows and (oldest_full is None or group.oldest_s < oldest_full.oldest_s):
            oldest_full = group
    if oldest is None:
        return None
    if running:
        return None if oldest_full is None else Dispatch(oldest_full, FULL)
    # Idle. A group whose delay is over goes before a full one that came later: it waited longest.
    due_s = oldest.oldest_s + limits.max_delay_s
    if draining:
        return Dispatch(oldest, DRAIN)
    if now_s >= due_s:
        full = oldest.rows >= limits.full_rows
        return Dispatch(oldest, FULL if full else DELAY if limits.max_delay_s > 0 else IDLE)
    return WaitUntil(due_s) if oldest_full is None else Dispatch(oldest_full, FULL)
