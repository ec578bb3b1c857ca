"""A real server on loopback in a thread of this process, and a client that sends and receives bytes.

The server is `server.serve.Server` under uvicorn with its own socket, without signal handlers. To hold a
batch, a test uses a `GatedEngine`, which runs under the real worker and blocks while its gate is shut.
Nothing sleeps: a test waits for events of the server (`Served.until`), with a deadline that only bugs reach.
At its end uvicorn looks every 0.1 s for connections and tasks that are left; here every millisecond.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import queue
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType, SimpleNamespace
from typing import Any, Self, TypeVar
from unittest import mock

import numpy as np
import uvicorn.server

import cobatch.server.inference.model
from cobatch.batcher.batcher import Batcher
from cobatch.batcher.request import Request
from cobatch.engines.base import Engine, RowShapes
from cobatch.engines.errors import EngineError
from cobatch.engines.loader import EngineOptions, load_engine
from cobatch.server.inference.service import Inference
from cobatch.server.serve import Server
from cobatch.server.settings.auth import AuthSettings
from cobatch.server.settings.schema import ModelSettings, ServerSettings, Settings
from tests.support.http.clock import Clock, ClockedLoop
from tests.support.http.released import Released
from tests.support.virtual.loop import Array, FakeEngine

DEADLINE_S = 60.0
T = TypeVar("T")
C = TypeVar("C", bound=asyncio.Protocol)
_TURNS = 8  # of the loop, in which it accepts a connection and reads the first bytes


async def _poll(delay_s: float) -> None:
    await asyncio.sleep(min(delay_s, 0.001))


# Everything that uvicorn waits for with `sleep` here is a connection or a task that ends.
vars(uvicorn.server)["asyncio"] = SimpleNamespace(**vars(asyncio) | {"sleep": _poll})


class GatedEngine(FakeEngine):
    """y = 2 * x. After `hold`, a batch that started does not finish before `release`.

    `began` receives the first column of each batch that starts while held. With `answer_width`, the output
    for rows of two numbers is `answer_width` copies of twice the first.
    """

    platform = "gated"

    def __init__(self, max_batch_size: int = 4) -> None:
        super().__init__(max_batch_size)
        self.began: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        self.may_open = threading.Event()
        self.may_open.set()
        self.answer_width: int | None = None
        self.ran: list[list[int]] = []
        self._gate = threading.Event()
        self._gate.set()
        self._rows: dict[int, int] = {}

    def hold(self) -> None:
        """Shut the gate: batches block."""
        self._gate.clear()

    def release(self) -> None:
        """Open the gate: blocked batches finish."""
        self._gate.set()

    def open(self) -> None:
        if not self.may_open.wait(DEADLINE_S):
            raise EngineError("the test did not let the engine open")

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:
        self._rows[slot] = rows

    def wait(self, slot: int) -> tuple[Array, ...]:
        x = self.buffers[slot][: self._rows[slot]]
        firsts = x[:, 0].tolist()
        if not self._gate.is_set():
            self.began.put(firsts)
        if not self._gate.wait(DEADLINE_S):
            raise EngineError("the test did not open the gate")
        self.ran.append(firsts)
        error = self.fails(x)
        if error is not None:
            raise error
        if self.answer_width is not None and x.shape[1] == 2:
            return (np.repeat(x[:, :1] * 2, self.answer_width, axis=1),)
        return (x * 2,)


@dataclass
class Answer:
    """One HTTP response. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def slug(self) -> str:
        """The kind of problem; checks the members that every problem has."""
        problem = self.json
        assert self.headers["content-type"] == "application/problem+json"
        assert problem["status"] == self.status
        assert problem["error"] == problem["detail"]
        assert isinstance(problem["error"], str)
        assert problem["title"]
        kind: str = problem["type"]
        assert kind.startswith("/problems/")
        return kind.removeprefix("/problems/")


