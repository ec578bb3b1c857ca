"""One request as whoever watches the server sees it: who asked what, what came of it, and when.

Made only where somebody wants it, when the headers are there; or when the answer is, if that does not say
by its id where the request rode. Filled on the way, and handed to the sinks (`server.observability.observer`)
when the answer is written. It keeps no tensors, no headers and no credentials.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.types import Message, Scope, Send

from cobatch.server.http.request_id import new_id, sane

if TYPE_CHECKING:
    from cobatch.batcher.request import Batch, Request
    from cobatch.server.inference.model import Model

# Where it is in the ASGI scope.
SEEN = "cobatch.seen"
REQUEST_ID = b"x-request-id"
TRACEPARENT = b"traceparent"
TRACESTATE = b"tracestate"
TRACERESPONSE = b"traceresponse"
# A record is kept, so what is in it must not be as long as a caller likes.
_LONGEST_PARENT = 128
_LONGEST_STATE = 2048
# Headers that say under which name the caller knows a request.
MARKS = frozenset((REQUEST_ID, TRACEPARENT, TRACESTATE))
# Both edges serve it, and the router names it for none of them.
INFER_ROUTE = "/v2/models/{name}/infer"


def record_in(scope: Scope) -> Record | None:
    """The record of a request through ASGI, made if it has none yet; None where nobody sees it."""
    seen: Seen | None = scope.get(SEEN)
    return None if seen is None else seen.record or seen.make_record()


def note(scope: Scope, slug: str) -> None:
    """Write down with which kind of problem a request through ASGI is answered."""
    seen: Seen | None = scope.get(SEEN)
    if seen is not None:
        seen.slug = slug or seen.slug


def reply_headers(record: Record) -> tuple[tuple[bytes, bytes], ...]:
    """What the answer's headers say of a record; whoever has not got an id by now gets one."""
    if not record.request_id:
        record.request_id = new_id()
    named = (REQUEST_ID, record.request_id.encode())
    return (named, (TRACERESPONSE, record.traceresponse)) if record.traceresponse else (named,)


class Record(msgspec.Struct, eq=False):
    """One request. Times are seconds of `time.monotonic`, 0 where it did not come so far.

    `route` is the path with its parameters' names (`/v2/models/{name}/infer`), empty where there is none.
    `slug`: the kind of problem that it was answered with. `batch`: what it rode in, of a split request what
    stands for its batches. `trace`: the tracer's own, None where the request is not traced; `traceresponse`
    is the header that the answer gets then.
    """

    request_id: str
    method: str
    path: str
    received_s: float
    route: str = ""
    scheme: str = "http"
    enqueued_s: float = 0.0
    answered_s: float = 0.0
    model: str = ""
    tenant: str = ""
    status: int = 0
    slug: str = ""
    rows: int = 0
    batch: Batch | None = None
    traceparent: str = ""
    traceresponse: bytes = b""
    tracestate: str = ""
    trace: Any = None

    def mark(self, name: bytes, value: bytes) -> None:
        """Note a header, if it says under which name the caller knows the request. The first one counts."""
        if name == REQUEST_ID:
            self.request_id = self.request_id or sane(value) or ""
        elif name == TRACEPARENT:
            self.traceparent = self.traceparent or value[:_LONGEST_PARENT].decode("latin-1")
        elif name == TRACESTATE:
            # There may be several; together they are one list. A long one need not be passed on (W3C Trace
            # Context, "tracestate limits"), and a part of one would be wrong.
            state = value.decode("latin-1")
            state = f"{self.tracestate},{state}" if self.tracestate else state
            if len(state) <= _LONGEST_STATE:
                self.tracestate = state

    def ran(self, request: Request) -> None:
        """The batcher is done with it."""
        self.rows = request.rows
        self.batch = request.batch
        self.enqueued_s = request.enqueued_s


class Seen(msgspec.Struct, eq=False):
    """A request through ASGI as `server.edge.observed` sees it; what is known of the answer once there is
    one.

    Its record is made where somebody wants one, and for every answer but one that says by its id where it
    rode; only of those `model` is set, and nothing else is known of the answer. `headers`: the last of each
    name.
    """

    scope: Scope
    send_on: Send
    received_s: float
    headers: dict[bytes, bytes]
    record: Record | None = None
    model: Model | None = None
    route: str = ""
    status: int = 0
    slug: str = ""
    request_id: bytes | None = None

    def make_record(self) -> Record:
        """Its record, from now on."""
        scope = self.scope
        record = self.record = Record("", scope["method"], scope["path"], self.received_s)
        record.scheme = scope.get("scheme", "http")
        for name, value in scope["headers"]:
            if name in MARKS:
                record.mark(name, value)
        return record

    def note_infer(
        self, model: Model, slug: str, request_id: bytes | None, head: list[tuple[bytes, bytes]]
    ) -> None:
        """Write down how an infer request is about to be answered. `head`: the answer's headers."""
        if request_id is not None and self.record is None:
            self.model = model
            head.append((REQUEST_ID, request_id))
        else:
            self.slug, self.request_id = slug, request_id

    def send(self, message: Message) -> Awaitable[None]:
        """Send it on, the answer's head with its id. No coroutine: that would cost more than this does."""
        if self.model is None and message["type"] == "http.response.start":
            self.status = message["status"]
            record = self.record or self.make_record()
            if self.request_id is not None and not record.request_id:
                # The caller's id goes before ours.
                record.request_id = self.request_id.decode()
            message["headers"] = [*message.get("headers", ()), *reply_headers(record)]
        return self.send_on(message)
