"""Errors of engines."""


class EngineError(Exception):
    """Base of all errors of engines."""


class EngineLoadError(EngineError):
    """The model cannot be served; the text is for the operator."""


class EngineRunError(EngineError):
    """One run failed, perhaps because of an input; the next run may succeed."""


class CallerError(EngineRunError):
    """One run failed with an exception of the user's code. A request that is alone in the run gets `original`
    as it is."""

    def __init__(self, original: Exception) -> None:
        super().__init__(type(original).__name__)
        self.original = original


class BadRequest(EngineRunError):
    """What a model raises for rows that it refuses. The caller gets the text, with status 422."""

    def __init__(self, text: str = "") -> None:
        super().__init__(text or "the model refuses this request")


class ResultCountError(EngineError):
    """A function did not return one result for each of its items."""


class EngineDeadError(EngineError):
    """The engine cannot run any batch any more."""


class EngineEndedError(EngineDeadError):
    """The process that the engine had for itself has ended; another one can take its place.

    `begun`: the batch was being run then, and may be the cause.
    """

    def __init__(self, text: str, *, begun: bool = False) -> None:
        super().__init__(text)
        self.begun = begun


class OutputError(EngineRunError, EngineLoadError):
    """An output is not as the model declares it."""


class NoBatchAxisError(EngineRunError, EngineLoadError):
    """An output's first axis does not count the rows."""


class LinkError(EngineError):
    """A link between two processes is at its end: the other process closed it, or broke its rules."""


class LinkClosedError(LinkError):
    """The other process closed its end of a link."""
