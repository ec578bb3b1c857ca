"""The bisection of failed batches, which finds the requests at fault.

A failed batch is queued again in halves, in the turns of its tenants, until the requests that fail alone are
found. A source whose values are at fault becomes suspect (`batcher.scheduling.suspects`).
"""

from collections.abc import Callable

from cobatch.batcher.bundle import Bundle
from cobatch.batcher.completion import Completion
from cobatch.batcher.lane import Lane
from cobatch.batcher.request import Batch, Request
from cobatch.batcher.scheduling.scheduler import Scheduler
from cobatch.engines.errors import BadRequest, CallerError, EngineError


class Bisection:
    """Queues the requests of failed batches again, and fails those at fault. `recheck` is called for each
    request that waits once more; it may be too late by now."""

    def __init__(
        self,
        scheduler: Scheduler,
        completion: Completion,
        clock: Callable[[], float],
        recheck: Callable[[Request], None],
    ) -> None:
        self._scheduler = scheduler
        self._completion = completion
        self._clock = clock
        self._recheck = recheck

    def split(self, lane: Lane, batch: Batch, error: EngineError, zeros_run: bool | None) -> None:
        """Queue the requests of a failed batch in halves; fail one that was alone."""
        requests = batch.unanswered()
        if len(batch.requests) > 1:
            # Also with one left: the rows that failed may be of a request that was cancelled since.
            self._queue_halves(batch, requests)
        elif requests and isinstance(requests[0], Bundle):
            self._queue_halves(batch, requests[0].split())
        elif requests:
            self._fail_alone(lane, requests[0], error, zeros_run)

    def separate(self, batch: Batch, error: EngineError) -> None:
        """Queue each request of a batch that ended the engine's process alone; fail one that was alone."""
        requests = batch.unanswered()
        bundles = [one for one in requests if isinstance(one, Bundle)]
        if len(batch.requests) == 1 and not bundles:
            for request in requests:
                self._scheduler.suspects.add(request, self._clock())
                self._completion.fail_run(request, str(error))
            return
        alone = [one for one in requests if not isinstance(one, Bundle)]
        alone += [member for bundle in bundles for member in bundle.split()]
        self.queue_again([(batch, [request]) for request in reversed(alone)])

    def _fail_alone(self, lane: Lane, request: Request, error: EngineError, zeros_run: bool | None) -> None:
        """Fail a request whose run failed with no other in it.

        Its rows are at fault if the model says so, or zeros in their place run; or, with a model that refuses
        zeros or a source that is suspect already, if the engine has run other rows recently.
        """
        now_s = self._clock()
        said = isinstance(error, BadRequest)
        rejected = said or (lane.ran_recently(now_s) if zeros_run is None else bool(zeros_run))
        if rejected:
            self._scheduler.suspects.add(request, now_s)
        if isinstance(error, CallerError):
            self._completion.fail(request, error.original)
        elif said:
            self._completion.fail(request, error)
        else:
            self._completion.fail_run(request, str(error), rejected=rejected)

    def _queue_halves(self, batch: Batch, requests: list[Request]) -> None:
        half = len(requests) // 2
        self.queue_again([(batch, requests[half:]), (batch, requests[:half])])

    def queue_again(self, parts: list[tuple[Batch, list[Request]]]) -> None:
        """Queue requests of batches again, the last part first."""
        for batch, requests in parts:
            if requests:
                self._scheduler.retry(batch, requests)
        for _, requests in parts:
            for request in requests:
                self._recheck(request)
