"""TensorRT's error recorder and logger: the reasons of its errors.

The recorder collects the errors that an object reports while it runs a batch. A failed parse, build or
deserialisation returns only None or False, with the reason in the log, so the logger writes to `logging` and
keeps the last errors for the exception.

TensorRT calls both from its own threads, and from C++: an exception that left a method would end the process.
It uses one logger per process and ignores any other, with a warning, while an object of the first exists. So
there is one for each module, for ever; it routes errors by thread: an error on a thread that created logs
goes to those, an error on a thread of TensorRT to builds alone, since whose it is cannot be known.
"""

from __future__ import annotations

import ctypes
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from cobatch.engines.errors import EngineLoadError

_ENTRY_LIMIT = 16


def make_recorder(trt_module: Any) -> Any:
    """Create an `IErrorRecorder` of this module; `take` returns its entries and clears them."""

    class Recorder(trt_module.IErrorRecorder):  # type: ignore[misc]  # its base is known at run time only
        def __init__(self) -> None:
            trt_module.IErrorRecorder.__init__(self)
            self._lock = threading.Lock()
            self._entries: list[tuple[Any, str]] = []
            self._overflowed = False

        def get_num_errors(self) -> int:
            """Return the number of entries. C++ calls this name; Python's callers know `num_errors`."""
            return len(self._entries)

        num_errors = get_num_errors

        def get_error_code(self, index: int) -> Any:
            """Return the code of an entry."""
            return self._entries[index][0]

        def get_error_desc(self, index: int) -> str:
            """Return the text of an entry."""
            return self._entries[index][1]

        def has_overflowed(self) -> bool:
            """Return True if entries were dropped."""
            return self._overflowed

        def clear(self) -> None:
            """Drop all entries."""
            self.take()

        def report_error(self, code: Any, description: str) -> bool:
            """Add an entry. False leaves it to TensorRT if it goes on."""
            with self._lock:
                if len(self._entries) < _ENTRY_LIMIT:
                    self._entries.append((code, description))
                else:
                    self._overflowed = True
            return False

        def take(self) -> list[str]:
            """Return the entries since the last call, each with its code."""
            with self._lock:
                entries, self._entries, self._overflowed = self._entries, [], False
            return [f"{getattr(code, 'name', code)}: {' '.join(text.split())}" for code, text in entries]

    return Recorder()


log = logging.getLogger("cobatch.tensorrt")

_lock = threading.Lock()
_loggers: dict[Any, Any] = {}
_logs: weakref.WeakSet[ErrorLog] = weakref.WeakSet()


class ErrorLog:
    """The last errors that TensorRT logged for the thread that created this log. `logger`: for TensorRT.

    `threads`: those of TensorRT's own threads, too.
    """

    def __init__(self, logger: Any, *, threads: bool = False) -> None:
        self.logger = logger
        self.threads = threads
        self._thread = threading.current_thread()
        self._lock = threading.Lock()
        self._errors: deque[str] = deque(maxlen=_ENTRY_LIMIT)

    @property
    def is_mine(self) -> bool:
        """True on the thread that created it; a thread's number alone may be reused after its end."""
        return self._thread.ident == threading.get_ident() and self._thread.is_alive()

    def take(self) -> list[str]:
        """Return the errors since the last call, oldest first, at most 16."""
        with self._lock:
            errors = list(self._errors)
            self._errors.clear()
        return errors

    def reason(self, default: str) -> str:
        """Return the errors since the last call in one line, or `default`."""
        return "; ".join(self.take()) or default

    def add(self, message: str) -> None:
        """Add an error."""
        with self._lock:
            self._errors.append(" ".join(message.split()))


def make_log(trt_module: Any, *, threads: bool = False) -> ErrorLog:
    """Create a log for the objects that this thread creates with this module."""
    with _lock:
        if trt_module not in _loggers:
            _loggers[trt_module] = _make_logger(trt_module)
        error_log = ErrorLog(_loggers[trt_module], threads=threads)
        _logs.add(error_log)
    return error_log


def _add_error(message: str) -> None:
    with _lock:
        logs = list(_logs)
    own = [error_log for error_log in logs if error_log.is_mine]
    for error_log in own or [error_log for error_log in logs if error_log.threads]:
        error_log.add(message)


def make(create: Callable[[Any], Any], errors: ErrorLog, refusal: str) -> Any:
    """Return what `create` makes of the logger: a runtime or a builder. Raises EngineLoadError.

    Where TensorRT cannot use CUDA it only logs that, and hands out an object whose first use ends the
    process, and its end, too: so it is never freed.
    """
    errors.take()
    try:
        made = create(errors.logger)
        why = errors.reason("")
    except (TypeError, RuntimeError) as error:  # pybind11's errors for a null pointer
        made, why = None, errors.reason(str(error))
    if why:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
        raise EngineLoadError(f"{refusal}: {why}")
    return made


def _make_logger(trt_module: Any) -> Any:
    severity = trt_module.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        # TensorRT's "info" describes every layer and kernel.
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
                    _add_error(msg)
                if level:
                    log.log(level, "%s", msg)
            except BaseException:  # noqa: BLE001, S110 - see the head of the file; even KeyboardInterrupt
                pass

    return Logger()
