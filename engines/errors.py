"""What can go wrong below the batcher."""


class EngineError(Exception):
    """Base of all."""


class EngineLoadError(EngineError):
    """The model cannot be served; the text is for the person who asked for it."""


class EngineRunError(EngineError):
    """One run failed. It may be an input's fault, and the next run may go well."""


class EngineDeadError(EngineError):
    """The engine cannot run anything any more."""
