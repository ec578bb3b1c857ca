"""A receiver of traces: OTLP over HTTP on loopback, decoded with OpenTelemetry's own messages."""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.support.http.serving import DEADLINE_S


class Receiver:
    """The received spans, with their resource and scope."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self.paths: list[str] = []
        self.spans: list[Span] = []
        self.resource: dict[str, Any] = {}
        self.scope = ""
        self._changed = threading.Condition()

    def take(self, path: str, message: ExportTraceServiceRequest) -> None:
        """Take one export."""
        with self._changed:
            self.paths.append(path)
            for group in message.resource_spans:
                self.resource = attributes(group.resource)
                for scoped in group.scope_spans:
                    self.scope = scoped.scope.name
                    self.spans += scoped.spans
            self._changed.notify_all()

    def wait(self, condition: Callable[[list[Span]], bool]) -> list[Span]:
        """Wait until the condition holds, and return all spans."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self.spans), DEADLINE_S), self.spans
            return list(self.spans)

    def named(self, name: str) -> list[Span]:
        """Return the spans with this name."""
        return [span for span in self.spans if span.name == name]


def attributes(holder: Any) -> dict[str, Any]:
    """Return the attributes of a span, a resource or a link."""
    return {pair.key: _value(pair.value) for pair in holder.attributes}


def _value(value: AnyValue) -> Any:
    return getattr(value, str(value.WhichOneof("value")))


@contextlib.contextmanager
def receiver(status: int = 200) -> Iterator[Receiver]:
    """Run a receiver that answers each export with this status."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            received.take(self.path, ExportTraceServiceRequest.FromString(body))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(status)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name in the base
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    received = Receiver(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="otlp")
    thread.start()
    try:
        yield received
    finally:
        server.shutdown()
        thread.join(DEADLINE_S)
        server.server_close()
