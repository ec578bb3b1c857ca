"""The record of one HTTP request, for logs, traces and history.

Made with the headers where a subscriber needs it (`server.observability.observer`), else with the response,
unless the response's id names the batch that the request ran in. It keeps no tensors, no headers and no
credentials.
"""

from collections.abc import Sequence
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


class StepTimes(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A model that a pipeline's call used: when it was called, left the queue, and ran (`time.monotonic`).

    `kind`: of its problem, if it had one. The times of a step that did not run are those of its end.
    """

    model: str
    rows: int
    called_s: float
    dispatched_s: float
    started_s: float
    finished_s: float
    kind: str = ""


def server_timing(steps: Sequence[StepTimes]) -> bytes:
    """Return the part of Server-Timing about steps: the sums of each model, in milliseconds."""
    sums: dict[str, list[float]] = {}
    for step in steps:
        total = sums.setdefault(step.model, [0.0, 0.0])
        total[0] += step.dispatched_s - step.called_s
        total[1] += step.finished_s - step.started_s
    pieces = [
        f"{name}-queue;dur={queue_s * 1e3:.3f}, {name}-run;dur={run_s * 1e3:.3f}"
        for name, (queue_s, run_s) in sums.items()
    ]
    return ", ".join(pieces).encode()


class RequestRecord(msgspec.Struct, eq=False):
    """One request. Times are seconds of `time.monotonic`, 0 for a stage that was not reached.

    `route` is the path with the names of its parameters (`/v2/models/{name}/infer`), empty where there is
    none. `slug`: the kind of problem in the response. `batch`: where it ran; for a split request, what stands
    for its batches. `steps`: of a pipeline. `trace` and the header `traceresponse` belong to the tracer.
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
    steps: Sequence[StepTimes] = ()
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
