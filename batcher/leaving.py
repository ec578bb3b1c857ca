"""How requests leave without having run: cancelled, expired, too late. And how large ones are cut and joined.

Each way out leaves queue, tenant and counters as they should be, and tells the caller exactly once, or not at
all where it was he who left.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from cobatch.batcher.completion import Answers
from cobatch.batcher.errors import ExpiredError
from cobatch.batcher.request import Request, State
from cobatch.batcher.rows.splitting import Part, cut, join, let_go
from cobatch.batcher.scheduling.admission import Admission
from cobatch.batcher.scheduling.queue import RequestQueue
from cobatch.batcher.statistics import Counters

# Sums of times are not exact.
_ROUNDING_S = 1e-6


class Leaving:
    """Of one model. `on_left` is called when something has left the queue."""

    def __init__(
        self,
        queue: RequestQueue,
        admission: Admission,
        answers: Answers,
        counters: Counters,
        loop: asyncio.AbstractEventLoop,
        clock: Callable[[], float],
        *,
        max_batch_size: int,
        on_left: Callable[[], None],
    ) -> None:
        self._queue = queue
        self._admission = admission
        self._answers = answers
        self._counters = counters
        self._loop = loop
        self._clock = clock
        self._max_batch_size = max_batch_size
        self._on_left = on_left

    def cancel(self, request: Request) -> None:
        """The caller does not want the answer any more. Harmless when it is already finished."""
        if request.state not in (State.QUEUED, State.RUNNING):
            return
        self._counters.cancelled += request.callers
        if request.tenant is not None:
            request.tenant.open_requests -= request.callers
        if request.expiry is not None:
            request.expiry.cancel()
        self._withdraw(request)
        if request.parts is not None:
            let_go(request.parts)
        self._on_left()

    def watch(self, request: Request, now_s: float) -> None:
        """See to it that it leaves the queue as soon as it cannot be answered in time any more."""
        slack_s = self._slack_s(request, request.rows, now_s)
        request.expiry = self._loop.call_later(slack_s, self._expire, request)

    def _slack_s(self, request: Request, rows: int, now_s: float) -> float:
        """How long so many rows of a request may still wait. Where some may be missing from its answer, it
        is worth it as long as one batch of them can be run."""
        if request.partial:
            rows = min(rows, self._max_batch_size)
        return request.deadline_s - self._admission.run_s(rows, request.row_shapes) - now_s

    def _expire(self, request: Request) -> None:
        """Its time is over: out of the queue. What already runs is answered, late or not."""
        parts = request.parts or [request]
        queued = [part for part in parts if part.state is State.QUEUED]
        if request.state is not State.QUEUED or not queued:
            return
        slack_s = self._slack_s(request, sum([part.rows for part in queued]), self._clock())
        if slack_s > _ROUNDING_S:
            # Parts have left the queue since this was planned, or runs have become faster.
            request.expiry = self._loop.call_later(slack_s, self._expire, request)
            return
        assert request.timeout_s is not None
        error = ExpiredError(request.timeout_s)
        if request.partial and len(queued) < len(parts):
            for part in queued:
                self._queue.cancel(part)
                self._answers.fail(part, error)
        else:
            self._counters.expired += request.callers
            self._withdraw(request)
            self._answers.fail(request, error)
        self._on_left()

    def _withdraw(self, request: Request) -> None:
        if request.parts is not None:
            for part in request.parts:
                if part.state in (State.QUEUED, State.RUNNING):
                    self._withdraw(part)
        elif request.state is State.QUEUED:
            self._queue.cancel(request)
        # Running rows cannot be taken out of the batch; `_hand_out` passes over them.
        request.state = State.CANCELLED

    def fail_late(self, request: Request) -> None:
        """It is not queued any more, because it cannot be in time."""
        assert request.timeout_s is not None
        if not isinstance(request, Part):
            self._counters.expired += request.callers
        self._answers.fail(request, ExpiredError(request.timeout_s))

    def cut(self, request: Request) -> list[Part]:
        """In parts that fit a batch each; when all are done, so is it."""
        unanswered = math.ceil(request.rows / self._max_batch_size)
        expired = False

        def part_done(part: Part) -> None:
            nonlocal unanswered, expired
            unanswered -= 1
            if request.state in (State.DONE, State.CANCELLED):
                return
            if not expired and isinstance(part.error, ExpiredError):
                expired = True
                self._counters.expired += request.callers
            if part.error is not None and not request.partial:
                self._withdraw(request)
                request.batch = part.batch  # where it failed, if it had come so far
                self._answers.fail(request, part.error)
            elif unanswered == 0:
                self._join(request, parts)

        parts = cut(request, self._max_batch_size, part_done)
        return parts

    def _join(self, request: Request, parts: list[Part]) -> None:
        first_error = next((part.error for part in parts if part.error is not None), None)
        if first_error is not None and all(part.error is not None for part in parts):
            self._answers.fail(request, first_error)
            return
        try:
            join(request, parts)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller must hear of it
            self._answers.fail_run(request, f"its parts cannot be put together: {error!r}")
        else:
            self._answers.finish(request)
            batch = request.batch
            assert batch is not None
            # As in the dispatcher: whoever keeps the batch must not keep the outputs.
            batch.outputs = ()
            batch.memo = {}
