"""The common recipe: an asyncio queue, a task that gathers a batch, a thread that runs it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import orjson
import shared
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

model = shared.Model()
_Waiting = tuple[np.ndarray[Any, Any], "asyncio.Future[np.ndarray[Any, Any]]"]


async def gather(queue: asyncio.Queue[_Waiting]) -> list[_Waiting]:
    """Wait for a request, and take others until the batch is full or the time is over."""
    loop = asyncio.get_running_loop()
    batch = [await queue.get()]
    until = loop.time() + shared.MAX_WAIT_MS / 1000
    while len(batch) < shared.MAX_BATCH:
        try:
            batch.append(queue.get_nowait())
        except asyncio.QueueEmpty:
            try:
                batch.append(await asyncio.wait_for(queue.get(), until - loop.time()))
            except TimeoutError:
                break
    return [one for one in batch if not one[1].done()]


async def work(queue: asyncio.Queue[_Waiting]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        batch = await gather(queue)
        if not batch:
            continue
        try:
            outputs = await loop.run_in_executor(None, model, np.stack([row for row, _ in batch]))
        except Exception as error:  # noqa: BLE001 - it is passed to the waiting requests
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            continue
        for (_, future), output in zip(batch, outputs, strict=True):
            if not future.done():
                future.set_result(output)


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    app.state.queue = asyncio.Queue(shared.MAX_QUEUE)
    task = asyncio.create_task(work(app.state.queue))
    yield
    task.cancel()


async def submit(request: Request, row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    future = asyncio.get_running_loop().create_future()
    request.app.state.queue.put_nowait((row, future))
    if not shared.DEADLINE_MS:
        return await future
    return await asyncio.wait_for(future, shared.DEADLINE_MS / 1000)


async def predict(request: Request) -> Response:
    row = np.array(orjson.loads(await request.body())["x"], model.dtype)
    output = await submit(request, row)
    return Response(
        orjson.dumps({"y": output}, option=orjson.OPT_SERIALIZE_NUMPY), 200, None, "application/json"
    )


async def predict_raw(request: Request) -> Response:
    output = await submit(request, np.frombuffer(await request.body(), model.dtype))
    return Response(output.tobytes(), 200, None, "application/octet-stream")


async def late(_request: Request, _error: Exception) -> Response:
    return Response(b"too late", 504)


async def full(_request: Request, _error: Exception) -> Response:
    return Response(b"too many requests are waiting", 503)


async def health(_request: Request) -> Response:
    return Response(b"ok")


app = Starlette(
    routes=[
        Route("/predict", predict, methods=["POST"]),
        Route("/raw", predict_raw, methods=["POST"]),
        Route("/health", health),
    ],
    exception_handlers={TimeoutError: late, asyncio.QueueFull: full},
    lifespan=lifespan,
)

if __name__ == "__main__":
    uvicorn.run(app, port=shared.PORT, loop="uvloop", http="httptools", access_log=False, log_level="warning")
