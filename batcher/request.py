"""The data that the batcher passes around: `Request`, `Batch`, and how a request is padded (`Pad`)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from math import inf
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np

from cobatch.batcher.tenant import Tenant
from cobatch.engines.base import RowShapes

# The rows of one input: bytes (C order, little-endian), or for a BYTES tensor the list of its elements.
Payload = bytes | bytearray | memoryview | list[bytes]
Index = tuple[slice, ...]


class Timer(Protocol):
    """The part of an event loop's timer that is used on a request."""

    def cancel(self) -> None: ...


class State(IntEnum):
    """The state of a request. It moves down this list and ends in one of the last two; a request whose batch
    failed goes back from RUNNING to QUEUED."""

    NEW = 0
    QUEUED = 1
    RUNNING = 2
    DONE = 3
    CANCELLED = 4


class InputPad(NamedTuple):
    """The padding of one input of a request.

    `row_shape` is the request's own. `body` selects its elements in rows of the bucket's shape; `rest` are
    disjoint boxes with the other elements, which become `value`. Where a row is its elements and then a
    little padding, `tail` is that padding as bytes.
    """

    row_shape: tuple[int, ...]
    body: Index
    rest: tuple[Index, ...]
    value: Any
    tail: bytes | None


class OutputCut(NamedTuple):
    """The part of an output's rows to keep; `follows` are (axis, size) that the output must have before."""

    body: Index
    follows: tuple[tuple[int, int], ...]


class Pad(NamedTuple):
    """The padding of requests of one shape to `row_shapes`, and the cuts of outputs (None: unchanged).

    `row_padding`: elements of padding in a row, over all inputs.
    """

    row_shapes: RowShapes
    inputs: tuple[InputPad | None, ...]
    outputs: tuple[OutputCut | None, ...]
    row_padding: int


class Batch(msgspec.Struct, eq=False):
    """Requests that run together, and the result of the run.

    `outputs` are views of the slot's buffers, shape [rows, ...]: valid only inside `Request.done`, unless the
    engine made them for this batch (`lasting`). `shares`
    are the rows of each tenant (None: the requests without one). `engine` and `slot` say where it runs.
    `memo` lets encoders do work once per batch instead of once per request.

    Times are in seconds of the batcher's clock: `gathered_s` when its requests left the queue,
    `dispatched_s` when the worker got the packed rows (0: packing failed), `started_s` and `finished_s` of
    the run, `answering_s` and `answered_s` before and after its answers were written.

    `number` counts the batches of a process from 1. It is 0 for a batch made for one request from those in
    `joined`. `failed`: no answers but errors, or none yet.
    """

    requests: list[Request]
    rows: int
    row_shapes: RowShapes
    reason: str
    engine: int = 0
    number: int = 0
    slot: int = 0
    shares: dict[Tenant | None, int] = msgspec.field(default_factory=dict)
    gathered_s: float = 0.0
    dispatched_s: float = 0.0
    started_s: float = 0.0
    finished_s: float = 0.0
    answering_s: float = 0.0
    answered_s: float = 0.0
    failed: bool = False
    joined: Sequence[Batch] = ()
    outputs: Sequence[np.ndarray[Any, Any]] = ()
    lasting: bool = False
    memo: dict[Any, Any] = msgspec.field(default_factory=dict)

    __repr__ = object.__repr__

    def unanswered(self) -> list[Request]:
        """Return the requests that are not answered, cancelled or queued again."""
        return [request for request in self.requests if request.state is State.RUNNING]

    def note_failed(self, requests: list[Request]) -> None:
        """Note that it failed, and that these requests were in it."""
        self.failed = True
        for request in requests:
            request.batch = self

    def for_one(self, joined: Sequence[Batch]) -> Batch:
        """Return a batch for one of its requests, with the same times, to hold that request's own outputs."""
        own = Batch([], self.rows, self.row_shapes, self.reason, self.engine)
        own.gathered_s, own.dispatched_s = self.gathered_s, self.dispatched_s
        own.started_s, own.finished_s = self.started_s, self.finished_s
        own.joined = joined
        own.lasting = self.lasting
        return own


@dataclass(slots=True, eq=False, repr=False)
class Request:
    """Rows of one caller. Subclass it and define `done`.

    `timeout_s`: seconds from `submit` within which it must be answered; as soon as that cannot be met, it is
    refused or removed from the queue. `deadline_s` is when its run must end, in the batcher's time.
    `callers`: the number of callers that it answers, for the counters. `priority`: the V2 protocol's, 1 is
    the highest, 0 the default; `level` is derived from it. `partial`: if it is split and some parts fail, it
    is answered with zeros in their place, and `failures` lists those rows. `entry` belongs to the queue.

    `done` is called on the event loop exactly once for each accepted request that was not cancelled: with
    `error` set (and `batch`, if it failed in one), or with `batch` and `first_row`, where its rows begin.
    It is a plain callback because a future schedules each of its callbacks through the loop again, which
    costs as much as the inference of a small model.
    """

    rows: int
    row_shapes: RowShapes
    payloads: Sequence[Payload]
    callers: int = 1
    tenant: Tenant | None = None
    state: State = State.NEW
    error: Exception | None = None
    batch: Batch | None = None
    first_row: int = 0
    enqueued_s: float = 0.0
    deadline_s: float = inf
    partial: bool = False
    parts: list[Request] | None = None
    priority: int = 0
    timeout_s: float | None = None
    expiry: Timer | None = None
    pad: Pad | None = None  # if set, `row_shapes` are its bucket's
    level: int = 0
    entry: object = None

    def done(self) -> None:
        """Deliver the answer. Must not raise; an exception is logged and dropped."""
        raise NotImplementedError

    @property
    def source(self) -> Hashable:
        """The tenant, or the connection of an anonymous caller; None if unknown."""
        return self.tenant

    @property
    def entrants(self) -> int:
        """The callers that its tenant's account counts: none for a step of a call that it has counted."""
        return self.callers

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
