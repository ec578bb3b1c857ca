"""POST /v1/profile?seconds=N: the scheduler's work in the next N seconds, as a file for trace viewers.

The file is in Chrome's Trace Event Format, which Perfetto opens. Its tracks, in the groups that viewers show:

* *threads*: the event loop (packing, answering, and its lag), and the worker thread of each engine (runs);
* *slots of MODEL*: a slot belongs to a batch from packing to its last answer, with the stages inside;
* *requests of MODEL*: each request's time in the queue, and the length of the queue as a curve.

Arrows lead from a batch's packing to its run and to its answers.

A recording costs a tuple per batch and per request, and a look at the loop and the queues 100 times a second;
without one nothing is recorded. The response begins at once and ends with the recording, so a client that
disconnects ends it.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

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

DEFAULT_S = 5.0
LIMIT_S = 60.0
_SAMPLE_INTERVAL_S = 0.01
# Some tens of seconds of a busy server. Batches beyond it are left out and counted.
_REQUEST_LIMIT = 500_000
_EVENTS_PER_PIECE = 500  # encoded in a few milliseconds

# Process and thread ids only group the tracks.
_THREADS = 1
_FIRST_SLOTS = 100
_FIRST_REQUESTS = 10_000
_LOOP = 1
_FIRST_WORKER = 10


class RecordedBatch(NamedTuple):
    """A finished batch, and the time of queueing and the rows of each of its requests."""

    model: str
    batch: Batch
    requests: list[tuple[float, int]]


class Sample(NamedTuple):
    """The event loop's lag and the queued rows of each model at one time."""

    time_s: float
    lag_s: float
    queued_rows: dict[str, int]


def profile_routes(inference: Inference) -> list[Route]:
    """Return the route, for Starlette."""
    recording: list[Recorder] = []

    async def record(recorder: Recorder, seconds: float) -> AsyncIterator[bytes]:
        yield b""  # sends the headers
        await recorder.watch(seconds)
        for piece in recorder.text(seconds):
            yield piece
            await asyncio.sleep(0)  # let the loop serve requests between the pieces

    async def profile(request: Request) -> Response:
        seconds = _seconds(request.query_params.get("seconds"))
        if inference.draining:
            raise stopping()
        if recording:
            raise Problem("profile-running", "another profile is being recorded", retry_after_s=LIMIT_S)
        name = datetime.now(UTC).strftime("cobatch-%Y%m%dT%H%M%SZ.trace.json")
        headers = {"content-disposition": f'attachment; filename="{name}"', "cache-control": "no-store"}
        recorder = Recorder(inference)
        # There is no await since the check above, so concurrent requests cannot both record.
        recording.append(recorder)
        inference.observer.on_batch(recorder.on_batch)

        def end() -> None:
            inference.observer.remove(recorder.on_batch)
            recording.remove(recorder)

        response = _Recording(record(recorder, seconds), media_type="application/json", headers=headers)
        response.end = end
        return response

    return [Route("/v1/profile", guarded(inference, "admin", profile), methods=["POST"])]


def _seconds(text: str | None) -> float:
    try:
        seconds = DEFAULT_S if text is None else float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LIMIT_S:  # nan fails this too
        detail = f"seconds must be a number above 0 and at most {LIMIT_S:g}, got {text!r}"
        raise Problem("bad-parameter", detail, parameter="seconds")
    return seconds


