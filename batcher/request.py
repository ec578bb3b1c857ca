"""What is queued (`Request`) and what it rides in (`Batch`)."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from math import inf
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from cobatch.batcher.lane import Lane
    from cobatch.batcher.rows.padding import Pad
    from cobatch.batcher.scheduling.fair_queueing import Share
    from cobatch.batcher.scheduling.queue import Flow
    from cobatch.batcher.scheduling.tenant import Tenant
    from cobatch.engines.base import RowShapes

# One value for each input, in the signature's order: the rows' bytes (C order, little-endian), or
# for a BYTES tensor the list of its elements.
Payload = bytes | bytearray | memoryview | list[bytes]


class Timer(Protocol):
    """What is known here of an event loop's timer: packing and policy know no asyncio."""

    def cancel(self) -> None: ...


class State(IntEnum):
    """A request's life; it only ever moves down this list, and ends in one of the last two."""

    NEW = 0
    QUEUED = 1
    RUNNING = 2
    DONE = 3
    CANCELLED = 4


class Batch:
    """Requests that run together, and after the run what came of it.

    `outputs` are views of the slot's buffers, shape [rows, ...]: valid only inside `Request.done`. `shares`
    are the rows of each tenant. `lane` is where it runs. `memo` is for whoever answers the requests, to do
    once per batch what would else be done once per request (turn a whole output into JSON, say). Times are
    in seconds of the batcher's clock: `gathered_s` when its requests were taken from the queue,
    `dispatched_s` when their rows lay packed and the worker was told (0: packing failed), `started_s` and
    `finished_s` of the run, `answering_s` and `answered_s` when its answers began to be written and were.

    `number` counts the batches of a process from 1; it is 0 where this is one request's alone and stands for
    those in `joined`, in which it or its parts rode. `slot` is where it lay. `failed`: there were no answers
    but errors, or none yet.
    """

    __slots__ = (
        "answered_s",
        "answering_s",
        "dispatched_s",
        "failed",
        "finished_s",
        "gathered_s",
        "joined",
        "lane",
        "memo",
        "number",
        "outputs",
        "reason",
        "requests",
        "row_shapes",
        "rows",
        "shares",
        "slot",
        "started_s",
    )

    def __init__(
        self,
        requests: list[Request],
        rows: int,
        row_shapes: RowShapes,
        reason: str,
        lane: Lane,
        number: int = 0,
        slot: int = 0,
    ) -> None:
        self.requests = requests
        self.lane = lane
        self.rows = rows
        self.row_shapes = row_shapes
        self.reason = reason
        self.shares: dict[Share, int] = {}
        self.gathered_s = 0.0
        self.dispatched_s = 0.0
        self.started_s = 0.0
        self.finished_s = 0.0
        self.answering_s = 0.0
        self.answered_s = 0.0
        self.number = number
        self.slot = slot
        self.failed = False
        self.joined: Sequence[Batch] = ()
        self.outputs: Sequence[np.ndarray[Any, Any]] = ()
        self.memo: dict[Any, Any] = {}


class Request:
    """One caller's rows. Subclass it and define `done`.

    `timeout_s`: it must be answered so long after it was submitted. As soon as it is certain that it cannot
    be, it is refused, or taken out of the queue and told so.
    `callers`: how many it answers, for the counters. `tenant`: for whom, where callers are told apart.
    `priority`: the protocol's, 1 the highest, 0 for the
    default. `partial`: if it is split and only some parts fail, it is answered with zeros in their place,
    and `failures` says which rows those are.

    `done` is called on the event loop exactly once for each accepted request that was not
    cancelled: with `error` set, and `batch` where it has failed in one; or with `batch` and `first_row`
    saying where its rows are.
    A plain callback and not an `asyncio.Future`: a future schedules each of its callbacks through
    the loop again, which on a small model costs as much as the inference.
    """

    flow: Flow | None  # set, like `level`, when it is queued
    level: int

    __slots__ = (
        "batch",
        "callers",
        "deadline_s",
        "enqueued_s",
        "error",
        "expiry",
        "first_row",
        "flow",
        "level",
        "pad",
        "partial",
        "parts",
        "payloads",
        "priority",
        "row_shapes",
        "rows",
        "state",
        "tenant",
        "timeout_s",
    )

    def __init__(self, rows: int, row_shapes: RowShapes, payloads: Sequence[Payload]) -> None:
        self.rows = rows
        self.row_shapes = row_shapes
        self.payloads = payloads
        self.callers = 1
        self.tenant: Tenant | None = None
        self.state = State.NEW
        self.error: Exception | None = None
        self.batch: Batch | None = None
        self.first_row = 0
        self.enqueued_s = 0.0
        self.deadline_s = inf
        self.partial = False
        self.parts: list[Request] | None = None
        self.priority = 0
        self.timeout_s: float | None = None
        self.expiry: Timer | None = None
        self.pad: Pad | None = None  # `row_shapes` are its bucket's then

    def done(self) -> None:
        """Give the caller its answer. Must not raise; what it raises is logged and dropped."""
        raise NotImplementedError

    @property
    def failures(self) -> list[tuple[int, int, Exception]]:
        """First row, number of rows and error of each part that failed, of a split request."""
        failures = []
        first = 0
        for part in self.parts or ():
            if part.error is not None:
                failures.append((first, part.rows, part.error))
            first += part.rows
        return failures
