"""The record of one HTTP request, for logs, traces and history.

Made with the headers where a subscriber needs it (`server.observability.observer`), else with the response,
unless the response's id names the batch that the request ran in. It keeps no tensors, no headers and no
credentials.
"""

from typing import Any

import msgspec

from cobatch.batcher.request import Batch, Request
from cobatch.server.http.request_id import new_id, sane

REQUEST_ID = b"x-request-id"
_TRACEPARENT = b"traceparent"
_TRACESTATE = b"tracestate"
# Records are kept, so a client must not choose their size.
_LONGEST_PARENT = 128
_LONGEST_STATE = 2048
# Headers that identify a single request.
MARKS = frozenset((REQUEST_ID, _TRACEPARENT, _TRACESTATE))
INFER_ROUTE = "/v2/models/{name}/infer"


class RequestRecord(msgspec.Struct, eq=False):
    """One request. Times are seconds of `time.monotonic`, 0 for a stage that was not reached.

    `route` is the path with the names of its parameters (`/v2/models/{name}/infer`), empty where there is
    none. `slug`: the kind of problem in the response. `batch`: where it ran; for a split request, what stands
    for its batches. `trace` and the header `traceresponse` belong to the tracer.
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
        """Note a header of `MARKS`. Of two the first counts; states are joined."""
        if name == REQUEST_ID:
            self.request_id = self.request_id or sane(value) or ""
        elif name == _TRACEPARENT:
            self.traceparent = self.traceparent or value[:_LONGEST_PARENT].decode("latin-1")
        elif name == _TRACESTATE:
            # W3C Trace Context, "tracestate limits": a long list may be dropped, but not cut.
            state = value.decode("latin-1")
            state = f"{self.tracestate},{state}" if self.tracestate else state
            if len(state) <= _LONGEST_STATE:
                self.tracestate = state

    def ran(self, request: Request) -> None:
        """Note the batch that the batcher ran the request in."""
        self.rows = request.rows
        self.batch = request.batch
        self.enqueued_s = request.enqueued_s

    def reply_headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """Return X-Request-Id, with a new id if there is none yet, and traceresponse."""
        if not self.request_id:
            self.request_id = new_id()
        named = (REQUEST_ID, self.request_id.encode())
        return (named, (b"traceresponse", self.traceresponse)) if self.traceresponse else (named,)
