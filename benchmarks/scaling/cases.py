"""What grows, and how the cost is measured: sizes in turn within a round, and the medians of the rounds."""

from __future__ import annotations

import contextlib
import gc
import resource
import socket
import time
from collections.abc import Iterator, Mapping
from math import log2
from statistics import median

from benchmarks.common import wire
from benchmarks.common.models import model_path
from benchmarks.common.processes import Server, cobatch, floor
from benchmarks.common.procstat import cpu_us
from benchmarks.common.turns import wait_until_idle
from benchmarks.common.wrk import run_wrk
from benchmarks.request_cost.request_path import FLOOR_BYTES, Path, request_of, serving
from benchmarks.scaling import queue_cost
from benchmarks.scaling.fit import FLAT, LINEAR, SHALLOW, Line, Point, fit

BATCHES = (1, 2, 4, 8, 16, 32, 64)
ROWS = (16, 128, 1_024, 8_192, 50_176, 150_528)
MODELS = (1, 2, 4, 8, 16, 32)
CONNECTIONS = (1, 4, 16, 64, 256, 1_024, 4_096)
IDLE = (0, 64, 256, 1_024, 4_032)
QUEUED = (100, 1_000, 10_000, 100_000)
TENANTS = (1, 10, 100, 1_000, 10_000)
_AT_ONCE = 64
_FILES = 8_192  # 4,096 connections, in this process or in wrk's, and in the server's
_ROUNDS, _QUICK_ROUNDS = 15, 3
_ROUND_BYTES = 1 << 25  # of requests, in a round of a size


async def batch(quick: bool) -> list[Line]:
    """So many callers at once, all in one batch."""
    lines = []
    async with serving() as make:
        for kind in ("JSON", "binary"):
            request = request_of(kind == "binary")
            paths = {size: Path(make, [request], size) for size in _some(BATCHES, quick)}
            points = await _timed(paths, dict.fromkeys(paths, 512), quick)
            words = "{a} us are the request's own; {b} us are the batch's, and are shared (error {error})"
            lines.append(fit("batch size", kind, points, _shared, words, FLAT))
    return lines


