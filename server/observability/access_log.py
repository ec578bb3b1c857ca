"""The access log: one line for each request, as JSON or to be read by people.

A line says who asked what, what came of it and where the time went; never a credential, a header other than
the request's id, a query or a tensor. What a caller chooses (the id, the path) is escaped, so that nobody
writes lines of his own.

Lines are made on the loop and written by a thread of their own, those of `_FLUSH_S` at once: whoever reads
them may be slow, and requests do not wait for that. Where the reader is `_MOST_CHUNKS` of those behind, lines
are dropped; they are counted, and a line says so once there is room again.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import re
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from time import time
from typing import Literal, TextIO

import msgspec

from cobatch.server.observability.record import RequestRecord

Style = Literal["json", "text"]
LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_LONGEST_PATH = 500
_FLUSH_S = 0.05
_MOST_CHUNKS = 100
_JOIN_S = 5.0
_NAMES = {number: name for name, number in LEVELS.items()}
# What stands in a readable line without quotes.
_WORD = re.compile(r"[!#-~]+")
_TRACE_ID = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-")
_encode = msgspec.json.Encoder().encode


def level_of(status: int) -> int:
    """How grave an answer is: the server's failures are errors, refusals are warnings."""
    if status >= 500:
        return logging.ERROR
    return logging.WARNING if status >= 400 else logging.INFO


class Line(msgspec.Struct, omit_defaults=True):
    """What a line says, in this order, but for what there is nothing to say about. Times in microseconds."""

    time: str
    level: str
    request_id: str
    method: str
    path: str
    status: int
    problem: str = ""
    tenant: str = ""
    model: str = ""
    rows: int = 0
    batch: int = 0
    batch_rows: int = 0
    reason: str = ""
    queue_us: int = 0
    compute_us: int = 0
    total_us: int = 0
    trace_id: str = ""


def line_of(record: RequestRecord, now: str) -> Line:
    """The line of a request. `now`: the time, as text."""
    line = Line(
        now,
        _NAMES[level_of(record.status)],
        record.request_id,
        record.method,
        # A prediction's id is all that it takes to read it, where nobody is asked who he is.
        record.route if "{id}" in record.route else record.path[:_LONGEST_PATH],
        record.status,
        record.slug,
        record.tenant,
        record.model,
        record.rows,
        total_us=round((record.answered_s - record.received_s) * 1e6),
        trace_id=_trace_id(record),
    )
    batch = record.batch
    if batch is not None:
        line.batch = batch.number
        line.batch_rows = batch.rows
        line.reason = batch.reason
        line.queue_us = round(((batch.dispatched_s or batch.gathered_s) - record.enqueued_s) * 1e6)
        line.compute_us = round((batch.finished_s - batch.started_s) * 1e6)
    return line


def _trace_id(record: RequestRecord) -> str:
    """Where its spans are; of one that is not traced here, where its caller's may be."""
    if record.traceresponse:
        return record.traceresponse[3:35].decode()
    found = _TRACE_ID.match(record.traceparent) if record.traceparent else None
    return "" if found is None else found[1]


class Times:
    """Moments as text (RFC 3339, UTC, milliseconds); makes all but the milliseconds once a second."""

    def __init__(self) -> None:
        self._second = -1
        self._text = ""

    def text(self, time_s: float) -> str:
        """`time_s`: since the epoch."""
        second = int(time_s)
        if second != self._second:
            self._second = second
            self._text = datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        return f"{self._text}.{int((time_s - second) * 1000):03}Z"


_REST = [name for name in Line.__struct_fields__ if name not in ("time", "level", "status", "method", "path")]


def as_json(line: Line) -> str:
    """One line of JSON."""
    return _encode(line).decode() + "\n"


def as_text(line: Line) -> str:
    """One line for people: who asked for what, then the rest by name."""
    words = [f"{line.time} {line.level.upper():<7} {line.status} {_word(line.method)} {_word(line.path)}"]
    for name in _REST:
        value = getattr(line, name)
        if value:
            words.append(f"{name}={value if type(value) is int else _word(value)}")
    return " ".join(words) + "\n"


def _word(text: str) -> str:
    # Quoted where it could be taken for two words, or for the end of the line.
    return text if _WORD.fullmatch(text) else json.dumps(text)


class AccessLog:
    """A sink for records. `least`: lines of this level (`level_of`) and above are written.

    `clock`: seconds since the epoch.
    """

    def __init__(
        self, style: Style, least: int, stream: TextIO | None = None, clock: Callable[[], float] = time
    ) -> None:
        self._json = style == "json"
        self._format = as_json if self._json else as_text
        self._times = Times()
        self._least = least
        self._stream = stream
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lines: list[str] = []
        self._dropped = 0
        self._chunks: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="cobatch-access-log", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to write, for requests on this loop."""
        self._loop = loop
        self._thread.start()

    def request_done(self, record: RequestRecord) -> None:
        """Its line, if it is grave enough."""
        if level_of(record.status) < self._least:
            return
        lines = self._lines
        if not lines and self._loop is not None:
            # Many at once: to wake the thread costs more than a line.
            self._loop.call_later(_FLUSH_S, self.flush)
        lines.append(self._format(line_of(record, self._times.text(self._clock()))))

    def flush(self) -> None:
        """Give the lines that there are to the thread, or drop them where it is far behind."""
        lines = self._lines
        if not lines:
            return
        self._lines = []
        if self._chunks.qsize() >= _MOST_CHUNKS:
            self._dropped += len(lines)
            return
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            lines.insert(0, self._dropped_line(dropped))
        self._chunks.put("".join(lines))

    def _dropped_line(self, dropped: int) -> str:
        now = self._times.text(self._clock())
        if self._json:
            said = {"time": now, "level": "warning", "dropped_lines": dropped}
            return _encode(said).decode() + "\n"
        return f"{now} WARNING dropped_lines={dropped}\n"

    def stop(self) -> None:
        """Write what is left. Whoever reads the lines has a few seconds for them."""
        self.flush()
        self._chunks.put(None)
        if self._thread.ident is not None:
            self._thread.join(_JOIN_S)

    def _write(self) -> None:
        while (text := self._chunks.get()) is not None:
            try:
                stream = self._stream or sys.stderr
                stream.write(text)
                stream.flush()
            except (OSError, ValueError):
                # Whoever read the lines is gone, and nobody is left to be told.
                return


class JsonFormatter(logging.Formatter):
    """The server's other messages in the same form, since they go to the same place."""

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": Times().text(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(said).decode()
