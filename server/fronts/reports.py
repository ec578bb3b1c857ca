"""What fronts count, for home: `/metrics`, the live page and `cobatch explain` show one server.

A report has the counts since the last one, so a front that is replaced takes none away: home adds them to its
own. A front with new counts reports with each heartbeat, so that no more are lost if it is killed. Home asks
for reports before it shows something.
"""

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable
from typing import Generic, TypeVar

import msgspec
import numpy as np
from msgspec import Struct

from cobatch.batcher.durations import EDGES_S, DurationHistogram
from cobatch.engines.link.messages import BatchInfo
from cobatch.server.inference.service import Inference
from cobatch.server.links.answers import info_of
from cobatch.server.links.remote import RemoteBatch
from cobatch.server.observability.observer import FrontCounts
from cobatch.server.observability.record import RequestRecord

Key = TypeVar("Key", bound=Hashable)
# Index of a bucket and its count, of those above 0.
Buckets = list[tuple[int, int]]

# A slow front does not delay a page for longer.
_WAIT_S = 0.1
# The most records between two reports: the history keeps twice as many.
_RECORDS = 1024
# Of one report, each of less than 2 KiB.
_RECORDS_SENT = 16
# Instead of the number of a question, in a report that has records only, and that others follow.
_MORE = -1


class Durations(Struct, frozen=True, array_like=True):
    """Counts of a histogram of durations and their sum."""

    buckets: Buckets = []
    sum_s: float = 0.0


class ModelCounts(Struct, frozen=True, array_like=True):
    """Answers to infer requests for one model: those with rows, and the others by status and problem."""

    durations: Durations
    problems: list[tuple[tuple[int, str], int]]


class Record(Struct, frozen=True, array_like=True):
    """A record of a request, see `server.observability.record`."""

    request_id: str
    method: str
    path: str
    received_s: float
    route: str
    enqueued_s: float
    answered_s: float
    model: str
    tenant: str
    status: int
    slug: str
    rows: int
    batch: BatchInfo | None


class Counted(Struct, frozen=True, array_like=True):
    """A report. `asked`: the number of the last question that was answered by then.

    `refused`: by tenant, as name, rule and requests. `connections` is the number now.
    """

    asked: int
    models: list[ModelCounts] = []
    http: list[tuple[tuple[str, str, int, str], int]] = []
    auth: list[tuple[str, int]] = []
    refused: list[tuple[str, int, int]] = []
    dropped_lines: int = 0
    cpu_s: float = 0.0
    lags: Durations = Durations()
    connections: int = 0
    records: list[Record] = []


class Reporter:
    """A front's side. `connections` returns the number of open ones."""

    def __init__(self, inference: Inference, connections: Callable[[], int]) -> None:
        self._inference = inference
        self._connections = connections
        self._records: deque[Record] = deque(maxlen=_RECORDS)
        observer = inference.observer
        models = inference.served.values()
        self._durations = [_Durations(model.infer_traffic.durations) for model in models]
        self._problems = [_Counts(model.infer_traffic.problems) for model in models]
        self._http = _Counts(observer.http)
        self._auth = _Counts(Counter() if inference.auth is None else inference.auth.results)
        self._lags = _Durations(observer.lag.lags)
        self._dropped = 0
        self._cpu_s = 0.0
        observer.on_request(self._on_request)

    def _on_request(self, record: RequestRecord) -> None:
        """Keep a record, unless its id names its place in a batch of home."""
        batch = record.batch
        lead = batch.lead.decode() if isinstance(batch, RemoteBatch) else ""
        if lead and record.request_id.startswith(lead):
            return
        fields = {name: getattr(record, name) for name in Record.__struct_fields__}
        self._records.append(Record(**fields | {"batch": None if batch is None else info_of(batch)}))

    def report(self, send: Callable[[msgspec.Raw], None], asked: int) -> None:
        """Send all that has changed. `asked`: the number of home's question."""
        records = list(self._records)
        self._records.clear()
        while len(records) > _RECORDS_SENT:
            send(_encoded(Counted(_MORE, records=records[:_RECORDS_SENT])))
            records = records[_RECORDS_SENT:]
        send(_encoded(self._counted(asked, records)))

    def has_news(self) -> bool:
        """Return True if requests were counted since the last report."""
        counts = self._http.changed or self._auth.changed or any(one.changed for one in self._problems)
        return bool(self._records) or counts or any(one.changed for one in self._durations)

    def _counted(self, asked: int, records: list[Record]) -> Counted:
        observer, auth = self._inference.observer, self._inference.auth
        dropped, self._dropped = self._dropped, observer.log_stream.dropped
        cpu_s, self._cpu_s = self._cpu_s, observer.lag.cpu_s or 0.0
        return Counted(
            asked,
            [
                ModelCounts(durations.take(), problems.take())
                for durations, problems in zip(self._durations, self._problems, strict=True)
            ],
            self._http.take(),
            self._auth.take(),
            [] if auth is None else auth.tenants.take_refused(),
            self._dropped - dropped,
            self._cpu_s - cpu_s,
            self._lags.take(),
            self._connections(),
            records,
        )


