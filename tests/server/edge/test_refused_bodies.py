"""Refusals of requests whose clients go on sending: they get the problem, not a reset (RFC 9112, 9.6).

The clients here send everything before they read, as many proxies do. The bodies are larger than the
system's buffers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cobatch.server.edge import lingering
from cobatch.server.edge.lingering import LingeringClose
from tests.support.fronts.linked import WAYS, way
from tests.support.http.clock import Clock
from tests.support.http.serving import (
    DEADLINE_S,
    GATE,
    Client,
    GatedEngine,
    Served,
    data_of,
    gate,
    gated,
    post,
)

LARGE = 15 << 20
LIMIT = 100_000
FAST_OR_NOT = pytest.mark.parametrize("fast", [True, False], ids=["fast", "asgi"])


@pytest.fixture(scope="module", params=WAYS)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with gated(**way(request.param), max_body_bytes=LIMIT) as (served, _):
        yield served


def large(chunked: bool, target: str = GATE, headers: dict[str, str] | None = None) -> bytes:
    """Return a request with a body of LARGE bytes."""
    body = bytes(LARGE)
    if not chunked:
        return post(target, body, headers)
    size = 1 << 20
    framed = b"".join(b"%x\r\n%b\r\n" % (size, body[at : at + size]) for at in range(0, LARGE, size))
    request = post(target, framed + b"0\r\n\r\n", {"Transfer-Encoding": "chunked"} | (headers or {}))
    return request.replace(b"Content-Length: %d\r\n" % (len(framed) + 5), b"")


def refused(client: Client, status: int, slug: str) -> None:
    """Check for this problem and then the end."""
    answer = client.answer()
    assert (answer.status, answer.slug, answer.headers["connection"]) == (status, slug, "close")
    assert client.closed()


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("target", [GATE, "/batch", "/v1/models/gate/predictions"])
@pytest.mark.parametrize("before", [0, 1])
def test_a_body_over_the_limit(served: Served, chunked: bool, target: str, before: int) -> None:
    headers = {"Content-Type": "application/json"}
    with served.connect() as client:
        client.send(gate(7) * before + large(chunked, target, headers))
        for _ in range(before):
            assert data_of(client.answer()) == [14]
        refused(client, 413, "body-too-large")
    assert data_of(served.ask(gate(8))) == [16]


@pytest.mark.parametrize(
    "last",
    [
        gate(7, headers={"Connection": "close"}),
        post("/v2/models/none/infer", b"{}", version="1.0"),
        b"GET /v2/health/live HTTP/1.0\r\n\r\n",
    ],
    ids=["infer", "refused", "get"],
)
def test_bytes_behind_the_last_request_cost_no_response(served: Served, last: bytes) -> None:
    answered = served.server.server_state.total_requests
    with served.connect() as client:
        client.send(last)
        for _ in range(100_000):
            if served.call(lambda: served.server.server_state.total_requests) > answered:
                break
        for _ in range(3):
            served.call(lambda: None)  # the connection is closed in the loop's next iterations
            client.send(b"more")
        assert client.answer().headers["connection"] == "close"
        assert client.closed()


def test_headers_over_the_limit(served: Served) -> None:
    with served.connect() as client:
        client.send(b"GET / HTTP/1.1\r\nX: " + bytes(b"x" * LARGE))
        refused(client, 431, "headers-too-large")


def test_trailers_over_the_limit(served: Served) -> None:
    with served.connect() as client:
        client.send(large(chunked=True)[:300] + bytes(LARGE))  # the rest of one chunk, and then garbage
        assert client.answer().status in (400, 413)
        assert client.closed()
    head = post(GATE, b"", {"Transfer-Encoding": "chunked"}).replace(b"Content-Length: 0\r\n", b"")
    with served.connect() as client:
        client.send(head + b"2\r\n{}\r\n0\r\n" + b"x-1: y\r\n" * (LARGE // 8))
        refused(client, 431, "headers-too-large")


@pytest.mark.parametrize("start", [b"\0", b"POST / HTTP/2.0\r\n\r\n", post(GATE, b"", {"Host": "a b"})])
def test_bytes_that_are_no_request(served: Served, start: bytes) -> None:
    with served.connect() as client:
        client.send(start + bytes(LARGE))
        while client.answer().slug != "bad-http":
            pass
        assert client.closed()


@FAST_OR_NOT
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_body_that_comes_too_late(fast: bool, chunked: bool) -> None:
    request = large(chunked)
    settings: dict[str, Any] = {"receive_timeout_s": 1000.0, "max_json_bytes": 2 * LARGE}
    with gated(fast, clock=Clock(), **settings) as (served, _), served.connect() as client:
        client.send(request[:1000])
        served.skip(1000.0)
        answer = client.answer()
        assert (answer.status, answer.slug) == (408, "receive-timeout")
        client.send(request[1000:])
        assert client.closed()


@FAST_OR_NOT
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_a_body_for_a_server_that_stops(fast: bool, chunked: bool) -> None:
    with gated(fast) as (served, engine), served.connect() as running, served.connect() as client:
        half_sent(served, engine, running)
        client.send(large(chunked))
        refused(client, 503, "draining")
        engine.release()
        assert data_of(running.answer()) == [2]


@FAST_OR_NOT
def test_the_rest_of_a_body_for_a_server_that_stops(fast: bool) -> None:
    request = large(chunked=False)
    with gated(fast, max_json_bytes=2 * LARGE) as (served, _), served.connect() as client:
        client.send(request[:5000])
        assert served.call(lambda: served.inference.draining) is False
        served.stop()
        answer = client.answer()
        assert (answer.status, answer.slug) == (503, "draining")
        client.send(request[5000:])
        assert client.closed()


def half_sent(served: Served, engine: GatedEngine, running: Client) -> None:
    """Let a request run on this connection, and the server drain."""
    engine.hold()
    running.send(gate(1))
    assert engine.began.get(timeout=DEADLINE_S) == [1]
    served.stop()


def test_a_response_that_is_read_after_the_stop() -> None:
    """The time of a lingering close begins when the client has taken all of its last response."""
    x = {"name": "x", "shape": [1, 2], "datatype": "INT64", "data": [1, 2]}
    request = post(GATE, {"inputs": [x], "parameters": {"binary_data_output": True}})
    with gated(True, clock=Clock()) as (served, engine), served.connect(receive_buffer=4096) as client:
        engine.answer_width = 1 << 20
        client.send(request)
        until(served, lambda: any(one.transport.get_write_buffer_size() for one in served.connections()))
        served.stop()
        until(served, lambda: any(type(one.transport) is LingeringClose for one in served.connections()))
        for _ in range(4):
            served.skip(5.0)
        assert len(client.answer().body) > 8 << 20
        assert client.closed()


def until(served: Served, condition: Callable[[], object]) -> None:
    """Look at the server between the steps of its loop until a condition holds."""
    while not served.call(condition):
        pass


# The bounds


class Wire:
    """A transport that notes its calls."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.protocol: object = None

    def set_protocol(self, protocol: object) -> None:
        self.protocol = protocol

    def can_write_eof(self) -> bool:
        return True

    def __getattr__(self, name: str) -> object:
        return lambda: self.calls.append(name)


async def test_the_bytes_that_are_thrown_away_are_bounded() -> None:
    wire = Wire()
    end = LingeringClose(asyncio.Protocol(), wire, asyncio.get_running_loop(), stopping=False)
    assert (wire.protocol, wire.calls) == (end, ["write_eof", "resume_reading"])
    piece = bytes(1 << 20)
    for _ in range(lingering.LINGER_BYTES >> 20):
        end.data_received(piece)
    assert "abort" not in wire.calls
    end.data_received(b"x")
    assert wire.calls[-1] == "abort"
    end.connection_lost(None)


@pytest.mark.parametrize("quiet", [True, False])
def test_the_time_is_bounded(quiet: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a client that keeps the connection open, silent or not."""
    monkeypatch.setattr(lingering, "LINGER_IDLE_S" if quiet else "LINGER_S", 0.1)
    with gated(True, max_body_bytes=LIMIT) as (served, _), served.connect() as client:
        client.send(large(chunked=False)[:1000])
        refused(client, 413, "body-too-large")
        while served.call(served.connections):
            if not quiet:
                with contextlib.suppress(ConnectionError):
                    client.send(b"x")
