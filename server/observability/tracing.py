"""OpenTelemetry traces: a span per request, and one per batch with links to its requests.

    POST /v2/models/{name}/infer   (server; its parent is the client's span, if there is one)
    ├─ queue     until its batch is formed
    ├─ batch     packed into a slot of the engine, until the run begins; linked to the batch's span
    └─ compute   the run
    POST /batch                    (the same, with a span of this kind for each item)
    POST /v1/models/{name}/infer   (a pipeline; inside of it, beside its stages:)
    └─ step NAME   a model that it used, with `queue` and `compute`
    batch NAME   (a trace of its own, since requests of several clients share it; linked to each of them)

Head sampling: a request's `traceparent` decides, else the sampling ratio. A request that is not traced costs
nothing else. Spans are made when the request is done, from times that are taken anyway, and sent by the SDK's
thread. The response has `traceresponse` (W3C Trace Context, level 3) with the ids of its trace.

OpenTelemetry's own variables apply: OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_EXPORTER_OTLP_*,
OTEL_BSP_*.
"""

import asyncio
import logging
import re
import threading
import time
from collections.abc import Callable
from random import random

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.semconv.attributes import error_attributes as error
from opentelemetry.semconv.attributes import http_attributes as http
from opentelemetry.semconv.attributes import network_attributes as network
from opentelemetry.semconv.attributes import url_attributes as url
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from cobatch import __version__
from cobatch.batcher.request import Batch
from cobatch.server.observability.record import RequestRecord, StepTimes

# A valid header, with the digit that has the sampled flag. A later version may have more fields.
_TRACEPARENT = re.compile(
    r"(?:(00)|(?!ff)[0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]([0-9a-f])(?(1)|(?:-.*)?)"
)
# A batch's span stays open this long after its first request, for links to the others.
_CLOSE_AFTER_S = 1.0
_LINKS = 1024
_STOP_S = 3.0
_PROPAGATOR = TraceContextTextMapPropagator()
# It logs each invalid `tracestate` in full, whatever its length.
logging.getLogger("opentelemetry.trace.span").setLevel(logging.ERROR)


