"""Errors of engines."""


class EngineError(Exception):
    """Base of all errors of engines."""


class EngineLoadError(EngineError):
    """The model cannot be served; the text is for the operator."""


class EngineRunError(EngineError):
    """One run failed, perhaps because of an input; the next run may succeed."""


class EngineDeadError(EngineError):
    """The engine cannot run any batch any more."""


class NoBatchAxisError(EngineRunError, EngineLoadError):
    """An output's first axis does not count the rows."""


class LinkError(EngineError):
    """A link between two processes is at its end: the other process closed it, or broke its rules."""


class LinkClosedError(LinkError):
    """The other process closed its end of a link."""
