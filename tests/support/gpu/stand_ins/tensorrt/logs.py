"""TensorRT's callbacks: loggers, error recorders and progress monitors."""

from __future__ import annotations

from typing import Any

from .versions import Enum, package


class ILogger:
    """The base of loggers; `log` may be called from any thread."""

    class Severity(Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    INTERNAL_ERROR = Severity.INTERNAL_ERROR
    ERROR = Severity.ERROR
    WARNING = Severity.WARNING
    INFO = Severity.INFO
    VERBOSE = Severity.VERBOSE

    def __init__(self) -> None:
        pass

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class Logger(ILogger):
    """A logger that writes to standard error."""

    def __init__(self, min_severity: ILogger.Severity = ILogger.Severity.WARNING) -> None:
        super().__init__()
        self.min_severity = min_severity

    def log(self, severity: ILogger.Severity, msg: str) -> None:
        if severity.value <= self.min_severity.value:
            print(f"[{severity.name}] {msg}")  # noqa: T201 - its purpose


class IErrorRecorder:
    """The base of error recorders; `report_error` may be called from any thread."""

    def __init__(self) -> None:
        pass


class IProgressMonitor:
    """The base of progress monitors."""

    def __init__(self) -> None:
        pass


class ErrorSink:
    """The receivers of an object's errors: the logger and, if set, the error recorder."""

    def __init__(self, logger: ILogger, recorder: Any = None) -> None:
        # As pybind11 does, refuse an `ILogger` whose __init__ was not called, and other types.
        if not isinstance(logger, ILogger):
            raise TypeError(f"incompatible constructor arguments: {logger!r} is no ILogger")
        self.logger = logger
        self.recorder = recorder

    def error(self, code: str, text: str) -> None:
        """Report an error; `code` is its name in ErrorCodeTRT."""
        value = package().ErrorCodeTRT[code]
        line = f"Error Code {int(value)}: {text}"
        self.logger.log(ILogger.Severity.ERROR, line)
        if self.recorder is not None:
            self.recorder.report_error(value, text)


class WithRecorder:
    """An object with an `error_recorder`, which the objects that it creates inherit."""

    _sink: ErrorSink

    @property
    def error_recorder(self) -> Any:
        return self._sink.recorder

    @error_recorder.setter
    def error_recorder(self, recorder: Any) -> None:
        if recorder is not None and not isinstance(recorder, IErrorRecorder):
            raise TypeError(f"{recorder!r} is no IErrorRecorder")
        self._sink.recorder = recorder
