"""Scheduler events as a file for trace viewers: Chrome's Trace Event Format, which Perfetto opens.

Tracks, in groups as the viewers show them:

* *threads*: the event loop (packing, writing answers; how late its timers are), and for each engine its
  worker thread (the runs);
* *slots of MODEL*: a slot belongs to a batch from packing to its last answer; what it does meanwhile lies
  inside that;
* *requests of MODEL*: each request's wait in the queue, and the queue's length as a curve.

Arrows lead from a batch's packing to its run and to its answers. A pure function: events in, text out, piece
by piece, since the text of some seconds is megabytes.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU

POST /v1/profile?seconds=N: what the scheduler does in the next N seconds, for a trace viewer.

While one records, each batch that ends costs a tuple and one more for each request in it, and the loop looks
at its own punctuality and the queues' lengths a hundred times a second; when none does, nothing. The answer
begins at once, and its body, `server.api.profile`, comes when the time is over: a client that has seen
enough hangs up, and then nothing more is recorded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain, islice
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cobatch import __version__
from cobatch.batcher.batcher import Batcher
from cobatch.batcher.request import Batch
from cobatch.server.api.routing import guarded
from cobatch.server.http.problem import Problem, stopping
from cobatch.server.inference.service import Inference

Event = dict[str, Any]

# Process ids are only what viewers group tracks by.
_THREADS = 1
_FIRST_SLOTS = 100
_FIRST_REQUESTS = 10_000
_LOOP = 1
_FIRST_WORKER = 10
_PIECE = 500  # events, some milliseconds' work


class BatchEvent(NamedTuple):
    """A batch that is over. Times are seconds of one monotonic clock; `lane` counts a model's engines.

    `requests`: of each, when it was queued, and its rows. `started_s` and `finished_s` are 0 where nothing
    was run, because packing failed.
    """

    model: str
    lane: int
    slot: int
    number: int
    rows: int
    reason: str
    requests: Sequence[tuple[float, int]]
    gathered_s: float
    dispatched_s: float
    started_s: float
    finished_s: float
    answering_s: float
    answered_s: float
    failed: bool = False


class Sample(NamedTuple):
    """What was looked at in between: how late the loop was, and each model's queued rows."""

    time_s: float
    late_s: float
    queued_rows: dict[str, int]


def trace_text(
    batches: Sequence[BatchEvent], samples: Sequence[Sample], begin_s: float, about: dict[str, Any]
) -> Iterator[bytes]:
    """The file, in pieces. Its times begin at `begin_s`, or with what had begun before that; `about` is for
    whoever reads it as text."""
    layout = _Layout(batches, samples, begin_s)
    yield b'{"displayTimeUnit":"ms","otherData":%b,"traceEvents":[\n' % msgspec.json.encode(about)
    yield _lines(layout.names())
    events = chain(
        (event for one in samples for event in layout.sample(one)),
        (event for one in batches for event in layout.batch(one)),
    )
    while piece := list(islice(events, _PIECE)):
        yield b",\n" + _lines(piece)
    yield b"\n]}\n"


def _lines(events: Iterable[Event]) -> bytes:
    return b",\n".join([msgspec.json.encode(event) for event in events])