class Tracing:
    """A `Tracer`. `ratio`: sampling ratio for requests without a traceparent.

    `clock` is the server's monotonic clock, `wall_clock` the time of the spans. `lot` draws from 0 to 1.
    """

    def __init__(
        self,
        ratio: float,
        endpoint: str | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        lot: Callable[[], float] = random,
    ) -> None:
        self._ratio = ratio
        self._lot = lot
        resource = Resource.create({SERVICE_VERSION: __version__})
        if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
            resource = resource.merge(Resource({SERVICE_NAME: "cobatch"}))
        self._provider = TracerProvider(
            resource=resource,
            # `begin` has decided.
            sampler=ALWAYS_ON,
            span_limits=SpanLimits(max_links=_LINKS),
            shutdown_on_exit=False,
        )
        target = None if endpoint is None else f"{endpoint.rstrip('/')}/v1/traces"
        self._exporter = OTLPSpanExporter(endpoint=target)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("cobatch", __version__)
        self._clock = clock
        self._wall_clock = wall_clock
        self._offset_s = 0.0
        self._open: dict[Batch, trace.Span] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close batches' spans on this loop."""
        self._loop = loop

    def draw(self) -> bool:
        """Decide by the sampling ratio whether to trace a request without a traceparent."""
        return self._lot() < self._ratio

    def begin(self, record: RequestRecord, drawn: bool) -> None:
        """Begin the span of a request to be traced. `drawn`: what `draw` answered for it."""
        parent = _TRACEPARENT.fullmatch(record.traceparent) if record.traceparent else None
        if not (drawn if parent is None else int(parent[2], 16) & 1):
            return
        carrier = {"traceparent": record.traceparent, "tracestate": record.tracestate}
        context = None if parent is None else _PROPAGATOR.extract(carrier)
        # Monotonic time drifts from wall time.
        self._offset_s = self._wall_clock() - self._clock()
        record.trace = span = self._tracer.start_span(
            record.method, context, trace.SpanKind.SERVER, start_time=self._ns(record.received_s)
        )
        mine = span.get_span_context()
        record.traceresponse = b"00-%032x-%016x-01" % (mine.trace_id, mine.span_id)

    def request_done(self, record: RequestRecord) -> None:
        """End the spans of a request, if it is traced."""
        span: trace.Span | None = record.trace
        if span is None:
            return
        record.trace = None  # they refer to each other
        if record.route:
            span.update_name(f"{record.method} {record.route}")
        span.set_attributes(_attributes(record))
        if record.status >= 500:
            span.set_status(trace.StatusCode.ERROR)
        if record.batch is not None:
            self._stages(span, record, record.batch)
        for step in record.steps:
            self._step(span, step)
        span.end(self._ns(record.answered_s))

    def _step(self, span: trace.Span, step: StepTimes) -> None:
        """Make the span of a step, with its stages inside."""
        inside = trace.set_span_in_context(span)
        attributes: dict[str, AttributeValue] = {"cobatch.model": step.model, "cobatch.rows": step.rows}
        own = self._tracer.start_span(
            f"step {step.model}", inside, attributes=attributes, start_time=self._ns(step.called_s)
        )
        if step.kind:
            own.set_attribute("cobatch.problem", step.kind)
            own.set_status(trace.StatusCode.ERROR)
        else:
            within = trace.set_span_in_context(own)
            for name, from_s, to_s in (
                ("queue", step.called_s, step.dispatched_s),
                ("compute", step.started_s, step.finished_s),
            ):
                self._tracer.start_span(name, within, start_time=self._ns(from_s)).end(self._ns(to_s))
        own.end(self._ns(step.finished_s))

    def item_done(self, call: RequestRecord, item: RequestRecord) -> None:
        """Make the spans of a batch call's item inside those of the call, if that is traced."""
        if call.trace is not None:
            item.trace = self._tracer.start_span(
                item.method, trace.set_span_in_context(call.trace), start_time=self._ns(item.received_s)
            )
            self.request_done(item)

    def _stages(self, span: trace.Span, record: RequestRecord, batch: Batch) -> None:
        inside = trace.set_span_in_context(span)
        mine = span.get_span_context()
        batches = batch.joined or (batch,)
        of_batches = [trace.Link(self._span_of(one, record.model, mine)) for one in batches]
        for name, from_s, to_s, links in (
            ("queue", record.enqueued_s, batch.gathered_s, ()),
            ("batch", batch.gathered_s, batch.started_s, of_batches),
            ("compute", batch.started_s, batch.finished_s, ()),
        ):
            stage = self._tracer.start_span(name, inside, links=links, start_time=self._ns(from_s))
            stage.end(self._ns(max(from_s, to_s)))

    def _span_of(self, batch: Batch, model: str, request: trace.SpanContext) -> trace.SpanContext:
        """Return the batch's span, linked to this request."""
        span = self._open.get(batch)
        if span is None:
            span = self._open[batch] = self._tracer.start_span(
                f"batch {model}",
                # A trace of its own, whatever is current.
                trace.set_span_in_context(trace.INVALID_SPAN),
                attributes=_batch_attributes(batch, model),
                start_time=self._ns(batch.gathered_s),
            )
            if batch.failed:
                span.set_status(trace.StatusCode.ERROR)
            if self._loop is not None:
                # Its other requests are answered soon.
                self._loop.call_later(_CLOSE_AFTER_S, self._close, batch)
        span.add_link(request)
        return span.get_span_context()

    def _close(self, batch: Batch) -> None:
        span = self._open.pop(batch, None)
        if span is not None:
            span.end(self._ns(batch.answered_s or batch.finished_s))

    def stop(self) -> None:
        """Send the rest. Give up after a few seconds if the receiver is gone."""
        for batch in list(self._open):
            self._close(batch)
        sending = threading.Thread(target=self._provider.shutdown, name="cobatch-traces", daemon=True)
        sending.start()
        sending.join(_STOP_S)
        if sending.is_alive():
            self._exporter.shutdown()  # type: ignore[no-untyped-call]  # it waits to try again
            sending.join(_STOP_S)

    def _ns(self, time_s: float) -> int:
        return int((time_s + self._offset_s) * 1e9)


def _attributes(record: RequestRecord) -> dict[str, AttributeValue]:
    """Return attributes by the semantic conventions for HTTP servers; our own begin with `cobatch.`."""
    attributes: dict[str, AttributeValue] = {
        http.HTTP_REQUEST_METHOD: record.method,
        http.HTTP_RESPONSE_STATUS_CODE: record.status,
        url.URL_PATH: record.path,
        url.URL_SCHEME: record.scheme,
        network.NETWORK_PROTOCOL_VERSION: "1.1",
        "cobatch.request.id": record.request_id,
    }
    optional: dict[str, AttributeValue] = {
        http.HTTP_ROUTE: record.route,
        error.ERROR_TYPE: (record.slug or str(record.status)) if record.status >= 500 else "",
        "cobatch.problem": record.slug,
        "cobatch.tenant": record.tenant,
        "cobatch.model": record.model,
        "cobatch.rows": record.rows,
    }
    return attributes | {name: value for name, value in optional.items() if value}


def _batch_attributes(batch: Batch, model: str) -> dict[str, AttributeValue]:
    return {
        "cobatch.model": model,
        "cobatch.batch.number": batch.number,
        "cobatch.batch.rows": batch.rows,
        "cobatch.batch.reason": batch.reason,
        "cobatch.batch.slot": batch.slot,
        "cobatch.batch.input_us": round(max(0.0, batch.dispatched_s - batch.gathered_s) * 1e6),
        "cobatch.batch.compute_us": round((batch.finished_s - batch.started_s) * 1e6),
    }
