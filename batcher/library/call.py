"""One call of a batched function: its way through the batcher, and where its time went."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.request import Batch, Request, Timer
from cobatch.batcher.scheduling.policy import REASONS

R = TypeVar("R")


class Call(Request):
    """A request of one row, an object that is not copied. `timer` ends it at its timeout, also if it runs."""

    __slots__ = ("batcher", "future", "item", "timer")

    def __init__(self, item: Any, future: asyncio.Future[Any], batcher: Batcher) -> None:
        Request.__init__(self, 1, (), ())
        self.batcher = batcher
        self.item = item
        self.future = future
        self.timer: Timer | None = None

    def done(self) -> None:
        future = self.future
        if future.done():
            return  # its task is cancelled, and about to say so
        if self.error is not None:
            future.set_exception(self.error)
            return
        assert self.batch is not None
        results = self.batch.outputs[0]
        result = results[self.first_row]
        # An array that the function returned may be in use by it again, and is as large as the batch.
        future.set_result(result if results.dtype.hasobject else result.copy())


@dataclass(frozen=True)
class Explanation(Generic[R]):
    """The answer to one call, and where its time went; its text says so in words.

    `error`: the exception, if it failed. `batch` is the number of its batch in this process (0: it ran in
    none), `batch_size` its items, `reason` the word for why it left then. Times are in seconds: in the queue,
    in wait for a worker, of the run, and until the caller had its answer.
    """

    value: R | None
    error: Exception | None
    batch: int
    batch_size: int
    reason: str
    queue_s: float
    wait_s: float
    run_s: float
    answer_s: float

    @property
    def result(self) -> R:
        """The result. Raises the call's exception if it failed."""
        if self.error is not None:
            raise self.error
        return cast("R", self.value)

    @property
    def total_s(self) -> float:
        """The time from the call to its answer."""
        return self.queue_s + self.wait_s + self.run_s + self.answer_s

    def __str__(self) -> str:
        failed = "" if self.error is None else f" and failed with {type(self.error).__name__}: {self.error}"
        took = f"It took {self.total_s * 1e3:.2f} ms{failed}"
        if not self.batch:
            return f"{took}. It ran in no batch."
        stages = f"queue {self.queue_s * 1e3:.2f}, wait for a worker {self.wait_s * 1e3:.2f}, "
        stages += f"run {self.run_s * 1e3:.2f}, answer {self.answer_s * 1e3:.2f} (ms)"
        items = "1 item" if self.batch_size == 1 else f"{self.batch_size} items"
        why = REASONS.get(self.reason, self.reason)
        return f"{took}: {stages}. It ran in batch {self.batch} of {items}, which left because {why}."


def explained(value: Any, error: Exception | None, call: Call | None, now_s: float) -> Explanation[Any]:
    """Return the explanation of a call that has ended; None: it was refused."""
    if call is None or call.batch is None:
        queue_s = 0.0 if call is None else now_s - call.enqueued_s
        return Explanation(value, error, 0, 0, "", queue_s, 0.0, 0.0, 0.0)
    batch: Batch = call.batch
    return Explanation(
        value,
        error,
        batch.number,
        batch.rows,
        batch.reason,
        batch.gathered_s - call.enqueued_s,
        batch.started_s - batch.gathered_s,
        batch.finished_s - batch.started_s,
        now_s - batch.finished_s,
    )
