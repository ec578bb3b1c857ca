"""The request path alone, in one process: bytes are passed to the protocol, and answers are taken from it.

There are no sockets, and the engine does nothing; protocol, batcher, worker thread and uvloop are real. So
the cost of a request can be counted in instructions, or measured without the noise of a client. `floor` is
uvicorn with an application that answers with a fixed body, driven in the same way, for comparison.

`benchmarks.request_cost.guard` runs `python -m benchmarks.request_cost.request_path LIBRARY` under callgrind;
LIBRARY, which the guard builds from counting.c, switches the counting on and off. With `--trace` in place of
it, the calls that a warm lone request makes on the event loop's thread are printed, with their files.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import gc
import itertools
import sys
import time
import unittest.mock
from collections.abc import AsyncIterator, Callable, Sequence
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import uvicorn
import uvloop

from benchmarks.common import wire
from benchmarks.request_cost.floor_app import make_app
from cobatch.batcher.batcher import Batcher
from cobatch.engines import loader, worker
from cobatch.engines.base import Array, RowShapes, Signature, TensorSpec
from cobatch.server.dashboard import feed
from cobatch.server.edge import asgi
from cobatch.server.inference import model as model_module
from cobatch.server.observability import event_loop
from cobatch.server.serve import Server, keep_freed_memory
from cobatch.server.settings.schema import ModelSettings, ServerSettings, Settings

MODEL = "tiny"
ELEMENTS = 16
# Of each case: the server, binary or JSON, and the number of concurrent callers.
CASES = {
    "floor, 64 at once": ("floor", False, 64),
    "floor, alone": ("floor", False, 1),
    "JSON, 64 at once": ("fast", False, 64),
    "binary, 64 at once": ("fast", True, 64),
    "JSON, alone": ("fast", False, 1),
    "JSON, 64 at once, through ASGI": ("asgi", False, 64),
}
FLOOR_BYTES = 157  # as long as a JSON answer of tiny
REQUESTS = 256
_REPEATS = 3
_WARM_UP = 512
_NEVER_S = 3600  # the interval of what runs by time: how often it falls into a case depends on the load
_READ = 1 << 18  # bytes that uvloop reads at once
_ADDRESS = ("127.0.0.1", 1)


class Idle:
    """An engine whose runs take no time; a row has `elements` floats."""

    platform = "idle"
    slots = 2
    max_batch_size = 64

    def __init__(self, elements: int) -> None:
        self.signature = Signature((TensorSpec("x", "FP32", (elements,)),), (TensorSpec("y", "FP32", (8,)),))
        self._inputs = [np.zeros((64, elements), np.float32) for _ in range(self.slots)]
        self._outputs = np.random.default_rng(3).standard_normal((64, 8), dtype=np.float32)
        self._rows = [0] * self.slots

    def open(self) -> None:
        """Do nothing."""

    def inputs(self, slot: int, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:  # noqa: ARG002
        return (self._inputs[slot],)

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:  # noqa: ARG002
        self._rows[slot] = rows

    def wait(self, slot: int) -> tuple[Array, ...]:
        return (self._outputs[: self._rows[slot]],)

    def close(self) -> None:
        """Do nothing."""


class Answered:
    """Counts answers; `all` is set when the expected number has been written."""

    def __init__(self) -> None:
        self.all = asyncio.Event()
        self._missing = 0

    def expect(self, count: int) -> None:
        self.all.clear()
        self._missing = count

    def one(self) -> None:
        self._missing -= 1
        if not self._missing:
            self.all.set()


class Wire(asyncio.Transport):
    """A transport that counts answers: head and body in one write, or in two."""

    def __init__(self, answered: Answered) -> None:
        super().__init__({"peername": _ADDRESS, "sockname": _ADDRESS})
        self._answered = answered
        self._head = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        # Uvicorn writes the head and the body of an ASGI application separately.
        whole = bytes(data)
        end = whole.find(b"\r\n\r\n")
        if not self._head:
            assert whole.startswith(b"HTTP/1.1 200"), whole[:200]
            self._head = end + 4 == len(whole)
        else:
            self._head = False
        if not self._head:
            self._answered.one()

    def pause_reading(self) -> None:
        """Do nothing: all of a request comes at once."""

    def resume_reading(self) -> None:
        """Do nothing."""

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0


class Path:
    """Requests through one protocol class, from `callers` concurrent callers."""

    def __init__(self, make: Callable[[], Any], requests: Sequence[bytes], callers: int) -> None:
        self._answered = Answered()
        self._protocols = [make() for _ in range(callers)]
        # Callers get the requests in turn; long ones arrive in the pieces that uvloop reads.
        self._pieces = [
            [request[at : at + _READ] for at in range(0, len(request), _READ)]
            for request in (requests[caller % len(requests)] for caller in range(callers))
        ]
        for protocol in self._protocols:
            protocol.connection_made(Wire(self._answered))

    async def serve(self, requests: int) -> int:
        """Serve at least `requests` in a closed loop, and return their number."""
        callers, answered = len(self._protocols), self._answered
        rounds = -(-requests // callers)
        for _ in range(rounds):
            answered.expect(callers)
            for protocol, pieces in zip(self._protocols, self._pieces, strict=True):
                for piece in pieces:
                    protocol.data_received(piece)
            await answered.all.wait()
        return rounds * callers


@contextlib.asynccontextmanager
async def paths() -> AsyncIterator[dict[str, Path]]:
    """Yield all cases, warmed up."""
    async with contextlib.AsyncExitStack() as stack:
        makers = {
            "fast": await stack.enter_async_context(serving()),
            "asgi": await stack.enter_async_context(serving(fast_path=False)),
            "floor": _maker(
                uvicorn.Config(
                    make_app(FLOOR_BYTES, "application/json"),
                    http="httptools",
                    timeout_keep_alive=_NEVER_S,
                    access_log=False,
                    log_config=None,
                )
            ),
        }
        cases = {
            case: Path(makers[who], [request_of(binary)], callers)
            for case, (who, binary, callers) in CASES.items()
        }
        for path in cases.values():
            await path.serve(_WARM_UP)
        # As the server does when it is ready; a collection would fall into some case by chance.
        gc.collect()
        gc.freeze()
        gc.disable()
        yield cases


@contextlib.asynccontextmanager
async def serving(
    models: Sequence[str] = (MODEL,), elements: int = ELEMENTS, *, fast_path: bool = True
) -> AsyncIterator[Callable[[], Any]]:
    """Serve these models, and yield a function that makes the protocol of a connection."""
    keep_freed_memory()  # as the command does
    settings = tuple(ModelSettings(path="idle.onnx", name=name) for name in models)
    http = ServerSettings(fast_path=fast_path, keep_alive_s=_NEVER_S, receive_timeout_s=_NEVER_S)
    server = Server(Settings(server=http, models=settings))
    loaded = asyncio.Event()
    server.inference.on_ready = loaded.set
    app: Any = server.config.app
    while not isinstance(app, asgi.InferRoutes):
        app = app.app
    starlette: Any = app.app
    # Each reading is a microsecond later, so learned run times and decisions are the same on every machine
    # and under any load.
    clock = itertools.count(0.0, 1e-6).__next__
    with (
        unittest.mock.patch.dict(loader.ENGINES, onnxruntime=lambda *_: Idle(elements)),
        unittest.mock.patch.object(asgi, "_WATCH_AFTER_S", _NEVER_S),
        unittest.mock.patch.object(event_loop, "_INTERVAL_S", _NEVER_S),
        unittest.mock.patch.object(feed, "INTERVAL_S", _NEVER_S),
        unittest.mock.patch.object(worker, "time", SimpleNamespace(monotonic=clock)),
        unittest.mock.patch.object(model_module, "Batcher", functools.partial(Batcher, clock=clock)),
    ):
        async with starlette.router.lifespan_context(starlette):
            await loaded.wait()
            yield _maker(server.config, server.server_state)


def _maker(config: uvicorn.Config, state: Any = None) -> Callable[[], Any]:
    config.load()
    state = state or uvicorn.Server(config).server_state
    make: Any = config.http_protocol_class
    return lambda: make(config=config, server_state=state, app_state={}, _loop=asyncio.get_running_loop())


def request_of(binary: bool, model: str = MODEL, elements: int = ELEMENTS) -> bytes:
    """Return a request with one row as bytes."""
    row = np.random.default_rng(5).standard_normal((1, elements), dtype=np.float32)
    return wire.raw_request(wire.encode(MODEL, row, binary), "127.0.0.1:8000", f"/v2/models/{model}/infer")


async def timed(rounds: int) -> dict[str, list[float]]:
    """Return the CPU time per request in microseconds, of all threads; every case in each round."""
    times_us: dict[str, list[float]] = {case: [] for case in CASES}
    async with paths() as cases:
        for _ in range(rounds):
            for case, path in cases.items():
                began = time.process_time()
                await path.serve(REQUESTS)
                times_us[case].append((time.process_time() - began) / REQUESTS * 1e6)
    return times_us


async def _counted(library: ctypes.CDLL) -> None:
    async with paths() as cases:
        for _ in range(_REPEATS):
            for case, path in cases.items():
                library.begin()
                await path.serve(REQUESTS)
                library.end(case.encode())


async def _traced() -> list[tuple[str, str]]:
    """Return file and function of each call in our code that one warm lone request makes."""
    calls: list[tuple[str, str]] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        _, ours, file = frame.f_code.co_filename.rpartition("/cobatch/")
        if event == "call" and ours:
            calls.append((file, frame.f_code.co_name))

    async with paths() as cases:
        path = cases["JSON, alone"]
        await path.serve(_REPEATS)
        sys.setprofile(profile)  # of this thread alone
        await path.serve(1)
        sys.setprofile(None)
    return calls


def main(arguments: Sequence[str]) -> None:
    """Trace, or run under callgrind: each case is a part of its output with the name of the case."""
    if arguments[0] != "--trace":
        # Threads take turns where they wait: under callgrind the usual 5 ms are only a few instructions.
        sys.setswitchinterval(_NEVER_S)
        uvloop.run(_counted(ctypes.CDLL(arguments[0])))
        return
    calls = uvloop.run(_traced())
    for file, function in calls:
        print(f"{file:40} {function}")
    files = [file for file, _ in calls]
    changes = sum(one != other for one, other in itertools.pairwise(files))
    print(f"{len(calls)} calls in {len(set(files))} files, {changes} changes of file")


if __name__ == "__main__":
    main(sys.argv[1:])
