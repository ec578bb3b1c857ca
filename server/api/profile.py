"""POST /v1/profile?seconds=N: what the scheduler does in the next N seconds, for a trace viewer.

While one records, each batch that ends costs a tuple and one more for each request in it, and the loop looks
at its own punctuality and the queues' lengths a hundred times a second; when none does, nothing. The answer
begins at once, and its body, `server.api.trace_events`, comes when the time is over: a client that has seen
enough hangs up, and then nothing more is recorded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cobatch import __version__
from cobatch.batcher.batcher import Batcher
from cobatch.batcher.request import Batch
from cobatch.server.api.routing import guarded
from cobatch.server.api.trace_events import BatchEvent, Sample, trace_text
from cobatch.server.http.problem import Problem, stopping
from cobatch.server.inference.service import Core

MOST_S = 60.0
DEFAULT_S = 5.0
_TICK_S = 0.01
# A busy server answers some ten thousand a second. What is over this is left out, and counted.
_MOST_REQUESTS = 500_000


class Recorder:
    """What has been seen so far. `clock` is the batchers'."""

    def __init__(self, core: Core, clock: Callable[[], float] = time.monotonic) -> None:
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
        self._core.observer.add(batches=self.on_batch)

    def stop(self) -> None:
        """Be told of no more."""
        if self._told:
            self._told = False
            self._core.observer.remove(batches=self.on_batch)

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
                batch.lane.number,
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


def profile_routes(core: Core) -> list[Route]:
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
