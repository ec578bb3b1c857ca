"""TensorRT's error recorder: what an object reports while it works, for the error of the batch it ran.

TensorRT's logger: what it says goes to `logging`, and its last errors are kept for the exception.

A failed parse, build or deserialisation answers only None or False; the reason is in the log and nowhere
else. TensorRT calls the logger from threads of its own, and an exception that left `log` would end the
process, since there is C++ above it.

TensorRT takes one logger in a process: while anything made with a first one lives, every other is ignored
(with a warning). So there is one for each module, for ever, and it tells the logs apart by thread: an error
on a thread that made logs goes to those, any other error (a thread of TensorRT's) to all.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import deque
from typing import Any

_KEPT = 16


def make_recorder(trt_module: Any) -> Any:
    """An instance of a subclass of this module's `IErrorRecorder`; `take` answers and clears its entries.

    TensorRT may report from any thread, and an exception of ours must not reach it.
    """

    class Recorder(trt_module.IErrorRecorder):  # type: ignore[misc]  # its base is known at run time only
        def __init__(self) -> None:
            trt_module.IErrorRecorder.__init__(self)
            self._lock = threading.Lock()
            self._entries: list[tuple[Any, str]] = []
            self._overflowed = False

        def num_errors(self) -> int:
            """How many are kept."""
            return len(self._entries)

        def get_error_code(self, index: int) -> Any:
            """The code of one."""
            return self._entries[index][0]

        def get_error_desc(self, index: int) -> str:
            """The words of one."""
            return self._entries[index][1]

        def has_overflowed(self) -> bool:
            """Whether there were more than are kept."""
            return self._overflowed

        def clear(self) -> None:
            """Forget all."""
            self.take()

        def report_error(self, code: Any, description: str) -> bool:
            """Keep one. False: TensorRT decides itself whether it goes on."""
            with self._lock:
                if len(self._entries) < _KEPT:
                    self._entries.append((code, description))
                else:
                    self._overflowed = True
            return False

        def take(self) -> list[str]:
            """The entries since the last call, each with its code."""
            with self._lock:
                entries, self._entries, self._overflowed = self._entries, [], False
            return [f"{getattr(code, 'name', code)}: {' '.join(text.split())}" for code, text in entries]

    return Recorder()


log = logging.getLogger("cobatch.tensorrt")

_KEPT_ERRORS = 16
_lock = threading.Lock()
_loggers: dict[Any, Any] = {}
_logs: weakref.WeakSet[ErrorLog] = weakref.WeakSet()


class ErrorLog:
    """`logger` is handed to TensorRT; `take` answers what went wrong since it was last asked.

    Belongs to the thread that makes it.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self._thread = threading.current_thread()
        self._lock = threading.Lock()
        self._errors: deque[str] = deque(maxlen=_KEPT_ERRORS)

    @property
    def is_mine(self) -> bool:
        """Whether this thread made it. A number alone may be that of a thread that has ended."""
        return self._thread.ident == threading.get_ident() and self._thread.is_alive()

    def take(self) -> list[str]:
        """The errors since the last call, oldest first, at most the last 16."""
        with self._lock:
            errors = list(self._errors)
            self._errors.clear()
        return errors

    def reason(self, otherwise: str) -> str:
        """The errors since the last call as one line, or `otherwise` where there are none."""
        return "; ".join(self.take()) or otherwise

    def keep(self, message: str) -> None:
        """Remember an error."""
        with self._lock:
            self._errors.append(" ".join(message.split()))


def make_log(trt_module: Any) -> ErrorLog:
    """A log for the objects that this thread makes with this module (`tensorrt` or its sisters)."""
    with _lock:
        if trt_module not in _loggers:
            _loggers[trt_module] = _make_logger(trt_module)
        kept = ErrorLog(_loggers[trt_module])
        _logs.add(kept)
    return kept


def _keep(message: str) -> None:
    with _lock:
        logs = list(_logs)
    here = [kept for kept in logs if kept.is_mine]
    for kept in here or logs:
        kept.keep(message)


def _make_logger(trt_module: Any) -> Any:
    severity = trt_module.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        # TensorRT's "info" tells of every layer and kernel.
        severity.INFO: logging.DEBUG,
        severity.VERBOSE: logging.NOTSET,
    }

    class Logger(trt_module.ILogger):  # type: ignore[misc]  # its base is known at run time only
        def __init__(self) -> None:
            trt_module.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            try:
                level = levels.get(severity, logging.ERROR)
                if level >= logging.ERROR:
                    _keep(msg)
                if level:
                    log.log(level, "%s", msg)
            except BaseException:  # noqa: BLE001, S110 - see the head of the file; even KeyboardInterrupt
                pass

    return Logger()
