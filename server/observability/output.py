"""Lines on their way out of the process: a bounded queue, and the capture of a file descriptor."""

import contextlib
import fcntl
import os
import select
import stat
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from time import time
from typing import TextIO

import msgspec

# Characters that wait for the reader; more are dropped.
_QUEUE_CHARACTERS = 4 << 20
_STOP_S = 2.0
_TICK_S = 1.0
_PIPE_BYTES = 1 << 20
_LONGEST_LINE = 8192
_NEWLINE = ord("\n")
_encode = msgspec.json.Encoder().encode


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


class Capture:
    """The capture of a file descriptor's lines. `write` reaches the original."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._line_end = b""  # missing behind the last line, as a full disk has cut it off
        try:
            self.original = os.dup(fd)
        except OSError:  # the process was started without it
            _discard(fd)
            self.original = os.dup(fd)
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
        data = memoryview(self._line_end + text.encode(errors="backslashreplace"))
        while data:
            try:
                count = os.write(self.original, data)
            except BlockingIOError:  # a process that shares it, such as a shell's, has made it so
                select.select([], [self.original], [])
                continue
            self._line_end = b"" if data[count - 1] == _NEWLINE else b"\n"
            data = data[count:]

    def end(self) -> None:
        """Pass on all lines until now, and discard those that follow."""
        _discard(self._fd)
        if self._thread is not None:
            self._thread.join(_STOP_S)  # a child process may still have the pipe

    def restore(self) -> None:
        """Put the original back."""
        os.dup2(self.original, self._fd)

    def unblocking(self) -> int:
        """Return a descriptor of the original; writing to it does not block if it is a pipe of this user."""
        if stat.S_ISFIFO(os.fstat(self.original).st_mode):
            with contextlib.suppress(OSError):  # the pipe was made before privileges were dropped
                return os.open(f"/proc/self/fd/{self.original}", os.O_WRONLY | os.O_NONBLOCK)
        return self.original


def _discard(fd: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != fd:
        os.dup2(nowhere, fd)
        os.close(nowhere)


def _read(reader: int, on_line: Callable[[str], object]) -> None:
    with open(reader, encoding="utf-8", errors="backslashreplace", newline="\n") as lines:
        for line in iter(lambda: lines.readline(_LONGEST_LINE), ""):
            on_line(line.removesuffix("\n"))
