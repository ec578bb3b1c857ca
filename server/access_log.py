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
from typing import Any, Literal, TextIO

import msgspec

from server.record import Record

Style = Literal["json", "text"]
LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

_LONGEST_PATH = 500
_FLUSH_S = 0.05
_MOST_CHUNKS = 100
_JOIN_S = 5.0
# What stands in a readable line without quotes.
_WORD = re.compile(r"[!#-~]+")


def level_of(status: int) -> int:
    """How grave an answer is: the server's failures are errors, refusals are warnings."""
    if status >= 500:
        return logging.ERROR
    return logging.WARNING if status >= 400 else logging.INFO


def _utc(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds")


def _path(record: Record) -> str:
    # A prediction's id is all that it takes to read it, where nobody is asked who he is.
    path = record.route if "{id}" in record.route else record.path
    return path if len(path) <= _LONGEST_PATH else path[:_LONGEST_PATH] + "..."


def fields(record: Record, now_s: float) -> dict[str, Any]:
    """What a line says, in order; what there is nothing to say about is left out. Times in microseconds."""
    batch = record.batch
    said: dict[str, Any] = {
        "time": _utc(now_s),
        "level": logging.getLevelName(level_of(record.status)).lower(),
        "request_id": record.request_id,
        "method": record.method,
        "path": _path(record),
        "status": record.status,
        "problem": record.slug,
        "tenant": record.tenant,
        "model": record.model,
        "rows": record.rows,
    }
    if batch is not None:
        said |= {
            "batch": batch.number,
            "batch_rows": batch.rows,
            "reason": batch.reason,
            "queue_us": round(record.queue_s * 1e6),
            "compute_us": round(record.compute_s * 1e6),
        }
    said["total_us"] = round((record.answered_s - record.received_s) * 1e6)
    if record.traceparent:
        said["traceparent"] = record.traceparent
    return {name: value for name, value in said.items() if value not in ("", 0) or name == "status"}


def as_json(said: dict[str, Any]) -> str:
    """One line of JSON."""
    return msgspec.json.encode(said).decode() + "\n"


def as_text(said: dict[str, Any]) -> str:
    """One line for people: who asked for what, then the rest by name."""
    head = [str(said.pop("time")), f"{said.pop('level').upper():<7}"]
    head += [_word(said.pop(name)) for name in ("status", "method", "path") if name in said]
    return " ".join([*head, *[f"{name}={_word(value)}" for name, value in said.items()]]) + "\n"


def _word(value: object) -> str:
    text = str(value)
    # Quoted where it could be taken for two words, or for the end of the line.
    return text if _WORD.fullmatch(text) else json.dumps(text)


class AccessLog:
    """A sink for records. `least`: lines of this level (`level_of`) and above are written.

    `clock`: seconds since the epoch.
    """

    def __init__(
        self, style: Style, least: int, stream: TextIO | None = None, clock: Callable[[], float] = time
    ) -> None:
        self._format = as_json if style == "json" else as_text
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

    def request_done(self, record: Record) -> None:
        """Its line, if it is grave enough."""
        if level_of(record.status) < self._least:
            return
        lines = self._lines
        if not lines and self._loop is not None:
            # Many at once: to wake the thread costs more than a line.
            self._loop.call_later(_FLUSH_S, self.flush)
        lines.append(self._format(fields(record, self._clock())))

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
            said = {"time": _utc(self._clock()), "level": "warning", "dropped_lines": dropped}
            lines.insert(0, self._format(said))
        self._chunks.put("".join(lines))

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
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(said).decode()
