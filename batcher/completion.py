"""Completion: every accepted request ends exactly once: answered, failed, cancelled or expired.

Each end leaves queue, tenant and counters consistent, and tells the caller once, or never if it cancelled.
Requests larger than a batch are cut here and joined again.
"""

import asyncio
import logging
import math
import secrets
from collections.abc import Callable
from functools import partial

from cobatch.batcher.errors import (
    BatchFailedError,
    EngineGoneError,
    EngineRestartingError,
    ExpiredError,
    InputRejectedError,
)
from cobatch.batcher.request import Batch, Pad, Request, State
from cobatch.batcher.rows.copying import Array
from cobatch.batcher.rows.padding import cut_back
from cobatch.batcher.rows.splitting import Part, cut, join, joint, pieces, release
from cobatch.batcher.scheduling.scheduler import Scheduler

log = logging.getLogger("cobatch.batcher")

# Of an answer that is joined on the event loop's thread. Memory that is new to the process costs 0.15 ms a
# megabyte, and on a virtual machine that has given it back to its host up to 3 ms.
_JOINED_BYTES = 1 << 20
# Sums of times are not exact.
_ROUNDING_S = 1e-6


class Completion:
    """Ends the requests of one model. `clock` and `loop` are the batcher's.

    `joining`: the requests whose parts have all run and are put together in a thread; `on_joined` is called
    when one has ended.
    """

    def __init__(
        self,
        model: str,
        scheduler: Scheduler,
        clock: Callable[[], float],
        loop: asyncio.AbstractEventLoop,
        on_joined: Callable[[], None],
    ) -> None:
        self.joining: set[Request] = set()
        self._loop = loop
        self._on_joined = on_joined
        self._model = model
        self._scheduler = scheduler
        self._counters = scheduler.counters
        self._clock = clock
        self._max_batch_size = scheduler.max_batch_size

    # Answers

    def answer(self, batch: Batch) -> None:
        """Give each request of a batch that ran its rows."""
        finish, running, done = self._finish, State.RUNNING, State.DONE
        for request in batch.requests:
            if request.state is running:  # else it was cancelled
                request.state = done
                request.batch = batch
                if request.pad is None:
                    finish(request)
                else:
                    self._answer_cut(request, request.pad)
        batch.outputs, batch.memo = (), {}  # no longer valid

    def _answer_cut(self, request: Request, pad: Pad) -> None:
        """Answer a padded request: its outputs are cut back to its own length."""
        try:
            own = cut_back(request, pad)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller must hear of it
            self.fail_run(request, f"its outputs cannot be cut back: {error!r}")
        else:
            self._finish(request)
            if own is not None:
                own.outputs, own.memo = (), {}

    def _finish(self, request: Request) -> None:
        """Tell the caller; the state is DONE, and rows or error are set."""
        if request.expiry is not None:
            request.expiry.cancel()
        if request.tenant is not None and not isinstance(request, Part):
            tenant, callers = request.tenant, request.entrants
            tenant.open_requests -= callers
            if request.error is None:
                tenant.usage.answered += callers
            else:
                tenant.usage.failed += callers
        try:
            request.done()
        except Exception:
            # One caller's error must not cost the others in its batch their answers.
            log.exception("model %s: handing an answer to its caller failed", self._model)
        if request.parts is not None:
            release(request.parts)

    # Failures

    def fail(self, request: Request, error: Exception) -> None:
        """Tell the caller that there are no rows."""
        request.state = State.DONE
        request.error = error
        if not isinstance(request, Part):
            self._counters.failed += request.callers
        self._counters.failed_s += self._clock() - request.enqueued_s
        self._finish(request)

    def fail_all(self, requests: list[Request], error: Exception) -> None:
        """Fail the requests among these that were sent and not answered."""
        for request in requests:
            if request.state is State.RUNNING:
                self.fail(request, error)

    def fail_run(self, request: Request, why: str, *, rejected: bool = False) -> None:
        """Fail a request whose run failed; `rejected`: because of its rows.

        The caller gets a reference, logged beside `why`.
        """
        reference = secrets.token_hex(8)
        whose = "" if request.tenant is None else f" of tenant {request.tenant.name}"
        if rejected:
            log.warning(
                "model %s: rows%s were refused (reference %s): %s", self._model, whose, reference, why
            )
            self.fail(request, InputRejectedError(self._model, reference))
        else:
            log.error("model %s: a run%s failed (reference %s): %s", self._model, whose, reference, why)
            self.fail(request, BatchFailedError(self._model, reference))

    def fail_late(self, request: Request) -> None:
        """Fail a request that left the queue because it would miss its deadline."""
        assert request.timeout_s is not None
        if not isinstance(request, Part):
            self._counters.expired += request.callers
        self.fail(request, ExpiredError(request.timeout_s))

    def engine_gone(self, why: str) -> EngineGoneError:
        """Return the error for all requests from now on; its reference is logged beside `why`."""
        reference = secrets.token_hex(8)
        log.critical("model %s: the engine is dead (reference %s): %s", self._model, reference, why)
        return EngineGoneError(self._model, reference)

    def engine_restarting(self, retry_after_s: float) -> EngineRestartingError:
        """Return the error for all requests until the engine is started again; its reference is logged."""
        reference = secrets.token_hex(8)
        log.error(
            "model %s: the engine is started again in %g s (reference %s)",
            self._model, retry_after_s, reference,
        )  # fmt: skip
        return EngineRestartingError(self._model, reference, retry_after_s)

    # Before the run

    def cancel(self, request: Request) -> bool:
        """Drop a request whose caller left; return False if it had ended already."""
        if request.state not in (State.QUEUED, State.RUNNING):
            if request.state is State.NEW:
                request.state = State.CANCELLED  # before `submit`
            return False
        self._counters.cancelled += request.callers
        if request.tenant is not None:
            request.tenant.open_requests -= request.entrants
        if request.expiry is not None:
            request.expiry.cancel()
        self._withdraw(request)
        if request.parts is not None:
            release(request.parts)
        return True

    def _withdraw(self, request: Request) -> None:
        if request.parts is not None:
            for part in request.parts:
                if part.state in (State.QUEUED, State.RUNNING):
                    self._withdraw(part)
        elif request.state is State.QUEUED:
            self._scheduler.withdraw(request)
        # Running rows cannot be taken out of their batch; `answer` passes over them.
        request.state = State.CANCELLED

    def slack_s(self, request: Request, rows: int) -> float:
        """Return how long `rows` rows of a request may still wait. If some may be missing from its answer, it
        is worth running while one batch of them meets the deadline."""
        if request.partial:
            rows = min(rows, self._max_batch_size)
        return self._scheduler.slack_s(request, rows, self._clock())

    def expire(self, request: Request) -> float | None:
        """Fail a queued request that cannot meet its deadline any more; return how long to wait if it can.

        Running parts are answered, late or not.
        """
        parts = request.parts or [request]
        queued = [part for part in parts if part.state is State.QUEUED]
        if request.state is not State.QUEUED or not queued:
            return None
        slack_s = self.slack_s(request, sum([part.rows for part in queued]))
        if slack_s > _ROUNDING_S:
            # Parts have left the queue since this was planned, or runs have become faster.
            return slack_s
        assert request.timeout_s is not None
        error = ExpiredError(request.timeout_s)
        if request.partial and len(queued) < len(parts):
            for part in queued:
                self._scheduler.withdraw(part)
                self.fail(part, error)
        else:
            self._counters.expired += request.callers
            self._withdraw(request)
            self.fail(request, error)
        return None

    def end_late(self, request: Request) -> None:
        """Fail a request at the end of its timeout. Its run goes on, and tells the run time."""
        if request.state in (State.QUEUED, State.RUNNING):
            self._withdraw(request)
            self.fail_late(request)

    # Requests larger than a batch

    def cut(self, request: Request) -> list[Request]:
        """Cut a request into parts that fit a batch each; it is done when all of them are."""
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
                request.batch = part.batch  # in which it failed, if it was sent
                self.fail(request, part.error)
            elif unanswered == 0:
                self._join(request, parts)

        parts = cut(request, self._max_batch_size, part_done)
        request.parts = list(parts)
        request.state = State.QUEUED
        return request.parts

    def _join(self, request: Request, parts: list[Part]) -> None:
        first_error = next((part.error for part in parts if part.error is not None), None)
        if first_error is not None and all(part.error is not None for part in parts):
            self.fail(request, first_error)
            return
        outputs = pieces(parts)
        work = partial(join, outputs)
        request.batch, request.first_row, request.state = joint(parts), 0, State.RUNNING
        if sum([rows.nbytes for output in outputs for rows in output]) <= _JOINED_BYTES:
            self._answer_joined(request, work)
            return

        def joined(future: asyncio.Future[list[Array]]) -> None:
            self.joining.discard(request)
            if request.state is State.RUNNING:  # else it was cancelled, or it is too late
                self._answer_joined(request, future.result)
            self._on_joined()

        self.joining.add(request)
        self._loop.run_in_executor(None, work).add_done_callback(joined)

    def _answer_joined(self, request: Request, outputs: Callable[[], list[Array]]) -> None:
        assert request.batch is not None
        try:
            request.batch.outputs = outputs()
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller must hear of it
            self.fail_run(request, f"its parts cannot be put together: {error!r}")
        else:
            request.state = State.DONE
            batch = request.batch
            self._finish(request)
            batch.outputs, batch.memo = (), {}
