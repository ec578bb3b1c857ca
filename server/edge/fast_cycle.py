"""One request on the fast path, from its headers to its answer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar

import msgspec

from cobatch.server.auth.tenants import rate_limit_headers
from cobatch.server.edge.header_cache import Known
from cobatch.server.http.compression import compress
from cobatch.server.http.reply import Reply
from cobatch.server.inference.service import InferRequest
from cobatch.server.observability.record import INFER_ROUTE, RequestRecord
from cobatch.server.observability.traffic import LEFT, LEFT_SLUG

if TYPE_CHECKING:
    from cobatch.server.edge.fast_path import FastProtocol


class _NoEvent:
    """Stands where uvicorn sets an event to wake a waiting coroutine: the fast path has none."""

    def set(self) -> None:
        pass


class FastCycle(msgspec.Struct, eq=False):
    """Has what the protocol reads of uvicorn's cycle. A struct, since it is made for every request.

    `record` is None where nobody wants one: while an answer with rows says by its id where it rode.
    """

    protocol: FastProtocol
    known: Known
    keep_alive: bool
    received_s: float
    record: RequestRecord | None = None
    request: InferRequest | None = None
    body: bytes | bytearray = b""
    more_body: bool = True
    disconnected: bool = False
    response_complete: bool = False
    message_event: ClassVar[_NoEvent] = _NoEvent()

    @property
    def response_started(self) -> bool:
        """It is written in one piece."""
        return self.response_complete

    def begin(self) -> None:
        """Make its record, if somebody wants one. Asked where there may be somebody."""
        marks, observer = self.known.marks, self.protocol.observer
        drawn = observer.draw()
        if not (drawn or marks or observer.each):
            return
        record = self.record = self._new_record()
        for name, value in marks:
            record.mark(name, value)
        observer.begin(record, drawn)

    def reply(self, reply: Reply) -> None:
        """Answer the request. Called once, unless the connection was lost first."""
        if reply.request_id is None and self.record is None:
            # Not an answer that says by its id where it rode.
            self.record = self._new_record()
            if self.request is not None:
                self.record.ran(self.request)
        self.request = None  # or the two would keep each other until the next garbage collection
        coding = self.known.coding
        if coding is None or reply.length < self.protocol.core.settings.server.compress_min_bytes:
            self._write(reply)
            return
        # In a thread: it would hold up everybody else.
        packing = self.protocol.loop.run_in_executor(None, compress, reply, coding)
        packing.add_done_callback(lambda done: self._write(reply if done.exception() else done.result()))

    def refuse(self, refusal: Reply) -> None:
        """Answer before the body is read, which is dropped then."""
        if self.record is None:
            self.record = self._new_record()
        self._write(refusal)

    def leave(self) -> None:
        """The client is gone before it was answered."""
        if self.request is not None:
            self.protocol.core.cancel(self.request)
        self.known.model.infer_traffic.count(LEFT, LEFT_SLUG, 0.0)
        self._tell(self.record or self._new_record(), LEFT, LEFT_SLUG, time.monotonic())

    def _new_record(self) -> RequestRecord:
        known = self.known
        record = RequestRecord("", "POST", known.path, self.received_s)
        record.route = INFER_ROUTE
        record.scheme = "https" if self.protocol.config.is_ssl else "http"
        record.model = known.model.name
        if known.principal is not None:
            record.tenant = known.principal.tenant.name
        return record

    def _write(self, reply: Reply) -> None:
        self.response_complete = True
        known, record = self.known, self.record
        principal = known.principal
        if principal is not None and self.protocol.core.shows_standing and principal.tenant.limited:
            reply.headers += rate_limit_headers(principal.tenant, time.monotonic())
        if record is not None:
            _name(reply, record)
        written_s = None if self.disconnected else self.protocol.write_reply(reply, self.keep_alive)
        if written_s is None:
            return
        if record is None:
            # It rode in a batch, so it has rows; that it is counted in is seen to once for each batch.
            known.model.infer_traffic.durations.values.append(written_s - self.received_s)
        else:
            known.model.infer_traffic.count(reply.status, reply.slug, written_s - self.received_s)
            self._tell(record, reply.status, reply.slug, written_s)

    def _tell(self, record: RequestRecord, status: int, slug: str, answered_s: float) -> None:
        record.status, record.slug, record.answered_s = status, slug, answered_s
        self.protocol.observer.request_done(record)


def _name(reply: Reply, record: RequestRecord) -> None:
    """The caller's id goes before ours."""
    if not record.request_id and reply.request_id is not None:
        record.request_id = reply.request_id.decode()
    reply.request_id = None
    reply.headers += record.reply_headers()
