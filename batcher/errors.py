"""Errors for requests that were not accepted, or could not be answered.

Split by blame: `BatchFailedError`, `EngineGoneError`, `EngineRestartingError` and `ExecutionTimeoutError` are
the engine's, `DrainingError` and `AbandonedError` ours; the others are about the caller's request.
"""


class BatcherError(Exception):
    """Base of all errors that a caller gets in place of an answer. `reason`: the word it is counted by.

    The caller also gets the attributes of the instance.
    """

    reason = "failed"


class TooManyRowsError(BatcherError):
    """The request has more rows than the queue could ever hold."""

    reason = "rows"

    def __init__(self, rows: int, limit: int) -> None:
        super().__init__(f"the request has {rows} rows, the queue holds at most {limit}")
        self.rows = rows
        self.limit = limit


class QueueFullError(BatcherError):
    """The queue has no room for the request now."""

    reason = "queue"

    def __init__(self, queued_rows: int, limit: int, retry_after_s: float) -> None:
        super().__init__(f"{queued_rows} of {limit} rows are queued")
        self.queued_rows = queued_rows
        self.limit = limit
        self.retry_after_s = retry_after_s


class TenantLimitError(BatcherError):
    """A limit of the tenant is reached: `what` names it, `used` is how much of it is in use."""

    reason = "tenant"

    def __init__(self, tenant: str, what: str, used: int, limit: int, retry_after_s: float) -> None:
        super().__init__(f"tenant {tenant!r} has used {used} of {limit} {what}")
        self.tenant = tenant
        self.what = what
        self.used = used
        self.limit = limit
        self.retry_after_s = retry_after_s


class TooLongError(BatcherError):
    """An axis of an input is longer than the largest length that rows are padded to.

    `expected` and `actual` are shapes with the batch axis, and `axis` counts it.
    """

    reason = "length"

    def __init__(self, tensor: str, expected: list[int], actual: list[int], axis: int, limit: int) -> None:
        super().__init__(
            f"input {tensor!r} has {actual[axis]} elements along axis {axis}, at most {limit} fit"
        )
        self.tensor = tensor
        self.expected = expected
        self.actual = actual
        self.limit = limit


class LengthMismatchError(BatcherError):
    """Two inputs that must have the same length differ."""

    reason = "length"

    def __init__(
        self, tensor: str, expected: list[int], actual: list[int], axis: int, other: str, length: int
    ) -> None:
        super().__init__(
            f"input {tensor!r} has {actual[axis]} elements along axis {axis}, {other!r} has {length}: "
            "they must have the same length"
        )
        self.tensor = tensor
        self.expected = [*expected[:axis], length, *expected[axis + 1 :]]
        self.actual = actual


class DrainingError(BatcherError):
    """The batcher accepts no requests because it is about to stop."""

    reason = "draining"


class DeadlineExceeded(BatcherError, TimeoutError):
    """Base of the errors of requests that could not be, or would not be, answered within their timeout."""


class DeadlineTooShortError(DeadlineExceeded):
    """The request's timeout is shorter than its run alone."""

    reason = "deadline"

    def __init__(self, timeout_s: float, needed_s: float) -> None:
        super().__init__(
            f"the timeout of {timeout_s * 1e3:g} ms is shorter than a run and its answer take, "
            f"{needed_s * 1e3:.3g} ms"
        )
        self.timeout_s = timeout_s
        self.needed_s = needed_s


class DeadlineUnreachableError(DeadlineExceeded):
    """Behind the requests that are queued, this one would not be answered in time."""

    reason = "deadline"

    def __init__(self, timeout_s: float, needed_s: float, retry_after_s: float) -> None:
        super().__init__(
            f"the timeout is {timeout_s * 1e3:g} ms, and behind the queued requests it would take "
            f"{needed_s * 1e3:.3g} ms"
        )
        self.timeout_s = timeout_s
        self.needed_s = needed_s
        self.retry_after_s = retry_after_s


class ExpiredError(DeadlineExceeded):
    """The request's timeout ended, or could not be met any more, before its rows ran."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"the request could not be run within its timeout of {timeout_s * 1e3:g} ms")
        self.timeout_s = timeout_s


class ExecutionTimeoutError(BatcherError):
    """The engine did not finish the request's batch within the model's limit."""

    def __init__(self, model: str, limit_s: float) -> None:
        super().__init__(f"model {model!r} did not finish within {limit_s * 1e3:g} ms")
        self.model = model
        self.limit_s = limit_s


class AbandonedError(BatcherError):
    """The time to drain ended before the request could be run."""


class BatchFailedError(BatcherError):
    """The engine failed on this request's rows. `reference` is in the log beside the engine's message."""

    def __init__(self, model: str, reference: str) -> None:
        super().__init__(f"model {model!r} failed on this request (reference {reference})")
        self.model = model
        self.reference = reference


class InputRejectedError(BatcherError):
    """The model refuses the values of this request's rows. `reference` is in the log beside its message."""

    def __init__(self, model: str, reference: str) -> None:
        super().__init__(f"model {model!r} refuses the values of this request (reference {reference})")
        self.model = model
        self.reference = reference


class EngineGoneError(BatcherError):
    """The engine is dead and cannot run anything any more."""

    reason = "engine"

    def __init__(self, model: str, reference: str) -> None:
        super().__init__(f"the engine of model {model!r} is unusable (reference {reference})")
        self.model = model
        self.reference = reference


class EngineRestartingError(EngineGoneError):
    """The engine's process has ended more than once in a row, and is started again after a while."""

    def __init__(self, model: str, reference: str, retry_after_s: float) -> None:
        super().__init__(model, reference)
        self.args = (f"the engine of model {model!r} is being started again (reference {reference})",)
        self.retry_after_s = retry_after_s
