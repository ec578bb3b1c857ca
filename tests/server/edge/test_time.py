"""Time limits of a connection: idle, slow and stalled clients, in time that the tests skip."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.fronts.linked import WAYS, way
from tests.support.http.clock import Clock
from tests.support.http.serving import (
    DEADLINE_S,
    GATE,
    Client,
    Served,
    data_of,
    gate,
    gated,
    get,
    post,
    rows_of,
)

FAST_OR_NOT = pytest.mark.parametrize("fast", [True, False], ids=["fast", "asgi"])
LIMIT_S, LONG_S = 1000.0, 10_000.0


@pytest.fixture(scope="module", params=WAYS)
def impatient(request: pytest.FixtureRequest) -> Iterator[Served]:
    """A server with a short receive limit and a long keep-alive time."""
    settings: dict[str, Any] = {"receive_timeout_s": LIMIT_S, "keep_alive_s": LONG_S}
    with gated(**way(request.param), clock=Clock(), **settings) as (served, _):
        yield served


def too_late(served: Served, client: Client) -> None:
    """Check that the receive limit ends a connection."""
    served.skip(LIMIT_S)
    refused(client)


def refused(client: Client) -> None:
    answer = client.answer()
    assert (answer.status, answer.slug) == (408, "receive-timeout")
    assert answer.headers["connection"] == "close"
    assert client.closed()


def wait_a_limit(served: Served, times: int = 2) -> None:
    """Skip the receive limit, which closes a silent connection."""
    for _ in range(times):
        with served.connect() as silent:
            served.skip(LIMIT_S)
            assert silent.closed()


# Idle


@FAST_OR_NOT
@pytest.mark.parametrize(
    "request_", [gate(7), get("/v2/health/live"), post(GATE, b"{")], ids=["infer", "live", "bad"]
)
def test_an_idle_connection_is_closed(fast: bool, request_: bytes) -> None:
    """After the keep-alive time, although the receive limit is long."""
    settings: dict[str, Any] = {"keep_alive_s": LIMIT_S, "receive_timeout_s": LONG_S}
    with gated(fast, clock=Clock(), **settings) as (served, _), served.connect() as client:
        client.ask(request_)
        served.skip(LIMIT_S)
        assert client.closed()


@FAST_OR_NOT
def test_an_idle_connection_stays_for_its_time(fast: bool) -> None:
    with (
        gated(fast, clock=Clock(), keep_alive_s=LONG_S, receive_timeout_s=LIMIT_S) as (served, _),
        served.connect() as client,
    ):
        for n in range(3):
            assert data_of(client.ask(gate(n))) == [2 * n]
            wait_a_limit(served)


@FAST_OR_NOT
def test_no_keep_alive_time_at_all(fast: bool) -> None:
    with gated(fast, keep_alive_s=0.0) as (served, _), served.connect() as client:
        assert data_of(client.ask(gate(7))) == [14]
        assert client.closed()


# Slow and stalled senders


def test_a_connection_that_never_says_anything(impatient: Served) -> None:
    with impatient.connect() as client:
        impatient.skip(LIMIT_S)
        assert client.closed()


@pytest.mark.parametrize("piece", [1, 10, 40, 60])
@pytest.mark.parametrize("warm", [False, True])
def test_headers_that_stop_coming(impatient: Served, piece: int, warm: bool) -> None:
    with impatient.connect() as client:
        if warm:
            assert data_of(client.ask(gate(7))) == [14]
        client.send(gate(7)[:piece])
        too_late(impatient, client)


@pytest.mark.parametrize("piece", [0, 1, 20])
@pytest.mark.parametrize("headers", [{}, {"Content-Encoding": "identity"}], ids=["plain", "long-way"])
def test_a_body_that_stops_coming(impatient: Served, piece: int, headers: dict[str, str]) -> None:
    request = gate(7, headers=headers)
    with impatient.connect() as client:
        assert data_of(client.ask(request)) == [14]
        client.send(request[: request.index(b"\r\n\r\n") + 4 + piece])
        too_late(impatient, client)


def test_chunks_that_stop_coming(impatient: Served) -> None:
    with impatient.connect() as client:
        client.send(
            f"POST {GATE} HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel".encode()
        )
        too_late(impatient, client)


def test_a_body_that_was_asked_for_and_does_not_come(impatient: Served) -> None:
    request = gate(7, headers={"Expect": "100-continue"})
    with impatient.connect() as client:
        client.send(request[: request.index(b"\r\n\r\n") + 4])
        assert client.answer().status == 100
        too_late(impatient, client)


def test_a_sender_that_never_stops_and_never_ends(impatient: Served) -> None:
    """A byte now and then does not extend the limit of the whole request."""
    with impatient.connect() as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.send(f"POST {GATE} HTTP/1.1\r\nX: ".encode())
        for _ in range(9):
            client.send(b"x")
            impatient.skip(LIMIT_S / 10)
        assert not select.select([client.socket], [], [], 0)[0]
        impatient.skip(LIMIT_S / 10)
        refused(client)


def test_a_refused_body_that_stops_coming(impatient: Served) -> None:
    """It was answered before, so it gets no second response."""
    with impatient.connect() as client:
        answer = client.ask(post("/v2/models/nobody/infer", b"", {"Content-Length": "10"}))
        assert answer.slug == "unknown-model"
        impatient.skip(LIMIT_S)
        assert client.closed()


# Delays of the server


@FAST_OR_NOT
def test_a_long_run_is_not_the_client_s_fault(fast: bool) -> None:
    settings: dict[str, Any] = {"receive_timeout_s": LIMIT_S, "keep_alive_s": LIMIT_S}
    with gated(fast, clock=Clock(), **settings) as (served, engine), served.connect() as client:
        engine.hold()
        client.send(gate(1))
        assert engine.began.get(timeout=DEADLINE_S) == [1]
        wait_a_limit(served, 4)
        engine.release()
        assert data_of(client.answer()) == [2]


@FAST_OR_NOT
@pytest.mark.parametrize("piece", [10, -5])
def test_a_half_request_behind_a_long_run(fast: bool, piece: int) -> None:
    """The response before it comes first; only then does the limit of the half request count."""
    with (
        gated(fast, clock=Clock(), receive_timeout_s=LIMIT_S, keep_alive_s=LONG_S) as (served, engine),
        served.connect() as client,
    ):
        engine.hold()
        client.send(gate(1) + gate(2)[:piece])
        assert engine.began.get(timeout=DEADLINE_S) == [1]
        wait_a_limit(served, 3)
        engine.release()
        assert data_of(client.answer()) == [2]
        too_late(served, client)


@FAST_OR_NOT
def test_a_half_request_that_is_completed_after_a_long_run(fast: bool) -> None:
    with (
        gated(fast, clock=Clock(), receive_timeout_s=LIMIT_S, keep_alive_s=LONG_S) as (served, engine),
        served.connect() as client,
    ):
        engine.hold()
        client.send(gate(1) + gate(2)[:-5])
        assert engine.began.get(timeout=DEADLINE_S) == [1]
        wait_a_limit(served, 3)
        engine.release()
        assert data_of(client.answer()) == [2]
        client.send(gate(2)[-5:])
        assert data_of(client.answer()) == [4]


def test_others_are_served_while_senders_stall(impatient: Served) -> None:
    with contextlib.ExitStack() as stack:
        stalled = [stack.enter_context(impatient.connect()) for _ in range(20)]
        for n, client in enumerate(stalled):
            client.send(gate(7)[: 3 * n + 1])
        for n in range(20):
            assert data_of(impatient.ask(post(GATE, rows_of(n)))) == [2 * n]
        impatient.skip(LIMIT_S)
        for client in stalled:
            refused(client)


# Unread responses


def test_an_unread_response_does_not_keep_its_connection(impatient: Served) -> None:
    """The server aborts a connection that it cannot close in order."""
    with impatient.connect() as client:
        client.send(get("/openapi.json") * 2000)
        until_gone(impatient)


def until_gone(served: Served) -> None:
    """Wait until the server has closed all connections but the silent ones, which limits end too."""
    for _ in range(50):
        wait_a_limit(served, times=1)
        if not served.call(lambda: len(served.server.server_state.connections)):
            return
    raise AssertionError("the connection is still there")
