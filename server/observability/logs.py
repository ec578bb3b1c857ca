"""The server's log: every line goes through a bounded queue, so a reader that has stopped blocks nothing.

    logging ── LogHandler: repeated ones limited ──┐
    file descriptor 2 ── Capture: a pipe ──────────┼── LogStream: bounded ── thread ── the real stderr
    access log ────────────────────────────────────┘

Libraries write to file descriptor 2 themselves, and so do prints and crashes of the interpreter. The end of
the pipe that they write to does not block: a library may hold the interpreter's lock, without which the pipe
is not read.
"""

import contextlib
import faulthandler
import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable
from time import monotonic

from cobatch.server.observability.output import Capture, LogStream, Times, line_of

# Warnings of one kind within a period; output of libraries has no kinds.
_PERIOD_S = 10.0
_BURST = 20
_FOREIGN_BURST = 200
_MAX_KINDS = 1000
_FOREIGN = "stderr"
log = logging.getLogger("cobatch.server")

Kind = tuple[str, int, str]


class JsonFormatter(logging.Formatter):
    """Formats records as the access log's lines are, since they go to the same stream."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": Times().text(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return line_of(line).rstrip("\n")


class TextFormatter(logging.Formatter):
    """Formats records for people; lines of libraries stay as they are."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-8s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return record.getMessage() if record.name == _FOREIGN else super().format(record)


class RepeatLimit:
    """Counts the warnings and errors of a period by kind: their logger, level and text without its values."""

    def __init__(self) -> None:
        self._counts: Counter[Kind] = Counter()
        self._last: dict[Kind, str] = {}

    def admit(self, record: logging.LogRecord) -> bool:
        """Return False if there were enough of this kind; the last message is kept."""
        if record.levelno < logging.WARNING:
            return True
        kind = record.name, record.levelno, str(record.msg) if record.name != _FOREIGN else ""
        if kind not in self._counts and len(self._counts) >= _MAX_KINDS:
            kind = record.name, record.levelno, ""
        self._counts[kind] += 1
        if self._counts[kind] <= _burst(kind):
            return True
        self._last[kind] = _message(record)
        return False

    def end_period(self) -> list[logging.LogRecord]:
        """Return a record for each kind of which some were not admitted, and begin anew."""
        records = [
            logging.LogRecord(
                kind[0], kind[1], "", 0, "%d more in the last %d s, the last: %s",
                (self._counts[kind] - _burst(kind), _PERIOD_S, last), None,
            )
            for kind, last in self._last.items()
        ]  # fmt: skip
        self._counts.clear()
        self._last.clear()
        return records


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001 - a message that cannot be formatted is a defect of its caller
        return f"cannot format {record.msg!r}"


def _burst(kind: Kind) -> int:
    return _FOREIGN_BURST if kind[0] == _FOREIGN else _BURST


class LogHandler(logging.Handler):
    """Passes records to a stream, repeated warnings and errors within limits. `clock` is monotonic."""

    def __init__(self, stream: LogStream, clock: Callable[[], float]) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter() if stream.as_json else TextFormatter())
        self._stream = stream
        self._clock = clock
        self._limit = RepeatLimit()
        self._period_ends_s = clock() + _PERIOD_S
        stream.on_tick = self.tell_repeats

    def emit(self, record: logging.LogRecord) -> None:
        self.tell_repeats()
        if self._limit.admit(record):
            self._put(record)

    def tell_repeats(self, *, ending: bool = False) -> None:
        """Log the messages that the limit has held back, if its period is over or ends now."""
        if not ending and self._clock() < self._period_ends_s:
            return
        self.acquire()
        try:
            self._period_ends_s = self._clock() + _PERIOD_S
            for record in self._limit.end_period():
                self._put(record)
        finally:
            self.release()

    def _put(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
        except Exception:  # noqa: BLE001 - see `_message`
            message = _message(record)
            text = self.format(logging.LogRecord(record.name, record.levelno, "", 0, message, (), None))
        self._stream.put(text + "\n", text.count("\n") + 1)

    def foreign(self, line: str) -> None:
        """Log a line that a library wrote to stderr, at any level that is set."""
        self.handle(logging.LogRecord(_FOREIGN, logging.WARNING, "", 0, "%s", (line,), None))


class ProcessLog:
    """The output of a server's process until `close`: `logging`, warnings, threads, stdout and stderr."""

    def __init__(self, level: str, *, as_json: bool) -> None:
        self._captures = out, err = Capture(1), Capture(2)
        self.stream = LogStream(err.write, as_json=as_json)
        self._streams = stdout, _ = LogStream(out.write), self.stream
        self._handler = LogHandler(self.stream, monotonic)
        logging.root.setLevel(level)
        logging.root.addHandler(self._handler)
        logging.captureWarnings(True)
        threading.excepthook = _thread_failed
        # A crash of the process is written past all of this.
        faulthandler.enable(err.unblocking())
        for stream in self._streams:
            stream.start()
        out.start(lambda line: stdout.put(line + "\n"))
        err.start(self._handler.foreign)

    @property
    def outputs(self) -> tuple[int, ...]:
        """The descriptors of the real stdout and stderr, for other processes."""
        return tuple(capture.original for capture in self._captures)

    def close(self) -> None:
        """Write the rest. A reader that has stopped reading holds this up for a few seconds only."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, AttributeError):  # None if the process was started without it
                stream.flush()
        self._handler.tell_repeats(ending=True)
        for capture, log_stream in zip(self._captures, self._streams, strict=True):
            capture.end()
            if log_stream.stop():
                capture.restore()  # else the process would hang at its end
        logging.root.removeHandler(self._handler)


def _thread_failed(args: threading.ExceptHookArgs) -> None:
    name = "a thread" if args.thread is None else args.thread.name
    value = args.exc_value or args.exc_type()
    log.error("%s failed", name, exc_info=value)