class _Counts(Generic[Key]):
    """Takes the changes of a counter."""

    def __init__(self, counter: Counter[Key]) -> None:
        self._counter = counter
        self._before: Counter[Key] = Counter()

    @property
    def changed(self) -> bool:
        return self._counter != self._before

    def take(self) -> list[tuple[Key, int]]:
        """Return the changes since the last call."""
        before, self._before = self._before, self._counter.copy()
        return list((self._before - before).items())


class _Durations:
    """Takes the changes of a histogram."""

    def __init__(self, histogram: DurationHistogram) -> None:
        self._histogram = histogram
        self._counts, self._sum_s = histogram.read()

    @property
    def changed(self) -> bool:
        return self._histogram.read()[0] is not self._counts

    def take(self) -> Durations:
        """Return the changes since the last call."""
        self._histogram.count_in()
        before, sum_s = self._counts, self._sum_s
        self._counts, self._sum_s = self._histogram.read()
        changes = self._counts - before
        return Durations([(int(i), int(changes[i])) for i in np.flatnonzero(changes)], self._sum_s - sum_s)


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Counted).decode


def _encoded(counted: Counted) -> msgspec.Raw:
    return msgspec.Raw(_encode(counted))


class Reports:
    """Home's side: asks fronts and adds their counts. `ask` returns the fronts that were asked."""

    def __init__(self, inference: Inference, ask: Callable[[int], Collection[int]]) -> None:
        self._inference = inference
        self._ask = ask
        self._asked = 0
        self._questions: dict[int, tuple[set[int], asyncio.Event]] = {}  # fronts that have not answered
        inference.observer.collect = self.collect

    async def collect(self) -> None:
        """Ask all fronts, and wait for their reports, but not long."""
        self._asked += 1
        missing, complete = set(self._ask(self._asked)), asyncio.Event()
        if not missing:
            return
        number = self._asked
        self._questions[number] = missing, complete
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WAIT_S):
                    await complete.wait()
        finally:
            del self._questions[number]

    def gone(self, front: int) -> None:
        """A front has ended. Its counts stay."""
        if front in self._inference.observer.fronts:
            self._inference.observer.fronts[front].connections = 0
        self._came(front, self._asked)

    def _came(self, front: int, asked: int) -> None:
        for number, (missing, complete) in self._questions.items():
            if number <= asked:
                missing.discard(front)
                if not missing:
                    complete.set()

    def on_report(self, front: int, content: msgspec.Raw) -> None:
        """Add a report. Raises msgspec.MsgspecError if it is none."""
        counted = _decode(content)
        for record in counted.records:
            self._inference.observer.keep(_record_of(record))
        if counted.asked == _MORE:
            return
        self._add(front, counted)
        self._came(front, counted.asked)

    def _add(self, front: int, counted: Counted) -> None:
        inference, observer = self._inference, self._inference.observer
        of_front = observer.fronts.setdefault(front, FrontCounts())
        for model, counts in zip(inference.served.values(), counted.models, strict=True):
            traffic = model.infer_traffic
            answers = _add_durations(traffic.durations, counts.durations)
            problems = Counter(dict(counts.problems))
            traffic.problems += problems
            of_front.requests += answers + problems.total()
        http = Counter(dict(counted.http))
        observer.http += http
        of_front.requests += http.total()
        if inference.auth is not None:
            inference.auth.results += Counter(dict(counted.auth))
            for name, rule, refused in counted.refused:
                inference.auth.tenants.by_rule(name, rule).usage.refused += refused
        observer.log_stream.dropped += counted.dropped_lines
        of_front.cpu_s += counted.cpu_s
        _add_durations(of_front.lags, counted.lags)
        of_front.connections = counted.connections


def _add_durations(histogram: DurationHistogram, durations: Durations) -> int:
    """Add to a histogram; return the number of durations."""
    counts = np.zeros(len(EDGES_S) + 1, np.int64)
    for index, count in durations.buckets:
        counts[index] = count
    histogram.add(counts, durations.sum_s)
    return int(counts.sum())


def _record_of(record: Record) -> RequestRecord:
    fields = msgspec.structs.asdict(record)
    batch = None if record.batch is None else RemoteBatch.of(record.batch)
    return RequestRecord(**fields | {"batch": batch})