async def row(quick: bool) -> list[Line]:
    """So many floats in a row, eight rows at once."""
    lines = []
    for kind in ("JSON", "binary"):
        points: list[Point] = []
        for elements in _some(ROWS, quick):
            async with serving(elements=elements) as make:
                request = request_of(kind == "binary", elements=elements)
                many = max(8, min(512, _ROUND_BYTES // len(request)))
                path = Path(make, [request], 8)
                points += await _timed({elements: path}, {elements: many}, quick)
        words = "{a} us and {b} us for each float, which is decoding and the one copy (error {error})"
        lines.append(fit(f"row size in {kind} (floats)", kind, points, float, words, LINEAR))
    return lines


async def models(quick: bool) -> list[Line]:
    """So many models: all callers ask one of them, or each as many as the others."""
    one: list[Point] = []
    spread: list[Point] = []
    for many in _some(MODELS, quick):
        names = [f"m{number}" for number in range(many)]
        async with serving(names) as make:
            requests = [request_of(False, name) for name in names]
            path = Path(make, requests[:1], _AT_ONCE)
            one += await _timed({many: path}, {many: 512}, quick)
            path = Path(make, requests, _AT_ONCE)
            spread += await _timed({many: path}, {many: 512}, quick)
    still = "{a} us, and {b} us for an idle model (error {error})"
    words = "{a} us, and {b} us for each model asked, of which each gets a batch of its own (error {error})"
    return [
        fit("number of models", "all ask one", one, float, still, FLAT),
        fit("number of models", "all are asked", spread, float, words, LINEAR),
    ]


def connections(quick: bool) -> list[Line]:
    """A real server and wrk: so many connections that ask, or 64 that ask and so many that do not; and bare
    uvicorn, for what the sockets themselves cost."""
    allow_files(_FILES)
    message = wire.encode("tiny", wire.rows_of("tiny", 1, 5), binary=False)
    asking: dict[int, list[float]] = {many: [] for many in _some(CONNECTIONS, quick)}
    bare: dict[int, list[float]] = {many: [] for many in asking}
    idle: dict[int, list[float]] = {many: [] for many in _some(IDLE, quick)}
    # No connection is refused for a full queue, nor closed while it is held.
    flags = ["--max-queue-rows", "8192", "--keep-alive-s", "600"]
    with (
        cobatch(model_path("tiny"), "tiny", True, flags=flags) as server,
        floor(FLOOR_BYTES, "application/json") as uvicorn,
    ):
        for each in (server, uvicorn):
            _load(each, message, _AT_ONCE)
        for _ in range(1 if quick else 3):
            for many, found in asking.items():
                found.append(_load(server, message, many))
                bare[many].append(_load(uvicorn, message, many))
            for many, found in idle.items():
                with _held(server, many):
                    found.append(_load(server, message, _AT_ONCE))
    words = "{a} us, and {b} us for a wake-up (cobatch: of two threads), shared by who asks (error {error})"
    still = "{a} us, and {b} us for an idle one (error {error})"
    return [
        fit("connections", "all ask", _medians(asking), _shared, words, SHALLOW),
        fit("connections", "bare uvicorn, all ask", _medians(bare), _shared, words, SHALLOW),
        fit("connections", "64 ask, these do not", _medians(idle), float, still, FLAT),
    ]


def allow_files(many: int) -> None:
    """This process, and those that it starts, may have so many files open. Raises OSError with what to do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < many:
        if hard != resource.RLIM_INFINITY and hard < many:
            raise OSError(f"{many} open files are needed and {hard} allowed: ulimit -Hn {many}, as root")
        resource.setrlimit(resource.RLIMIT_NOFILE, (many, hard))


def _shared(many: float) -> float:
    return 1 / many


async def queue(quick: bool) -> list[Line]:
    """So many requests queued: the batcher's part of submitting, cancelling and dispatching one."""
    lines = []
    words = "{a} us, and {b} us each time that the queue doubles, as a heap may (error {error})"
    for kind in (queue_cost.Kind(0), queue_cost.Kind(1_000, deadlines=True, priorities=True)):
        benches = {many: queue_cost.Bench(kind, many) for many in _some(QUEUED, quick)}
        for name, points in _operations(benches, quick).items():
            lines.append(fit(f"queue length ({kind})", name, points, log2, words, SHALLOW))
    return lines


async def tenants(quick: bool) -> list[Line]:
    """So many tenants share 10,000 queued requests."""
    benches = {many: queue_cost.Bench(queue_cost.Kind(many), 10_000) for many in _some(TENANTS, quick)}
    words = "{a} us, and {b} us each time that tenants double: a heap of whose turn it is (error {error})"
    found = _operations(benches, quick)
    return [fit("tenants", name, points, log2, words, SHALLOW) for name, points in found.items()]


def _some(sizes: tuple[int, ...], quick: bool) -> tuple[int, ...]:
    return (sizes[0], sizes[len(sizes) // 2], sizes[-1]) if quick else sizes


async def _timed(paths: Mapping[int, Path], requests: Mapping[int, int], quick: bool) -> list[Point]:
    found: dict[int, list[float]] = {size: [] for size in paths}
    for size, path in paths.items():
        await path.serve(requests[size])
    with _no_collection():
        for _ in range(_QUICK_ROUNDS if quick else _ROUNDS):
            for size, path in paths.items():
                began = time.process_time()
                served = await path.serve(requests[size])
                found[size].append((time.process_time() - began) / served * 1e6)
    return _medians(found)


def _operations(benches: Mapping[int, queue_cost.Bench], quick: bool) -> dict[str, list[Point]]:
    found: dict[str, dict[int, list[float]]] = {
        name: {size: [] for size in benches} for name in queue_cost.OPERATIONS
    }
    with _no_collection():
        for _ in range(10 if quick else queue_cost.ROUNDS):
            for size, bench in benches.items():
                for name, took_us in bench.round().items():
                    found[name][size].append(took_us)
    return {name: _medians(by_size) for name, by_size in found.items()}


def _medians(found: Mapping[int, list[float]]) -> list[Point]:
    return [(float(size), median(values)) for size, values in found.items()]


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """As in the server: what is there is not looked through again and again."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _load(server: Server, message: wire.Message, many: int) -> float:
    """CPU per request."""
    wait_until_idle(server.pid)
    before = cpu_us(server.pid)
    url = f"http://{server.address}/v2/models/tiny/infer"
    load = run_wrk(url, message.body, message.headers, many, 2)
    return (cpu_us(server.pid) - before) / load.requests


@contextlib.contextmanager
def _held(server: Server, many: int) -> Iterator[None]:
    """So many connections that have asked once for health, and then say nothing."""
    host, _, port = server.address.rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(many):
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: bench\r\n\r\n")
            connection.recv(4096)
        yield
