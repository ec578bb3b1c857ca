"""One request as whoever watches the server sees it: who asked what, what came of it, and when.

Made when the headers are there, and only where somebody wants records; filled on the way; handed to the
sinks (`server.observe`) when the answer is written. It keeps no tensors, no headers and no credentials.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from server.request_id import new_id, sane

if TYPE_CHECKING:
    from batcher.request import Batch, Request

# Where it is in the ASGI scope.
RECORD = "cobatch.record"
REQUEST_ID = b"x-request-id"
TRACEPARENT = b"traceparent"
TRACESTATE = b"tracestate"
TRACERESPONSE = b"traceresponse"
# Headers that say under which name the caller knows a request.
MARKS = frozenset((REQUEST_ID, TRACEPARENT, TRACESTATE))
# Both edges serve it, and the router names it for none of them.
INFER_ROUTE = "/v2/models/{name}/infer"


def record_in(scope: Scope) -> Record | None:
    """The request's record, None where nobody wants one."""
    record: Record | None = scope.get(RECORD)
    return record


def note(scope: Scope, slug: str, request_id: bytes | None = None) -> None:
    """Write down with which kind of problem a request through ASGI is answered, and its id if it has none."""
    record: Record | None = scope.get(RECORD)
    if record is not None:
        record.slug = slug or record.slug
        if request_id is not None and not record.request_id:
            record.request_id = request_id.decode()


def reply_headers(record: Record) -> tuple[tuple[bytes, bytes], ...]:
    """What the answer's headers say of a record; whoever has not got an id by now gets one."""
    if not record.request_id:
        record.request_id = new_id()
    named = (REQUEST_ID, record.request_id.encode())
    return (named, (TRACERESPONSE, record.traceresponse)) if record.traceresponse else (named,)


class Record:
    """One request. Times are seconds of `time.monotonic`, 0 where it did not come so far.

    `route` is the path with its parameters' names (`/v2/models/{name}/infer`), empty where there is none.
    `slug`: the kind of problem that it was answered with. `batch`: what it rode in, of a split request what
    stands for its batches. `trace`: the tracer's own, None where the request is not traced; `traceresponse`
    is the header that the answer gets then.
    """

    __slots__ = (
        "answered_s",
        "batch",
        "enqueued_s",
        "method",
        "model",
        "path",
        "received_s",
        "request_id",
        "route",
        "rows",
        "scheme",
        "slug",
        "status",
        "tenant",
        "trace",
        "traceparent",
        "traceresponse",
        "tracestate",
    )

    def __init__(self, request_id: str, method: str, path: str, received_s: float) -> None:
        self.request_id = request_id
        self.method = method
        self.path = path
        self.route = ""
        self.scheme = "http"
        self.received_s = received_s
        self.enqueued_s = 0.0
        self.answered_s = 0.0
        self.model = ""
        self.tenant = ""
        self.status = 0
        self.slug = ""
        self.rows = 0
        self.batch: Batch | None = None
        self.traceparent = ""
        self.traceresponse = b""
        self.tracestate = ""
        self.trace: Any = None

    def mark(self, name: bytes, value: bytes) -> None:
        """Note a header, if it says under which name the caller knows the request. The first one counts."""
        if name == REQUEST_ID:
            self.request_id = self.request_id or sane(value) or ""
        elif name == TRACEPARENT:
            self.traceparent = self.traceparent or value.decode("latin-1")
        elif name == TRACESTATE:
            # There may be several; together they are one list.
            state = value.decode("latin-1")
            self.tracestate = f"{self.tracestate},{state}" if self.tracestate else state

    def ran(self, request: Request) -> None:
        """The batcher is done with it."""
        self.rows = request.rows
        self.batch = request.batch
        self.enqueued_s = request.enqueued_s
