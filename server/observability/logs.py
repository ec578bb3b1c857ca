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
import fcntl
import logging
import os
import stat
import sys
import threading
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from time import monotonic, time
from typing import TextIO

import msgspec

# Characters that wait for the reader; more are dropped.
_QUEUE_CHARACTERS = 4 << 20
_STOP_S = 2.0
_TICK_S = 1.0
_PIPE_BYTES = 1 << 20
_LONGEST_LINE = 8192
# Warnings of one kind within a period; output of libraries has no kinds.
_PERIOD_S = 10.0
_BURST = 20
_FOREIGN_BURST = 200
_MAX_KINDS = 1000
_FOREIGN = "stderr"
log = logging.getLogger("cobatch.server")
_encode = msgspec.json.Encoder().encode

Kind = tuple[str, int, str]


class Times:
    """Formats times (RFC 3339, UTC, milliseconds); all but the milliseconds once per second."""

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def text(self, time_s: float) -> str:
        """Return the text of a time in seconds since the epoch."""
        second = int(time_s)
        if second != self._second:
            self._second = second
            self._text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{self._text}.{int((time_s - second) * 1000):03}Z"


class LogStream:
    """Lines on their way to a reader, written by a thread. Lines beyond the queue's limit are dropped.

    `write` takes text and may block; by default the lines go to `sys.stderr`. `as_json` is the form of all
    lines. `dropped` counts lines, and after the reader comes back one line says how many.
    """

    def __init__(self, write: Callable[[str], object] | None = None, *, as_json: bool = False) -> None:
        self.as_json = as_json
        self.dropped = 0
        self.on_tick: Callable[[], object] = lambda: None
        self._write = write
        self._waiting: list[str] = []
        self._characters = 0  # of those, and of the text being written
        self._unsaid = 0
        self._stopping = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def start(self) -> bool:
        """Begin to write; return False if that has been done."""
        if self._thread is not None:
            return False
        if self._write is None:
            self._write = _Flushing(sys.stderr)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="cobatch-log", daemon=True)
        self._thread.start()
        return True

    def put(self, text: str, lines: int = 1) -> None:
        """Queue complete lines, or drop them if the reader is far behind. Never blocks."""
        with self._changed:
            if self._waiting and self._characters + len(text) > _QUEUE_CHARACTERS:
                self.dropped += lines
                self._unsaid += lines
                return
            self._waiting.append(text)
            self._characters += len(text)
            self._changed.notify()

    def stop(self, limit_s: float = _STOP_S) -> bool:
        """Write the rest, for `limit_s` at most; return False if the reader does not take it."""
        thread = self._thread
        if thread is None:
            return True
        with self._changed:
            self._stopping = True
            self._changed.notify()
        thread.join(limit_s)
        if not thread.is_alive():
            self._thread = None
        return not thread.is_alive()

    def _run(self) -> None:
        ending = False
        while not ending:
            with self._changed:
                if not self._waiting and not self._stopping:
                    self._changed.wait(_TICK_S)
                ending = self._stopping and not self._waiting
                text = "".join(self._waiting)
                unsaid, self._unsaid = self._unsaid, 0
                self._waiting = []
            written = self._try(text + self._loss(unsaid) if unsaid else text)
            with self._changed:
                self._characters = sum(map(len, self._waiting))
                if not written:
                    lost = text.count("\n")
                    self.dropped += lost
                    self._unsaid += unsaid + lost
            self.on_tick()

    def _try(self, text: str) -> bool:
        """Write a text; return False if the disk is full or the reader is gone."""
        assert self._write is not None
        try:
            if text:
                self._write(text)
        except (OSError, ValueError):
            return False
        return True

    def _loss(self, lines: int) -> str:
        now = Times().text(time())
        if self.as_json:
            return line_of({"time": now, "level": "warning", "dropped_lines": lines})
        return f"{now} WARNING dropped_lines={lines}\n"


class _Flushing:
    """A text stream whose lines are visible at once."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __call__(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def line_of(fields: dict[str, object]) -> str:
    """Return a line of JSON."""
    return _encode(fields).decode() + "\n"


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
        self._last[kind] = record.getMessage()
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
        """Log what the limit has held back, if its period is over or ends now."""
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
        except Exception:  # noqa: BLE001 - a message that cannot be formatted is a defect of its caller
            message = f"cannot format {record.msg!r}"
            text = self.format(logging.LogRecord(record.name, record.levelno, "", 0, message, (), None))
        self._stream.put(text + "\n", text.count("\n") + 1)

    def foreign(self, line: str) -> None:
        """Log a line that a library wrote to stderr, at any level that is set."""
        self.handle(logging.LogRecord(_FOREIGN, logging.WARNING, "", 0, "%s", (line,), None))


class Capture:
    """What this process writes to a file descriptor, line by line. `write` reaches the original."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        try:
            self._original = os.dup(fd)
        except OSError:  # the process was started without it
            _discard(fd)
            self._original = os.dup(fd)
        self._thread: threading.Thread | None = None

    def start(self, on_line: Callable[[str], object]) -> None:
        """Put a pipe in the descriptor's place; call `on_line` with each line, on a thread."""
        reader, writer = os.pipe()
        with contextlib.suppress(OSError):  # the system may allow less
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        os.set_blocking(writer, False)
        os.dup2(writer, self._fd)
        os.close(writer)
        self._thread = threading.Thread(target=_read, args=(reader, on_line), name="cobatch-out", daemon=True)
        self._thread.start()

    def write(self, text: str) -> None:
        """Write to the original; blocks while its reader does not read."""
        data = text.encode(errors="backslashreplace")
        while data:
            data = data[os.write(self._original, data) :]

    def end(self) -> None:
        """Pass on what has been written, and discard what follows."""
        _discard(self._fd)
        if self._thread is not None:
            self._thread.join(_STOP_S)  # a child process may still have the pipe

    def restore(self) -> None:
        """Put the original back."""
        os.dup2(self._original, self._fd)

    def unblocking(self) -> int:
        """Return a descriptor of the original; writing to it does not block if it is a pipe."""
        if not stat.S_ISFIFO(os.fstat(self._original).st_mode):
            return self._original
        return os.open(f"/proc/self/fd/{self._original}", os.O_WRONLY | os.O_NONBLOCK)


def _discard(fd: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != fd:
        os.dup2(nowhere, fd)
        os.close(nowhere)


def _read(reader: int, on_line: Callable[[str], object]) -> None:
    with open(reader, encoding="utf-8", errors="backslashreplace", newline="\n") as lines:
        for line in iter(lambda: lines.readline(_LONGEST_LINE), ""):
            on_line(line.removesuffix("\n"))


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
