"""Many concurrent callers of one model, through NVIDIA's own client of the protocol, one row a request."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tritonclient.http.aio import InferenceServerClient, InferInput

Rows = np.ndarray[Any, np.dtype[Any]]

# Server-Timing: queue;dur=MS, compute;dur=MS, batch;desc=ROWS
METRIC = re.compile(r'(\w+);(?:dur|desc)="?([\d.]+)')


class NoTimesError(Exception):
    """A response came without the Server-Timing header that this demo reports from."""


@dataclass(slots=True)
class Load:
    """What came back: an output row for each input row and round, and where the time went.

    `queue_ms`, `compute_ms` and `batch_rows` have one entry a response; `in_flight` is the most requests
    that were under way at once.
    """

    outputs: list[list[Rows]]
    queue_ms: list[float] = field(default_factory=list)
    compute_ms: list[float] = field(default_factory=list)
    batch_rows: list[int] = field(default_factory=list)
    in_flight: int = 0
    seconds: float = 0.0

    @property
    def requests(self) -> int:
        return len(self.batch_rows)


class TimedClient(InferenceServerClient):  # type: ignore[misc]  # tritonclient ships no types
    """The client as it is, except that it also notes each response's Server-Timing header.

    Its `infer` answers the body alone, so the header is read where the response passes by.
    """

    def __init__(self, url: str, connections: int, load: Load) -> None:
        super().__init__(url, conn_limit=connections)
        self._load = load
        self._under_way = 0

    async def _post(self, *args: Any, **kwargs: Any) -> Any:
        self._under_way += 1
        self._load.in_flight = max(self._load.in_flight, self._under_way)
        try:
            response = await super()._post(*args, **kwargs)
        finally:
            self._under_way -= 1
        if response.status == 200:
            self._note(response.headers.get("Server-Timing", ""))
        return response

    def _note(self, timing: str) -> None:
        figures = dict(METRIC.findall(timing))
        if not figures.keys() >= {"queue", "compute", "batch"}:
            raise NoTimesError(f"Server-Timing should state queue, compute and batch; it is {timing!r}")
        self._load.queue_ms.append(float(figures["queue"]))
        self._load.compute_ms.append(float(figures["compute"]))
        self._load.batch_rows.append(int(figures["batch"]))


async def call(
    url: str, model: str, names: tuple[str, str], rows: Sequence[Rows], callers: int, rounds: int
) -> Load:
    """Sends each row `rounds` times from `callers` tasks at once, each sending one request after another.

    `names` are the model's input and output; `url` is `http://HOST:PORT`. Raises InferenceServerException
    on the first request that is refused or fails, NoTimesError where a response does not say its times.
    """
    load = Load(outputs=[[] for _ in rows])
    requests = [_request(names[0], row) for row in rows]
    jobs = iter([index for _ in range(rounds) for index in range(len(rows))])
    client = TimedClient(url.removeprefix("http://"), callers, load)

    async def caller(jobs: Iterator[int]) -> None:
        for index in jobs:  # shared by all callers: whoever is free takes the next
            result = await client.infer(model, [requests[index]])
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
    request = InferInput(name, [1, *row.shape], "INT32")
    request.set_data_from_numpy(row[np.newaxis])
    return request