class Client:
    """One connection that sends and receives bytes."""

    def __init__(self, port: int, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(DEADLINE_S)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", port))
        # Each `send` is a packet of its own.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._data = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send all bytes."""
        self.socket.sendall(data)

    def ask(self, data: bytes) -> Answer:
        """Send a request and read its response."""
        self.send(data)
        return self.answer()

    def answer(self, head: bool = False) -> Answer:
        """Read one response; `head`: to a HEAD request, so without a body."""
        lines = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        version, status, _ = lines[0].split(" ", 2)
        assert version == "HTTP/1.1"
        headers: dict[str, str] = {}
        for line in lines[1:-2]:
            name, value = line.split(": ", 1)
            assert name.lower() not in headers, f"{name} twice"
            headers[name.lower()] = value
        if head or status.startswith("1"):
            return Answer(int(status), headers, b"")
        assert "transfer-encoding" not in headers
        return Answer(int(status), headers, self._exactly(int(headers["content-length"])))

    def closed(self) -> bool:
        """Report whether the server closes the connection without sending more."""
        return not self._data and not self._receive()

    def _receive(self) -> bytes:
        try:
            data = self.socket.recv(1 << 16)
        except ConnectionResetError:
            return b""
        self._data += data
        return data

    def _until(self, end: bytes) -> bytes:
        while end not in self._data:
            assert self._receive(), f"the connection ended after {bytes(self._data)!r}"
        return self._take(self._data.index(end) + len(end))

    def _exactly(self, size: int) -> bytes:
        while len(self._data) < size:
            assert self._receive(), "the connection ended within a body"
        return self._take(size)

    def _take(self, size: int) -> bytes:
        data = bytes(self._data[:size])
        del self._data[:size]
        return data


class ThreadServer(Server):
    """The server without its process-wide effects: signals, prints, the freeze of the garbage collector."""

    grace_s = 0.001

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        self.clock = clock
        self.listening = threading.Event()
        self.ready = threading.Event()
        self.port = 0
        super().__init__(settings)
        self.connections = Released()
        make: Any = self.config.http
        self.config.http = lambda **of_uvicorn: self.watch(make(**of_uvicorn))  # type: ignore[assignment]

    def watch(self, connection: C) -> C:
        """Watch a connection; the loop's own objects for TLS are in cycles."""
        return connection if self.config.is_ssl else self.connections.watch(connection)

    def inferences(self) -> list[Inference]:
        """Return the models of all processes that decode and encode requests."""
        return [self.inference]

    def run(self, sockets: object = None) -> None:
        if self.clock is None:
            super().run()
            return
        with asyncio.Runner(loop_factory=functools.partial(ClockedLoop, self.clock)) as runner:
            runner.run(self.serve())

    async def startup(self, sockets: object = None) -> None:
        await super().startup()
        self.port = self.servers[0].sockets[0].getsockname()[1]
        self.listening.set()

    def _on_ready(self) -> None:
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        assert not self.inference.draining, "the second signal would end the tests"
        super().handle_exit(sig, frame)


class Served:
    """A running server."""

    def __init__(self, server: ThreadServer, fast: bool) -> None:
        self.server = server
        self.fast = fast
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=server.run, name="served")

    @property
    def inference(self) -> Inference:
        """The service. Use it on the loop (`call`), or read its numbers."""
        return self.server.inference

    def batcher(self, name: str = "gate") -> Batcher:
        """Return a loaded model's batcher; use it like `inference`."""
        batcher = self.inference.models[name].batcher
        assert batcher is not None
        return batcher

    def connect(self, receive_buffer: int | None = None) -> Client:
        """Open a connection."""
        return Client(self.server.port, receive_buffer)

    def ask(self, data: bytes) -> Answer:
        """Send a request on a new connection; return its response."""
        with self.connect() as client:
            return client.ask(data)

    def start(self, ready: bool = True) -> None:
        """Start, and wait until it listens and, if `ready`, until all models are ready."""
        self._thread.start()
        assert self.server.listening.wait(DEADLINE_S)
        if ready:
            assert self.server.ready.wait(DEADLINE_S)
            self.watch()

    def watch(self) -> None:
        """Make `until` check its condition whenever a batcher accepts or cancels a request."""
        for model in self.inference.models.values():
            batcher = model.batcher
            if batcher is not None:
                batcher.__dict__["submit"] = self._noticed(batcher.submit)
                batcher.__dict__["cancel"] = self._noticed(batcher.cancel)

    def _noticed(self, method: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(method)
        def call(request: Request, **options: Any) -> None:
            try:
                method(request, **options)
            finally:
                with self._changed:
                    self._changed.notify_all()

        return call

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds that changes only when a request is submitted or cancelled."""
        with self._changed:
            assert self._changed.wait_for(condition, DEADLINE_S)

    def call(self, function: Callable[[], T]) -> T:
        """Call a function on the server's loop; return its result."""
        result: queue.SimpleQueue[T] = queue.SimpleQueue()
        assert self.inference.loop is not None
        self.inference.loop.call_soon_threadsafe(lambda: result.put(function()))
        return result.get(timeout=DEADLINE_S)

    def skip(self, seconds: float) -> None:
        """Let time pass for the loop and its connections, once all sent bytes have been received."""
        assert self.server.clock is not None
        for _ in range(_TURNS):
            self.call(lambda: None)
        self.server.clock.skipped_s += seconds
        self.call(lambda: None)  # the loop looks at its timers

    def connections(self) -> list[Any]:
        """Return the protocols of all open connections. Call it on the loop."""
        return list(self.server.server_state.connections)

    def stop(self) -> None:
        """Start the shutdown, as a signal would."""
        if not self.inference.draining:
            self.server.handle_exit(15, None)

    def join(self) -> None:
        """Wait until the server has stopped."""
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()
        self.server.connections.check()


def opened_again(served: Served, name: str = "gate") -> None:
    """Wait until the attempt to reopen an engine has succeeded or failed."""
    done = threading.Event()

    def wait() -> None:
        tasks = asyncio.gather(*served.inference.models[name]._reopening, return_exceptions=True)
        tasks.add_done_callback(lambda _: done.set())

    served.call(wait)
    assert done.wait(DEADLINE_S)


@contextlib.contextmanager
def serve(
    fast: bool,
    models: tuple[ModelSettings, ...],
    *,
    engines: Mapping[str, Engine] | None = None,
    ready: bool = True,
    auth: AuthSettings | None = None,
    clock: Clock | None = None,
    make_server: Callable[[Settings, Clock | None], ThreadServer] | None = None,
    **settings: Any,
) -> Iterator[Served]:
    """Serve `models`, on a free port by default. `engines`, by path, replace the engines of model files.

    With a `clock`, `skip` lets the limits of connections pass.
    """
    fakes = engines or {}

    def load(kind: str, path: str, max_batch_size: int, options: EngineOptions) -> Engine:
        return fakes.get(path) or load_engine(kind, path, max_batch_size, options)

    http = ServerSettings(fast_path=fast, **{"port": 0, "drain_timeout_s": DEADLINE_S, **settings})
    with mock.patch.object(cobatch.server.inference.model, "load_engine", load):
        make = make_server or ThreadServer
        served = Served(make(Settings(server=http, models=models, auth=auth), clock), fast)
        served.start(ready)
    try:
        with contextlib.nullcontext() if clock is None else clock.of_connections():
            yield served
    finally:
        for engine in fakes.values():
            if isinstance(engine, GatedEngine):
                engine.may_open.set()
                engine.release()
        served.stop()
        served.stop()  # the second time cuts a delay short
        served.join()


@contextlib.contextmanager
def gated(
    fast: bool, *, max_queue_rows: int = 1000, ready: bool = True, **settings: Any
) -> Iterator[tuple[Served, GatedEngine]]:
    """Serve one model, `gate`, with a GatedEngine; other settings as of `serve`."""
    engine = GatedEngine()
    model = ModelSettings(path="gate", max_batch_size=engine.max_batch_size, max_queue_rows=max_queue_rows)
    with serve(fast, (model,), engines={"gate": engine}, ready=ready, **settings) as served:
        yield served, engine


def post(
    target: str, body: bytes | object, headers: Mapping[str, str] | None = None, version: str = "1.1"
) -> bytes:
    """Build a POST; a body other than bytes is encoded as JSON. `headers` replace default ones."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"Host": "test", "Content-Length": str(len(data))} | dict(headers or {})
    lines = [f"POST {target} HTTP/{version}", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


def get(target: str, method: str = "GET") -> bytes:
    """Build a request without a body."""
    return f"{method} {target} HTTP/1.1\r\nHost: test\r\n\r\n".encode()


GATE = "/v2/models/gate/infer"


def rows_of(*rows: int, **more: object) -> dict[str, object]:
    """Return an infer message for `gate` with one number in each row."""
    x = {"name": "x", "shape": [len(rows), 1], "datatype": "INT64", "data": list(rows)}
    return {"inputs": [x], **more}


def gate(*rows: int, headers: Mapping[str, str] | None = None, **more: object) -> bytes:
    """Build an infer request for `gate`."""
    return post(GATE, rows_of(*rows, **more), headers)


def data_of(answer: Answer) -> Any:
    """Return the first output's data of a successful answer."""
    assert answer.status == 200, answer
    return answer.json["outputs"][0]["data"]