class _Recording(StreamingResponse):
    """The response. It calls `end` however it ends, even before its first piece."""

    end: Callable[[], None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.end()


class Recorder:
    """The batches and samples of one recording. `clock` is the batchers'."""

    def __init__(self, inference: Inference, clock: Callable[[], float] = time.monotonic) -> None:
        self._inference = inference
        self._clock = clock
        self.begin_s = clock()
        self.batches: list[RecordedBatch] = []
        self.samples: list[Sample] = []
        self._left_out = 0
        self._requests = 0

    def on_batch(self, batcher: Batcher, batch: Batch) -> None:
        self._requests += len(batch.requests)
        if self._requests > _REQUEST_LIMIT:
            self._left_out += 1
            return
        requests = [(one.enqueued_s, one.rows) for one in batch.requests]
        self.batches.append(RecordedBatch(batcher.name, batch, requests))

    async def watch(self, seconds: float) -> None:
        """Sample the loop and the queues until the time is over or the server stops."""
        end_s = self.begin_s + seconds
        while not self._inference.draining and (now_s := self._clock()) < end_s:
            sleep_s = min(_SAMPLE_INTERVAL_S, end_s - now_s)
            await asyncio.sleep(sleep_s)
            models = self._inference.models.values()
            queued = {one.name: one.batcher.queue.rows for one in models if one.batcher is not None}
            awake_s = self._clock()
            self.samples.append(Sample(awake_s, awake_s - now_s - sleep_s, queued))

    def text(self, seconds: float) -> Iterator[bytes]:
        """Yield the file in pieces."""
        about = {
            "server": f"cobatch {__version__}",
            "recorded": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": seconds,
            "batches": len(self.batches),
            "batches_left_out": self._left_out,
        }
        return trace_text(tuple(self.batches), self.samples, self.begin_s, about)


def trace_text(
    batches: Sequence[RecordedBatch], samples: Sequence[Sample], begin_s: float, about: dict[str, Any]
) -> Iterator[bytes]:
    """Yield the file in pieces. Its time 0 is `begin_s`, or earlier if a request was queued before that."""
    layout = _Layout(batches, samples, begin_s)
    yield b'{"displayTimeUnit":"ms","otherData":%b,"traceEvents":[\n' % msgspec.json.encode(about)
    yield _lines(layout.names())
    events = chain.from_iterable(chain(map(layout.sample, samples), map(layout.batch, batches)))
    while piece := list(islice(events, _EVENTS_PER_PIECE)):
        yield b",\n" + _lines(piece)
    yield b"\n]}\n"


def _lines(events: Iterable[Event]) -> bytes:
    return b",\n".join([msgspec.json.encode(event) for event in events])


class _Layout:
    """The tracks, and the events on them."""

    def __init__(self, batches: Sequence[RecordedBatch], samples: Sequence[Sample], begin_s: float) -> None:
        # Viewers drop events before 0, so time 0 is the earliest event.
        queued_s = [queued_s for one in batches for queued_s, _ in one.requests]
        self._begin_s = min([begin_s, *queued_s, *[one.batch.gathered_s for one in batches]])
        models = dict.fromkeys(model for sample in samples for model in sample.queued_rows)
        models |= dict.fromkeys(one.model for one in batches)
        self._models = {model: number for number, model in enumerate(models)}
        self._slots = sorted({(self._models[one.model], one.batch.engine, one.batch.slot) for one in batches})
        engines = dict.fromkeys((model, engine) for model, engine, _ in self._slots)
        self._workers = {engine: _FIRST_WORKER + number for number, engine in enumerate(engines)}
        self._request = 0

    def names(self) -> Iterator[Event]:
        """Yield names and order of the tracks."""
        by_number = {number: model for model, number in self._models.items()}
        yield from _named("process", _THREADS, 0, "threads")
        yield from _named("thread", _THREADS, _LOOP, "event loop")
        for (model, engine), thread in self._workers.items():
            yield from _named("thread", _THREADS, thread, f"worker {engine} of {by_number[model]}")
        for number, name in by_number.items():
            yield from _named("process", _FIRST_SLOTS + number, 0, f"slots of {name}")
            yield from _named("process", _FIRST_REQUESTS + number, 0, f"requests of {name}")
        for number, engine, slot in self._slots:
            name = f"engine {engine}, slot {slot}"
            yield from _named("thread", _FIRST_SLOTS + number, _slot_track(engine, slot), name)

    def sample(self, sample: Sample) -> Iterator[Event]:
        """Yield a point of each curve."""
        lag = {"ms": round(max(0.0, sample.lag_s) * 1e3, 3)}
        yield self._at(sample.time_s, "C", "event loop lag", _THREADS, _LOOP, args=lag)
        for model, rows in sample.queued_rows.items():
            process = _FIRST_REQUESTS + self._models[model]
            yield self._at(sample.time_s, "C", "queued", process, 0, args={"rows": rows})

    def batch(self, recorded: RecordedBatch) -> Iterator[Event]:
        """Yield the events of a batch and of its requests."""
        batch, number = recorded.batch, self._models[recorded.model]
        args: dict[str, Any] = {"model": recorded.model, "batch": batch.number, "rows": batch.rows}
        args |= {"requests": len(recorded.requests), "reason": batch.reason}
        args |= {"failed": True} if batch.failed else {}
        slots, track = _FIRST_SLOTS + number, _slot_track(batch.engine, batch.slot)
        worker = self._workers[number, batch.engine]
        name = f"{batch.rows} row{'' if batch.rows == 1 else 's'}, {batch.reason}"
        arrow = {"id": batch.number, "cat": "batch"}
        packed_s = batch.dispatched_s or batch.answering_s  # 0: packing failed
        yield self._slice(batch.gathered_s, batch.answered_s, name, slots, track, args=args)
        yield self._slice(batch.gathered_s, packed_s, "fill", slots, track)
        yield self._slice(batch.gathered_s, packed_s, "pack", _THREADS, _LOOP, args=args)
        yield self._at(batch.gathered_s, "s", "batch", _THREADS, _LOOP, **arrow)
        if batch.dispatched_s:
            yield self._slice(packed_s, batch.started_s, "wait for the engine", slots, track)
            yield self._slice(batch.started_s, batch.finished_s, "run", slots, track)
            yield self._slice(batch.finished_s, batch.answering_s, "wait for the loop", slots, track)
            yield self._slice(batch.started_s, batch.finished_s, f"run {name}", _THREADS, worker, args=args)
            yield self._at(batch.started_s, "t", "batch", _THREADS, worker, **arrow)
        yield self._slice(batch.answering_s, batch.answered_s, "answer", slots, track)
        yield self._slice(batch.answering_s, batch.answered_s, "answer", _THREADS, _LOOP, args=args)
        yield self._at(batch.answering_s, "f", "batch", _THREADS, _LOOP, **arrow, bp="e")
        process = _FIRST_REQUESTS + number
        for queued_s, rows in recorded.requests:
            self._request += 1
            # A local id keeps the wait inside the group of its model.
            ids: dict[str, Any] = {"cat": "request", "id2": {"local": self._request}}
            of_request = {"rows": rows, "batch": batch.number}
            yield self._at(queued_s, "b", "queued", process, 0, args=of_request, **ids)
            yield self._at(batch.gathered_s, "e", "queued", process, 0, **ids)

    def _at(self, time_s: float, phase: str, name: str, process: int, track: int, **more: Any) -> Event:
        return {"ph": phase, "name": name, "pid": process, "tid": track, "ts": self._us(time_s), **more}

    def _slice(self, from_s: float, to_s: float, name: str, process: int, track: int, **more: Any) -> Event:
        duration = round(max(0.0, self._us(to_s) - self._us(from_s)), 3)
        return self._at(from_s, "X", name, process, track, dur=duration, **more)

    def _us(self, time_s: float) -> float:
        return round((time_s - self._begin_s) * 1e6, 3)


def _slot_track(engine: int, slot: int) -> int:
    return 1 + engine * 1000 + slot


def _named(kind: str, process: int, thread: int, name: str) -> Iterator[Event]:
    track = {"pid": process, "tid": thread}
    yield {"ph": "M", "name": f"{kind}_name", **track, "args": {"name": name}}
    yield {"ph": "M", "name": f"{kind}_sort_index", **track, "args": {"sort_index": process + thread}}
