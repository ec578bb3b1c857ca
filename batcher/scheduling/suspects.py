"""Suspects: sources whose rows the model refused, kept apart from others until their rows run again.

A run fails as a whole: one bad row costs all requests of its batch, and up to 2*log2(n) more runs to find it
among n. Batches pay only while failures are rare (Dorfman, Annals of Mathematical Statistics, 1943). So a
source, a tenant or the connection of an anonymous caller, becomes suspect when its rows fail alone. Its
requests are in a queue of their own then, and share batches only with those of suspects that fail as often: a
batch has half as many rows after each failure, twice as many after each run that succeeds. After
`TRUSTED_RUNS` runs without a failure the source is trusted again. Marks are bounded in number and age.

While others have work now and then, the queue gets `SUSPECT_PART` of the engines' time, and half of that
while they wait: the next run is due when the last one and its answers are that part of the time since its
start. Deadlines are predicted with the part of the moment.
"""

from collections.abc import Callable, Hashable
from math import inf
from typing import NamedTuple

from cobatch.batcher.request import Batch, Request
from cobatch.batcher.scheduling.fair_queueing import Flow
from cobatch.batcher.scheduling.queue import RequestQueue
from cobatch.batcher.scheduling.tuning import SUSPECT_S, SUSPECTS_KEPT, TRUSTED_RUNS
from cobatch.batcher.tenant import Tenant


class _Mark(NamedTuple):
    rows: int  # of a batch with rows of the source
    runs: int  # since its last failure
    failed_s: float


class Suspects:
    """The suspect sources of one model, and the `queue` of their requests, beside that of the others.

    `marks` is empty if there are none. `grown_s`: when a source became suspect last.
    """

    def __init__(self, queue: RequestQueue, others: RequestQueue) -> None:
        self.marks: dict[Hashable, _Mark] = {}  # the oldest failure first
        self.queue = queue
        self._others = others
        self.grown_s = -inf
        self._started_s = -inf  # the last batch
        self._ran_s = 0.0  # its time, in that of all engines

    def holds(self, request: Request) -> bool:
        """Return whether a request is of a suspect source."""
        return request.source in self.marks

    def has_queued(self, request: Request) -> bool:
        """Return whether a queued request is in the queue of suspects."""
        flow = request.entry
        assert isinstance(flow, Flow)
        return self.queue.groups.get(flow.group.key) is flow.group

    def push(self, request: Request) -> None:
        """Queue a request here if its source is suspect, else with the others."""
        mark = self.marks.get(request.source)
        if mark is None:
            self._others.push(request)
        else:
            self.queue.push_apart([request], (request.row_shapes, mark.rows), mark.rows)

    def add(self, request: Request, now_s: float) -> None:
        """Suspect the source of a request that failed alone."""
        source = request.source
        if source is None:
            return
        mark = self.marks.pop(source, None)
        if mark is None:
            self.grown_s = now_s
        before = self._others.full_rows if mark is None else mark.rows
        rows = max(1, before // 2)
        self.marks[source] = _Mark(rows, 0, now_s)
        if len(self.marks) > SUSPECTS_KEPT:
            del self.marks[next(iter(self.marks))]
        if mark is None:
            self._push_again(source, self._others)
        elif rows != before and isinstance(source, Tenant):
            self.queue.regroup(source, rows)

    def on_ran(self, batch: Batch, now_s: float) -> None:
        """Trust the sources of a batch that ran with more rows; forget marks that are too old."""
        marks = self.marks
        for source in {request.source for request in batch.requests} & marks.keys():
            rows, runs, failed_s = marks[source]
            grown = min(rows * 2, self._others.full_rows)
            if runs + 1 == TRUSTED_RUNS:
                del marks[source]
                self._push_again(source, self.queue)
                continue
            marks[source] = _Mark(grown, runs + 1, failed_s)
            if grown != rows and isinstance(source, Tenant):
                self.queue.regroup(source, grown)
        while marks and next(iter(marks.values())).failed_s < now_s - SUSPECT_S:
            del marks[next(iter(marks))]

    def _push_again(self, source: Hashable, queue: RequestQueue) -> None:
        """Move a source's queued requests. An anonymous connection waits for its answers, as a rule."""
        if isinstance(source, Tenant):
            for request in queue.take_tenant(source):
                self.push(request)

    def pace(self, started_s: float, ended_s: float, engines: int) -> None:
        """Note the start and end of the last batch, of run and answers, for the time of the next."""
        self._started_s = started_s
        self._ran_s = (ended_s - started_s) / engines

    def due_s(self, part: float) -> float:
        """Return when the next batch may leave, if suspects get this part of the engines' time."""
        return self._started_s + self._ran_s / part

    def ahead_s(self, request: Request, run_s: Callable[[int], float]) -> float:
        """Return the predicted time of the runs before that of a new request."""
        queue, mark = self.queue, self.marks[request.source]
        if not queue.rows:
            return 0.0
        whole_s = 0.0
        for group in queue.groups.values():
            full, rest = divmod(group.rows, group.most_rows)
            whole_s += full * run_s(group.most_rows)
            if rest and group.key != (request.row_shapes, mark.rows):  # else the last run takes it along
                whole_s += run_s(rest)
        return whole_s * queue.ahead_of(request.tenant) / queue.rows
