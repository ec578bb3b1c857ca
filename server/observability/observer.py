"""Subscriptions to finished requests and batches: the access log, traces, the history, the live page.

Records of single requests (`server.observability.record`) are made only where a subscriber needs them.
Subscribers must be fast, and may keep their arguments. An exception in one is logged and reaches no request.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.durations import PENDING_LIMIT, DurationHistogram
from cobatch.batcher.request import Batch
from cobatch.server.http.request_id import new_id
from cobatch.server.observability.event_loop import LoopLag
from cobatch.server.observability.output import LogStream
from cobatch.server.observability.record import RequestRecord

log = logging.getLogger("cobatch.observe")

RequestSink = Callable[[RequestRecord], None]
BatchSink = Callable[[Batcher, Batch], None]


class FrontCounts:
    """Counts of one front, over all its lives since this process began; `connections` is the number now."""

    def __init__(self) -> None:
        self.requests = 0
        self.connections = 0
        self.cpu_s = 0.0
        self.lags = DurationHistogram()


async def _nothing_to_collect() -> None:
    """All counts are this process's own."""


class Tracer(Protocol):
    """The part of `server.observability.tracing.Tracing` that is used here and by POST /batch."""

    def start(self, loop: asyncio.AbstractEventLoop) -> None: ...
    def draw(self) -> bool: ...
    def begin(self, record: RequestRecord, drawn: bool) -> None: ...
    def request_done(self, record: RequestRecord) -> None: ...
    def item_done(self, call: RequestRecord, item: RequestRecord) -> None: ...
    def stop(self) -> None: ...


class Observer:
    """The subscribers of one process, and its counts of HTTP requests.

    `http`: answers on all routes but infer, by route (empty where there is none), method, status and kind of
    problem. `each`: a subscriber wants every request; `watched`: that, or there is a tracer.

    `fronts`: the counts of front-end processes, which are in all others too. `collect` brings them up to
    date. `keep` takes a record of another process.
    """

    def __init__(self, log_stream: LogStream) -> None:
        self.log_stream = log_stream
        self.lag = LoopLag()
        self.http: Counter[tuple[str, str, int, str]] = Counter()
        self.each = False
        self.watched = False
        self.fronts: dict[int, FrontCounts] = {}
        self.collect: Callable[[], Awaitable[None]] = _nothing_to_collect
        self.keep: RequestSink = lambda record: None
        self._requests: dict[RequestSink, bool] = {}
        self._batches: tuple[BatchSink, ...] = ()
        self._tracer: Tracer | None = None

    def on_request(self, sink: RequestSink, *, each: bool = False) -> None:
        """Call `sink` with the record of a request that was answered or whose client disconnected.

        Without `each`, most good answers on the infer route are left out, since they need no record.
        """
        self._requests = {**self._requests, sink: each}
        self._update()

    def on_batch(self, sink: BatchSink) -> None:
        """Call `sink` with each batch that is finished, its requests still in it."""
        self._batches += (sink,)

    def trace(self, tracer: Tracer) -> None:
        """Ask `tracer` at the beginning of each request, and tell it of each record."""
        self._tracer = tracer
        self.on_request(tracer.request_done)

    def remove(self, sink: RequestSink | BatchSink) -> None:
        """End a subscription."""
        self._requests = {one: each for one, each in self._requests.items() if one != sink}
        self._batches = tuple(one for one in self._batches if one != sink)
        self._update()

    def _update(self) -> None:
        self.each = any(self._requests.values())
        self.watched = self.each or self._tracer is not None

    def watch(self, batcher: Batcher, durations: DurationHistogram) -> None:
        """Pass on the batches of a loaded model. `durations`: to which its answers append."""

        def on_batch(batch: Batch) -> None:
            if len(durations.values) >= PENDING_LIMIT:
                durations.count_in()
            for sink in self._batches:
                _tell(sink, batcher, batch)

        batcher.watch_batches(on_batch)

    def draw(self) -> bool:
        """Return True if a request that has just arrived is traced by the sampling ratio."""
        return self._tracer is not None and self._tracer.draw()

    def begin(self, record: RequestRecord, drawn: bool) -> None:
        """Report a request with a record, whose headers have arrived. `drawn`: what `draw` answered."""
        if self._tracer is not None:
            _tell(self._tracer.begin, record, drawn)

    def request_done(self, record: RequestRecord) -> None:
        """Report a request that is answered, or whose client has disconnected."""
        if not record.request_id:
            record.request_id = new_id()
        for sink in self._requests:
            _tell(sink, record)


def _tell(sink: Callable[..., None], *what: Any) -> None:
    try:
        sink(*what)
    except Exception:
        log.exception("a subscriber to requests or batches failed")
