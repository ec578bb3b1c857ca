"""The access log: one line per request, as JSON or as text for people.

A line has the tenant, the request, the response and the time in each stage; never a credential, a header
other than the request's id, a query or a tensor. Text from the client (id, path) is escaped, so that it
cannot forge lines.

Lines are made on the loop and written by a thread, those of `_FLUSH_S` together: a slow reader holds up no
request. If it is `_CHUNKS` of those behind, lines are dropped; a later line says how many.
"""

import asyncio
import json
import logging
import queue
import re
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from logging.handlers import QueueListener
from time import time
from typing import Literal, TextIO

import msgspec

from cobatch.server.observability.history import LONGEST_PATH
from cobatch.server.observability.record import RequestRecord

Style = Literal["json", "text"]
LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_FLUSH_S = 0.05
_CHUNKS = 100
_STOP_S = 5.0
_NAMES = {number: name for name, number in LEVELS.items()}
# Needs no quotes in a text line.
_WORD = re.compile(r"[!#-~]+")
_TRACE_ID = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-")
_encode = msgspec.json.Encoder().encode


def level_of(status: int) -> int:
    """Return the level of a status: 5xx are errors, 4xx warnings."""
    if status >= 500:
        return logging.ERROR
    return logging.WARNING if status >= 400 else logging.INFO


class Line(msgspec.Struct, omit_defaults=True):
    """The fields of a line, in order; fields with their default are left out. Times in microseconds."""

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
    """Return the line of a request. `now`: the time, as text."""
    line = Line(
        now,
        _NAMES[level_of(record.status)],
        record.request_id,
        record.method,
        # Without authentication, the id of a prediction is enough to read it.
        record.route if "{id}" in record.route else record.path[:LONGEST_PATH],
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
    """Return the id of the request's trace here, else of its client's."""
    if record.traceresponse:
        return record.traceresponse[3:35].decode()
    found = _TRACE_ID.match(record.traceparent) if record.traceparent else None
    return "" if found is None else found[1]


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


_REST = [name for name in Line.__struct_fields__ if name not in ("time", "level", "status", "method", "path")]


def as_json(line: Line) -> str:
    """Return a line of JSON."""
    return _encode(line).decode() + "\n"


def as_text(line: Line) -> str:
    """Return a line for people: the request, then the other fields by name."""
    words = [f"{line.time} {line.level.upper():<7} {line.status} {_word(line.method)} {_word(line.path)}"]
    for name in _REST:
        value = getattr(line, name)
        if value:
            words.append(f"{name}={value if type(value) is int else _word(value)}")
    return " ".join(words) + "\n"


def _word(text: str) -> str:
    # Quoted if it could be read as two words, or as the end of the line.
    return text if _WORD.fullmatch(text) else json.dumps(text)


class AccessLog:
    """A subscriber to requests. Lines below the level `least` (`level_of`) are left out.

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
        self._chunks: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        self._listener: QueueListener | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to write, for requests on this loop."""
        self._loop = loop
        handler = logging.StreamHandler(self._stream or sys.stderr)
        handler.terminator = ""
        self._listener = QueueListener(self._chunks, handler)
        self._listener.start()

    def request_done(self, record: RequestRecord) -> None:
        """Make the line of a request, if its level is high enough."""
        if level_of(record.status) < self._least:
            return
        lines = self._lines
        if not lines and self._loop is not None:
            # Together, since waking the thread costs more than a line.
            self._loop.call_later(_FLUSH_S, self.flush)
        lines.append(self._format(line_of(record, self._times.text(self._clock()))))

    def flush(self) -> None:
        """Pass the collected lines to the thread, or drop them if it is far behind."""
        lines = self._lines
        if not lines:
            return
        self._lines = []
        if self._chunks.qsize() >= _CHUNKS:
            self._dropped += len(lines)
            return
        if self._dropped:
            dropped, self._dropped = self._dropped, 0
            now = self._times.text(self._clock())
            line = {"time": now, "level": "warning", "dropped_lines": dropped}
            text = _encode(line).decode() if self._json else f"{now} WARNING dropped_lines={dropped}"
            lines.insert(0, text + "\n")
        self._chunks.put(logging.makeLogRecord({"msg": "".join(lines)}))

    def stop(self) -> None:
        """Write the rest. A reader that has stopped reading holds this up for a few seconds only."""
        self.flush()
        if self._listener is not None:
            stopping = threading.Thread(target=self._listener.stop, daemon=True)
            stopping.start()
            stopping.join(_STOP_S)


class JsonFormatter(logging.Formatter):
    """Formats the server's other messages as JSON too, since they go to the same stream."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": Times().text(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encode(line).decode()
