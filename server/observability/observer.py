"""What is counted of requests, and who else is told of them.

Counting is always on, so it has to cost next to nothing: an answer with rows is an element appended to a list
(`batcher.durations`), any other one a count in a dict. Records of single requests
(`server.observability.record`) are made only where somebody wants them, and what that one raises never
reaches a request.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.durations import PENDING_LIMIT, DurationHistogram
from cobatch.batcher.request import Batch
from cobatch.server.http.request_id import new_id
from cobatch.server.observability.event_loop import LoopLag
from cobatch.server.observability.record import Record

if TYPE_CHECKING:
    from cobatch.server.auth.tenants import Tenants, Total
    from cobatch.server.inference.model import Model

log = logging.getLogger("cobatch.observe")

# What stands for the status where the client left before there was one, as nginx has it.
LEFT = 499
LEFT_SLUG = "client-left"

_FAILED = "whoever watches requests failed"

RecordSink = Callable[[Record], None]
BatchSink = Callable[[Batcher, Batch], None]


class Sampler(Protocol):
    """Wants records of some requests, and decides of which when they come."""

    def draw(self) -> bool: ...

    def begin(self, record: Record, drawn: bool) -> None: ...


class Traffic:
    """Inference requests for one model. `durations` of those that were answered with rows: from complete
    headers until the answer was written. `problems`: all others, by status and kind of problem."""

    __slots__ = ("durations", "problems")

    def __init__(self) -> None:
        self.durations = DurationHistogram()
        self.problems: Counter[tuple[int, str]] = Counter()

    def count(self, status: int, slug: str, duration_s: float) -> None:
        """Count an answer."""
        if status != 200:
            self.problems[status, slug] += 1
            return
        values = self.durations.values
        values.append(duration_s)
        if len(values) >= PENDING_LIMIT:
            self.durations.count_in()

    def count_alike(self, answers: int, duration_s: float) -> None:
        """Count so many answers with rows that were given together."""
        values = self.durations.values
        values += [duration_s] * answers
        if len(values) >= PENDING_LIMIT:
            self.durations.count_in()

    def plus(self, other: Traffic) -> Traffic:
        """That of both."""
        both = Traffic()
        both.durations = self.durations.plus(other.durations)
        both.problems = self.problems + other.problems
        return both


class Observer:
    """Of one process. `http`: answers of everything but the infer route, by route, method, status and kind
    of problem; the route is empty where there is none."""

    def __init__(self, models: Mapping[str, Model], tenants: Tenants | None) -> None:
        self.models = models
        self._tenants = tenants
        self.lag = LoopLag()
        self.http: Counter[tuple[str, str, int, str]] = Counter()
        self.watched = False  # whether anybody may want a record of a good request
        self._begin: list[RecordSink] = []
        self._requests: list[RecordSink] = []
        self._recorded: list[RecordSink] = []
        self._sampler: Sampler | None = None
        self.each = False  # whether anybody wants a record of each request
        self._batches: list[BatchSink] = []

    def add(
        self,
        *,
        begin: RecordSink | None = None,
        requests: RecordSink | None = None,
        recorded: RecordSink | None = None,
        batches: BatchSink | None = None,
    ) -> None:
        """Tell these from now on: of each request when its headers are there, and when it is answered or its
        client has left; `recorded` only of those that have a record anyhow (all but most good ones of the
        infer route); of each batch when it is dealt with, its requests still in it. They must be quick, and
        may keep records and batches."""
        if recorded is not None:
            self._recorded.append(recorded)
        if begin is not None:
            self._begin.append(begin)
        if requests is not None:
            self._requests.append(requests)
        if batches is not None:
            self._batches.append(batches)
        self._changed()

    def remove(
        self,
        *,
        begin: RecordSink | None = None,
        requests: RecordSink | None = None,
        batches: BatchSink | None = None,
    ) -> None:
        """Tell these no more."""
        if begin is not None:
            self._begin.remove(begin)
        if requests is not None:
            self._requests.remove(requests)
        if batches is not None:
            self._batches.remove(batches)
        self._changed()

    def _changed(self) -> None:
        self.each = bool(self._begin or self._requests)
        self.watched = self.each or self._sampler is not None
        for model in self.models.values():
            self.watch(model)

    @property
    def traffic(self) -> dict[str, Traffic]:
        """By model, whichever way it came."""
        return {name: model.infer_traffic.plus(model.traffic) for name, model in self.models.items()}

    def tenants(self) -> list[tuple[str, Total]]:
        """What the busiest tenants have had, by name, and all others together; none where nobody is known."""
        return [] if self._tenants is None else self._tenants.totals()

    def watch(self, model: Model) -> None:
        """See to it that batches of a model that has been loaded are told of, if anybody wants them."""
        batcher = model.batcher
        if batcher is not None:
            batcher.watch_batches(_Ended(batcher, model, tuple(self._batches)).batch)

    def sample(self, sampler: Sampler) -> None:
        """Let it draw which requests have a record although nothing else calls for one, and tell it of all
        records' beginnings."""
        self._sampler = sampler
        self._changed()

    def draw(self) -> bool:
        """Whether the lot falls on a request that has just come."""
        return self._sampler is not None and self._sampler.draw()

    def begin(self, record: Record, drawn: bool = False) -> None:
        """A request's headers are there. `drawn`: what `draw` said of it."""
        for sink in self._begin:
            _tell(sink, record)
        if self._sampler is not None:
            _tell(self._sampler.begin, record, drawn)

    def request_done(self, record: Record) -> None:
        """It is answered, or its client has left; then it may have no id yet."""
        if not record.request_id:
            record.request_id = new_id()
        for sink in self._requests:
            _tell(sink, record)
        for sink in self._recorded:
            _tell(sink, record)


class _Ended:
    """Is told of each batch of one model that is over, and tells the sinks."""

    __slots__ = ("_batcher", "_durations", "_sinks")

    def __init__(self, batcher: Batcher, model: Model, sinks: tuple[BatchSink, ...]) -> None:
        self._batcher = batcher
        self._durations = model.infer_traffic.durations
        self._sinks = sinks

    def batch(self, batch: Batch) -> None:
        # Those that rode in it have appended theirs.
        if len(self._durations.values) >= PENDING_LIMIT:
            self._durations.count_in()
        for sink in self._sinks:
            try:
                sink(self._batcher, batch)
            except Exception:
                log.exception(_FAILED)


def _tell(sink: Callable[..., None], *what: Any) -> None:
    try:
        sink(*what)
    except Exception:
        log.exception(_FAILED)
