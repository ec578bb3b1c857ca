"""The measurements: all sizes in each round, and the medians of the rounds."""

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
_ROUND_BYTES = 1 << 25  # bytes of requests for each size in a round


async def batch(quick: bool) -> list[Line]:
    """Measure concurrent callers, all in one batch."""
    lines = []
    async with serving() as make:
        for kind in ("JSON", "binary"):
            request = request_of(kind == "binary")
            paths = {size: Path(make, [request], size) for size in _some(BATCHES, quick)}
            points = await _timed(paths, dict.fromkeys(paths, 512), quick)
            words = "{a} us for each request; {b} us for each batch, shared by its requests (error {error})"
            lines.append(fit("batch size", kind, points, _shared, words, FLAT))
    return lines


async def row(quick: bool) -> list[Line]:
    """Measure floats in a row, eight rows at once."""
    lines = []
    for kind in ("JSON", "binary"):
        points: list[Point] = []
        for elements in _some(ROWS, quick):
            async with serving(elements=elements) as make:
                request = request_of(kind == "binary", elements=elements)
                many = max(8, min(512, _ROUND_BYTES // len(request)))
                path = Path(make, [request], 8)
                points += await _timed({elements: path}, {elements: many}, quick)
        words = "{a} us and {b} us for each float: decoding and one copy (error {error})"
        lines.append(fit(f"row size in {kind} (floats)", kind, points, float, words, LINEAR))
    return lines


async def models(quick: bool) -> list[Line]:
    """Measure models: all callers use one of them, or the callers are spread over all."""
    one: list[Point] = []
    spread: list[Point] = []
    for count in _some(MODELS, quick):
        names = [f"m{number}" for number in range(count)]
        async with serving(names) as make:
            requests = [request_of(False, name) for name in names]
            path = Path(make, requests[:1], _AT_ONCE)
            one += await _timed({count: path}, {count: 512}, quick)
            path = Path(make, requests, _AT_ONCE)
            spread += await _timed({count: path}, {count: 512}, quick)
    idle = "{a} us, and {b} us for an idle model (error {error})"
    words = "{a} us, and {b} us for each model in use, which has its own batches (error {error})"
    return [
        fit("number of models", "one in use", one, float, idle, FLAT),
        fit("number of models", "all in use", spread, float, words, LINEAR),
    ]


def connections(quick: bool) -> list[Line]:
    """Measure connections to a real server: all active, or 64 active beside idle ones.

    Bare uvicorn shows the cost of the sockets themselves.
    """
    allow_files(_FILES)
    message = wire.encode("tiny", wire.rows_of("tiny", 1, 5), binary=False)
    active: dict[int, list[float]] = {count: [] for count in _some(CONNECTIONS, quick)}
    bare: dict[int, list[float]] = {count: [] for count in active}
    idle: dict[int, list[float]] = {count: [] for count in _some(IDLE, quick)}
    # Large enough limits that no request is refused and no idle connection closed.
    flags = ["--max-queue-rows", "8192", "--keep-alive-s", "600"]
    with (
        cobatch(model_path("tiny"), "tiny", True, flags=flags) as server,
        floor(FLOOR_BYTES, "application/json") as uvicorn,
    ):
        for each in (server, uvicorn):
            _load(each, message, _AT_ONCE)
        for _ in range(1 if quick else 3):
            for count, times_us in active.items():
                times_us.append(_load(server, message, count))
                bare[count].append(_load(uvicorn, message, count))
            for count, times_us in idle.items():
                with _held(server, count):
                    times_us.append(_load(server, message, _AT_ONCE))
    words = "{a} us, and {b} us for a wake-up (cobatch: of two threads), shared by requests (error {error})"
    idle_words = "{a} us, and {b} us for an idle one (error {error})"
    return [
        fit("connections", "all active", _medians(active), _shared, words, SHALLOW),
        fit("connections", "bare uvicorn, all active", _medians(bare), _shared, words, SHALLOW),
        fit("connections", "idle ones beside 64 active", _medians(idle), float, idle_words, FLAT),
    ]


def allow_files(count: int) -> None:
    """Raise the limit of open files of this process and its children. Raises OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        if hard != resource.RLIM_INFINITY and hard < count:
            raise OSError(f"{count} open files are needed and {hard} allowed: ulimit -Hn {count}, as root")
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _shared(count: float) -> float:
    return 1 / count


async def queue(quick: bool) -> list[Line]:
    """Measure queued requests: the batcher's cost to submit, cancel and dispatch one."""
    lines = []
    words = "{a} us, and {b} us for each doubling of the queue, as for a heap (error {error})"
    for kind in (queue_cost.Kind(0), queue_cost.Kind(1_000, deadlines=True, priorities=True)):
        benches = {count: queue_cost.Bench(kind, count) for count in _some(QUEUED, quick)}
        for name, points in _operations(benches, quick).items():
            lines.append(fit(f"queue length ({kind})", name, points, log2, words, SHALLOW))
    return lines


async def tenants(quick: bool) -> list[Line]:
    """Measure tenants that share 10,000 queued requests."""
    benches = {count: queue_cost.Bench(queue_cost.Kind(count), 10_000) for count in _some(TENANTS, quick)}
    words = "{a} us, and {b} us for each doubling of the tenants: the heap of their turns (error {error})"
    points_by_name = _operations(benches, quick)
    return [fit("tenants", name, points, log2, words, SHALLOW) for name, points in points_by_name.items()]


def _some(sizes: tuple[int, ...], quick: bool) -> tuple[int, ...]:
    return (sizes[0], sizes[len(sizes) // 2], sizes[-1]) if quick else sizes


async def _timed(paths: Mapping[int, Path], requests: Mapping[int, int], quick: bool) -> list[Point]:
    times_us: dict[int, list[float]] = {size: [] for size in paths}
    for size, path in paths.items():
        await path.serve(requests[size])
    with _no_collection():
        for _ in range(_QUICK_ROUNDS if quick else _ROUNDS):
            for size, path in paths.items():
                began = time.process_time()
                served = await path.serve(requests[size])
                times_us[size].append((time.process_time() - began) / served * 1e6)
    return _medians(times_us)


def _operations(benches: Mapping[int, queue_cost.Bench], quick: bool) -> dict[str, list[Point]]:
    times_us: dict[str, dict[int, list[float]]] = {
        name: {size: [] for size in benches} for name in queue_cost.OPERATIONS
    }
    with _no_collection():
        for _ in range(10 if quick else queue_cost.ROUNDS):
            for size, bench in benches.items():
                for name, took_us in bench.round().items():
                    times_us[name][size].append(took_us)
    return {name: _medians(by_size) for name, by_size in times_us.items()}


def _medians(times_us: Mapping[int, list[float]]) -> list[Point]:
    return [(float(size), median(values)) for size, values in times_us.items()]


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Freeze the garbage collector, as the server does."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _load(server: Server, message: wire.Message, connections: int) -> float:
    """Return the CPU time per request in microseconds."""
    wait_until_idle(server.pid)
    before = cpu_us(server.pid)
    url = f"http://{server.address}/v2/models/tiny/infer"
    load = run_wrk(url, message.body, message.headers, connections, 2)
    return (cpu_us(server.pid) - before) / load.requests


@contextlib.contextmanager
def _held(server: Server, count: int) -> Iterator[None]:
    """Hold idle connections, each after one request of the health route."""
    host, _, port = server.address.rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection((host, int(port))))
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: bench\r\n\r\n")
            connection.recv(4096)
        yield
