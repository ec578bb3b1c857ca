"""Giving a request its end: rows or an error, exactly once, and never at the others' cost."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable

from cobatch.batcher.errors import BatchFailedError, EngineGoneError
from cobatch.batcher.request import Request, State
from cobatch.batcher.rows.splitting import Part, let_go
from cobatch.batcher.statistics import Counters

log = logging.getLogger("cobatch.batcher")


class Answers:
    """Of one model. `clock` is the batcher's."""

    def __init__(self, model: str, counters: Counters, clock: Callable[[], float]) -> None:
        self._model = model
        self._counters = counters
        self._clock = clock

    def finish(self, request: Request) -> None:
        """Tell the caller; its state is DONE, and rows or error are set."""
        if request.expiry is not None:
            request.expiry.cancel()
        if request.tenant is not None and not isinstance(request, Part):
            tenant, callers = request.tenant, request.callers
            tenant.open_requests -= callers
            if request.error is None:
                tenant.usage.answered += callers
            else:
                tenant.usage.failed += callers
        try:
            request.done()
        except Exception:
            # One caller's trouble must not cost the others in its batch their answers.
            log.exception("model %s: handing an answer to its caller failed", self._model)
        if request.parts is not None:
            let_go(request.parts)

    def fail(self, request: Request, error: Exception) -> None:
        """Tell the caller that there will be no rows."""
        request.state = State.DONE
        request.error = error
        if not isinstance(request, Part):
            self._counters.failed += request.callers
        self._counters.failed_s += self._clock() - request.enqueued_s
        self.finish(request)

    def fail_all(self, requests: list[Request], error: Exception) -> None:
        """The same for those among them that still wait for an answer."""
        for request in requests:
            if request.state is State.RUNNING:
                self.fail(request, error)

    def fail_run(self, request: Request, why: str) -> None:
        """The engine failed on its rows. The caller gets a reference; the log has it beside `why`."""
        reference = secrets.token_hex(8)
        whose = "" if request.tenant is None else f" of tenant {request.tenant.name}"
        log.error("model %s: a run%s failed (reference %s): %s", self._model, whose, reference, why)
        self.fail(request, BatchFailedError(self._model, reference))

    def engine_gone(self, why: str) -> EngineGoneError:
        """What everybody is told from now on; the reference is in the log beside `why`."""
        reference = secrets.token_hex(8)
        log.critical("model %s: the engine is dead (reference %s): %s", self._model, reference, why)
        return EngineGoneError(self._model, reference)