class _Layout:
    """Where each event stands."""

    def __init__(self, batches: Sequence[BatchEvent], samples: Sequence[Sample], begin_s: float) -> None:
        # Who had been queued before is there too, and viewers drop what is before 0.
        queued_s = [queued_s for batch in batches for queued_s, _ in batch.requests]
        gathered_s = [batch.gathered_s for batch in batches]
        self._begin_s = min([begin_s, *queued_s, *gathered_s])
        models = dict.fromkeys(model for sample in samples for model in sample.queued_rows)
        models |= dict.fromkeys(batch.model for batch in batches)
        self._models = {model: number for number, model in enumerate(models)}
        lanes = sorted({(self._models[batch.model], batch.lane) for batch in batches})
        self._workers = {lane: _FIRST_WORKER + number for number, lane in enumerate(lanes)}
        self._slots = sorted({(self._models[b.model], b.lane, b.slot) for b in batches})
        self._request = 0

    def names(self) -> Iterator[Event]:
        """What the tracks are called, and in which order they stand."""
        by_number = {number: model for model, number in self._models.items()}
        yield from _named("process", _THREADS, 0, "threads")
        yield from _named("thread", _THREADS, _LOOP, "event loop")
        for (model, lane), thread in self._workers.items():
            yield from _named("thread", _THREADS, thread, f"worker {lane} of {by_number[model]}")
        for number, name in by_number.items():
            yield from _named("process", _FIRST_SLOTS + number, 0, f"slots of {name}")
            yield from _named("process", _FIRST_REQUESTS + number, 0, f"requests of {name}")
        for number, lane, slot in self._slots:
            track = f"engine {lane}, slot {slot}"
            yield from _named("thread", _FIRST_SLOTS + number, _slot_track(lane, slot), track)

    def sample(self, sample: Sample) -> Iterator[Event]:
        """Two curves."""
        late = {"ms": round(max(0.0, sample.late_s) * 1e3, 3)}
        yield self._at(sample.time_s, "C", "loop is late by", _THREADS, _LOOP, args=late)
        for model, rows in sample.queued_rows.items():
            process = _FIRST_REQUESTS + self._models[model]
            yield self._at(sample.time_s, "C", "queued", process, 0, args={"rows": rows})

    def batch(self, batch: BatchEvent) -> Iterator[Event]:
        """All that there is of one batch."""
        number = self._models[batch.model]
        said: dict[str, Any] = {
            "model": batch.model,
            "batch": batch.number,
            "rows": batch.rows,
            "requests": len(batch.requests),
            "reason": batch.reason,
        }
        if batch.failed:
            said["failed"] = True
        slots, track = _FIRST_SLOTS + number, _slot_track(batch.lane, batch.slot)
        worker = self._workers[number, batch.lane]
        ran = batch.finished_s > 0
        name = f"{batch.rows} row{'' if batch.rows == 1 else 's'}, {batch.reason}"
        yield self._slice(batch.gathered_s, batch.answered_s, name, slots, track, said)
        for what, from_s, to_s in _stages(batch):
            yield self._slice(from_s, to_s, what, slots, track)
        yield self._slice(batch.gathered_s, batch.dispatched_s, "pack", _THREADS, _LOOP, said)
        yield self._at(batch.gathered_s, "s", "batch", _THREADS, _LOOP, id=batch.number, cat="batch")
        if ran:
            yield self._slice(batch.started_s, batch.finished_s, f"run {name}", _THREADS, worker, said)
            yield self._at(batch.started_s, "t", "batch", _THREADS, worker, id=batch.number, cat="batch")
        yield self._slice(batch.answering_s, batch.answered_s, "answer", _THREADS, _LOOP, said)
        yield self._at(batch.answering_s, "f", "batch", _THREADS, _LOOP, id=batch.number, cat="batch", bp="e")
        for queued_s, rows in batch.requests:
            self._request += 1
            where = (_FIRST_REQUESTS + number, 0)
            # An id of this group alone: its waits are shown in it, not beside all groups.
            its: dict[str, Any] = {"cat": "request", "id2": {"local": self._request}}
            args = {"rows": rows, "batch": batch.number}
            yield self._at(queued_s, "b", "queued", *where, args=args, **its)
            yield self._at(batch.gathered_s, "e", "queued", *where, **its)

    def _at(self, time_s: float, phase: str, name: str, process: int, track: int, **more: Any) -> Event:
        return {"ph": phase, "name": name, "pid": process, "tid": track, "ts": self._us(time_s), **more}

    def _slice(
        self,
        from_s: float,
        to_s: float,
        name: str,
        process: int,
        track: int,
        args: dict[str, Any] | None = None,
    ) -> Event:
        us = self._us(from_s)
        event = {"ph": "X", "name": name, "pid": process, "tid": track, "ts": us}
        event["dur"] = round(max(0.0, self._us(to_s) - us), 3)
        return event if args is None else event | {"args": args}

    def _us(self, time_s: float) -> float:
        return round((time_s - self._begin_s) * 1e6, 3)


def _stages(batch: BatchEvent) -> list[tuple[str, float, float]]:
    """What a slot does, one after another."""
    if not batch.finished_s:
        return [
            ("fill", batch.gathered_s, batch.dispatched_s),
            ("answer", batch.answering_s, batch.answered_s),
        ]
    return [
        ("fill", batch.gathered_s, batch.dispatched_s),
        ("wait for the engine", batch.dispatched_s, batch.started_s),
        ("run", batch.started_s, batch.finished_s),
        ("wait for the loop", batch.finished_s, batch.answering_s),
        ("answer", batch.answering_s, batch.answered_s),
    ]


def _slot_track(lane: int, slot: int) -> int:
    return 1 + lane * 1000 + slot


def _named(what: str, process: int, thread: int, name: str) -> Iterator[Event]:
    track = {"pid": process, "tid": thread}
    yield {"ph": "M", "name": f"{what}_name", **track, "args": {"name": name}}
    yield {"ph": "M", "name": f"{what}_sort_index", **track, "args": {"sort_index": process + thread}}


