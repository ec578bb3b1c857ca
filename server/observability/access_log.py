"""The access log: one line per request, as JSON or as text for people.

A line has the tenant, the request, the response and the time in each stage; never a credential, a header
other than the request's id, a query or a tensor. Text from the client (id, path) is escaped, so that it
cannot forge lines.

Lines are made on the loop; those of `_FLUSH_S` go to the log's stream together.
"""

import asyncio
import json
import logging
import re
from collections.abc import Callable
from time import time

import msgspec

from cobatch.server.observability.history import LONGEST_PATH
from cobatch.server.observability.output import LogStream, Times
from cobatch.server.observability.record import RequestRecord

LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_FLUSH_S = 0.05
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

    def __init__(self, least: int, log: LogStream, clock: Callable[[], float] = time) -> None:
        self._format = as_json if log.as_json else as_text
        self._times = Times()
        self._least = least
        self._log = log
        self._clock = clock
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lines: list[str] = []

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to write, for requests on this loop."""
        self._loop = loop

    def request_done(self, record: RequestRecord) -> None:
        """Make the line of a request, if its level is high enough."""
        if level_of(record.status) < self._least:
            return
        lines = self._lines
        if not lines and self._loop is not None:
            # Together, since waking the log's thread costs more than a line.
            self._loop.call_later(_FLUSH_S, self.flush)
        lines.append(self._format(line_of(record, self._times.text(self._clock()))))

    def flush(self) -> None:
        """Pass the collected lines on."""
        lines, self._lines = self._lines, []
        if lines:
            self._log.put("".join(lines), len(lines))

    def stop(self) -> None:
        """Pass on the rest."""
        self.flush()
