"""One call of a batched function: its way through the batcher, and where its time went."""

from __future__ import annotations

from asyncio import AbstractEventLoop, Future, InvalidStateError
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from cobatch.batcher.bundle import Bundle
from cobatch.batcher.request import Batch, Request, Timer
from cobatch.batcher.scheduling.policy import REASONS

R = TypeVar("R")


class Pending:
    """The plain calls of one iteration of the event loop: their items, and the futures of their results.

    `left`: those that were cancelled since, of which `leave` is told; `requests` they are once they are
    queued.
    """

    __slots__ = ("futures", "items", "leave", "left", "loop", "requests")

    def __init__(self, loop: AbstractEventLoop, leave: Callable[[Pending], None]) -> None:
        self.loop = loop
        self.leave = leave
        self.items: list[Any] = []
        self.futures: list[Future[Any]] = []
        self.left = 0
        self.requests: list[Call | Gathered] = []

    def take(self) -> tuple[list[Any], list[Future[Any]]]:
        """Return the calls and forget them. None has `left`: a cancelled task runs later than this."""
        items, futures = self.items, self.futures
        self.items, self.futures = [], []
        return items, futures


class Call(Request):
    """A request of one row, an object that is not copied. `timer` ends it at its timeout, also if it runs."""

    __slots__ = ("future", "item", "timer")

    def __init__(self, item: Any, future: Future[Any]) -> None:
        Request.__init__(self, 1, (), ())
        self.item = item
        self.future = future
        self.timer: Timer | None = None

    @property
    def items(self) -> list[Any]:
        """The item."""
        return [self.item]

    @property
    def futures(self) -> list[Future[Any]]:
        """The future of its result."""
        return [self.future]

    def done(self) -> None:
        finish(self, self.futures)


class Gathered(Bundle):
    """Plain calls of one iteration as one request: to queue each would cost as much as all the rest."""

    __slots__ = ("futures", "items", "pending")

    def __init__(self, items: list[Any], futures: list[Future[Any]], pending: Pending) -> None:
        Request.__init__(self, len(items), (), ())
        self.callers = len(items)
        self.items = items
        self.futures = futures
        self.pending = pending

    def separate(self) -> list[Request]:
        pairs = zip(self.items, self.drop(), strict=True)
        calls = [Call(item, future) for item, future in pairs if not future.done()]
        self.pending.requests += calls
        return list(calls)

    def drop(self) -> list[Future[Any]]:
        """Return the futures and forget them: their exceptions refer to the pending calls, and so to this."""
        futures, self.futures = self.futures, []
        self.pending.requests.remove(self)
        return futures

    def done(self) -> None:
        finish(self, self.drop())


def finish(request: Request, futures: list[Future[Any]]) -> None:
    """Give each caller of a request its result or the error. One that is cancelled is about to say so."""
    error = request.error
    if error is not None:
        for future in futures:
            if not future.done():
                future.set_exception(error)
        return
    assert request.batch is not None
    results = request.batch.outputs[0][request.first_row : request.first_row + request.rows]
    answered = map(Future.set_result, futures, results.tolist())
    while True:
        try:
            any(answered)  # a loop in C over all: none returns anything
            return
        except InvalidStateError:
            continue  # with the next one: this is cancelled


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