MOST_S = 60.0
DEFAULT_S = 5.0
_TICK_S = 0.01
# A busy server answers some ten thousand a second. What is over this is left out, and counted.
_MOST_REQUESTS = 500_000


class Recorder:
    """What has been seen so far. `clock` is the batchers'."""

    def __init__(self, core: Inference, clock: Callable[[], float] = time.monotonic) -> None:
        self._core = core
        self._clock = clock
        self.begin_s = clock()
        self.batches: list[BatchEvent] = []
        self.samples: list[Sample] = []
        self.left_out = 0
        self._requests = 0
        self._told = False

    def start(self) -> None:
        """Be told of batches."""
        self._told = True
        self._core.observer.on_batch(self.on_batch)

    def stop(self) -> None:
        """Be told of no more."""
        if self._told:
            self._told = False
            self._core.observer.remove(self.on_batch)

    def on_batch(self, batcher: Batcher, batch: Batch) -> None:
        """A batch is over."""
        requests = batch.requests
        packed = batch.dispatched_s > 0
        self._requests += len(requests)
        if self._requests > _MOST_REQUESTS:
            self.left_out += 1
            return
        self.batches.append(
            BatchEvent(
                batcher.name,
                batch.engine,
                batch.slot,
                batch.number,
                batch.rows,
                batch.reason,
                [(one.enqueued_s, one.rows) for one in requests],
                batch.gathered_s,
                batch.dispatched_s if packed else batch.answering_s,
                batch.started_s if packed else 0.0,
                batch.finished_s if packed else 0.0,
                batch.answering_s,
                batch.answered_s,
                batch.failed,
            )
        )

    async def watch(self, seconds: float) -> None:
        """Look at the loop and the queues until the time is over, or the server stops."""
        clock = self._clock
        end_s = self.begin_s + seconds
        while not self._core.draining and (now_s := clock()) < end_s:
            sleep_s = min(_TICK_S, end_s - now_s)
            await asyncio.sleep(sleep_s)
            models = self._core.models.values()
            queued = {one.name: one.batcher.queued_rows for one in models if one.batcher is not None}
            woke_s = clock()
            self.samples.append(Sample(woke_s, woke_s - now_s - sleep_s, queued))

    def about(self, seconds: float) -> dict[str, Any]:
        """What the file says of itself."""
        return {
            "server": f"cobatch {__version__}",
            "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
            "batches": len(self.batches),
            "batches_left_out": self.left_out,
        }


class _Recording(StreamingResponse):
    """The answer. However it ends, also where it has not come to its first piece, `over` is called."""

    over: Callable[[], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.over()


def profile_routes(core: Inference) -> list[Route]:
    """The route, for Starlette."""
    recording: list[Recorder] = []

    async def record(recorder: Recorder, seconds: float) -> AsyncIterator[bytes]:
        # Sends the headers.
        yield b""
        await recorder.watch(seconds)
        recorder.stop()
        about = recorder.about(seconds)
        for piece in trace_text(recorder.batches, recorder.samples, recorder.begin_s, about):
            yield piece
            # Others first: a piece is some milliseconds' work.
            await asyncio.sleep(0)

    async def profile(request: Request) -> Response:
        seconds = _seconds(request.query_params.get("seconds"))
        if core.draining:
            raise stopping()
        if recording:
            detail = "somebody else records a profile now"
            raise Problem("profile-running", detail, retry_after_s=MOST_S)
        name = datetime.now(UTC).strftime("cobatch-%Y%m%dT%H%M%SZ.trace.json")
        headers = {"content-disposition": f'attachment; filename="{name}"', "cache-control": "no-store"}
        recorder = Recorder(core)
        # Before anything is awaited: of several who ask at once, one records.
        recording.append(recorder)
        recorder.start()

        def over() -> None:
            recorder.stop()
            recording.remove(recorder)

        response = _Recording(record(recorder, seconds), media_type="application/json", headers=headers)
        response.over = over
        return response

    return [Route("/v1/profile", guarded(core, "admin", profile), methods=["POST"])]


def _seconds(given: str | None) -> float:
    try:
        seconds = DEFAULT_S if given is None else float(given)
    except ValueError:
        seconds = 0.0
    # Not a number is not in it either.
    if not 0 < seconds <= MOST_S:
        detail = f"seconds must be a number over 0 and up to {MOST_S:g}, got {given!r}"
        raise Problem("bad-parameter", detail, parameter="seconds")
    return seconds
