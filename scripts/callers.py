"""Concurrent callers of one model, with NVIDIA's client of the V2 protocol and one row per request."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tritonclient.http.aio import InferenceServerClient, InferInput
from tritonclient.utils import np_to_triton_dtype

Rows = np.ndarray[Any, np.dtype[Any]]

# Server-Timing: queue;dur=MS, compute;dur=MS, batch;desc=ROWS
METRIC = re.compile(r'(\w+);(?:dur|desc)="?([\d.]+)')


class NoTimesError(Exception):
    """A response has no Server-Timing header with queue, compute and batch."""


@dataclass(slots=True)
class Load:
    """The outputs, one for each input row and round, and the times of the requests.

    `queue_ms`, `compute_ms`, `batch_rows` and `latency_ms`, which is measured here, have an entry for each
    response; `in_flight` is the highest number of concurrent requests.
    """

    outputs: list[list[Rows]]
    queue_ms: list[float] = field(default_factory=list)
    compute_ms: list[float] = field(default_factory=list)
    batch_rows: list[int] = field(default_factory=list)
    latency_ms: list[float] = field(default_factory=list)
    in_flight: int = 0
    seconds: float = 0.0

    @property
    def requests(self) -> int:
        return len(self.batch_rows)

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds

    @property
    def mean_batch(self) -> float:
        """Rows of a batch, averaged over batches: each request of a batch of N is 1/N of it."""
        return self.requests / sum(1 / rows for rows in self.batch_rows)


class TimedClient(InferenceServerClient):  # type: ignore[misc]  # tritonclient ships no types
    """A client that also records each response's Server-Timing header.

    `infer` returns the body alone, so the header is read in `_post`.
    """

    def __init__(self, url: str, connections: int, load: Load) -> None:
        super().__init__(url, conn_limit=connections)
        self._load = load
        self._in_flight = 0

    async def _post(self, *args: Any, **kwargs: Any) -> Any:
        self._in_flight += 1
        self._load.in_flight = max(self._load.in_flight, self._in_flight)
        try:
            response = await super()._post(*args, **kwargs)
        finally:
            self._in_flight -= 1
        if response.status == 200:
            self._record(response.headers.get("Server-Timing", ""))
        return response

    def _record(self, timing: str) -> None:
        figures = dict(METRIC.findall(timing))
        if not figures.keys() >= {"queue", "compute", "batch"}:
            raise NoTimesError(f"expected queue, compute and batch in Server-Timing, got {timing!r}")
        self._load.queue_ms.append(float(figures["queue"]))
        self._load.compute_ms.append(float(figures["compute"]))
        self._load.batch_rows.append(int(figures["batch"]))


async def call(
    url: str, model: str, names: tuple[str, str], rows: Sequence[Rows], callers: int, rounds: int
) -> Load:
    """Send each row `rounds` times from `callers` concurrent tasks, each in a closed loop.

    `names` are the model's input and output; `url` is `http://HOST:PORT`. Raises InferenceServerException for
    the first request that is refused or fails, and NoTimesError.
    """
    load = Load(outputs=[[] for _ in rows])
    requests = [_request(names[0], row) for row in rows]
    jobs = iter([index for _ in range(rounds) for index in range(len(rows))])
    client = TimedClient(url.removeprefix("http://"), callers, load)

    async def caller(jobs: Iterator[int]) -> None:
        for index in jobs:  # shared by all callers
            sent_s = time.perf_counter()
            result = await client.infer(model, [requests[index]])
            load.latency_ms.append((time.perf_counter() - sent_s) * 1000)
            load.outputs[index].append(result.as_numpy(names[1])[0])

    try:
        begin_s = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(caller(jobs))
        load.seconds = time.perf_counter() - begin_s
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    finally:
        await client.close()
    return load


def _request(name: str, row: Rows) -> InferInput:
    request = InferInput(name, [1, *row.shape], np_to_triton_dtype(row.dtype))
    request.set_data_from_numpy(row[np.newaxis])
    return request
