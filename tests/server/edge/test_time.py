"""Time limits of a connection: idle, slow and stalled clients.

These tests are about time, so the limits are small and real; whatever else they need to happen before
or after a limit is made to happen by another connection's limit, never by sleeping.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Iterator

import pytest

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
LONG_S = 10 * DEADLINE_S


@pytest.fixture(scope="module", params=["fast", "asgi"])
def impatient(request: pytest.FixtureRequest) -> Iterator[Served]:
    """A server with a receive limit of 0.2 s and a long keep-alive time."""
    with gated(request.param == "fast", receive_timeout_s=0.2, keep_alive_s=LONG_S) as (served, _):
        yield served


def too_late(client: Client) -> None:
    answer = client.answer()
    assert (answer.status, answer.slug) == (408, "receive-timeout")
    assert answer.headers["connection"] == "close"
    assert client.closed()


def wait_a_limit(served: Served, times: int = 2) -> None:
    """Return after the receive limit has passed: it closed a silent connection."""
    for _ in range(times):
        with served.connect() as clock:
            assert clock.closed()


# Idle


@FAST_OR_NOT
@pytest.mark.parametrize(
    "request_", [gate(7), get("/v2/health/live"), post(GATE, b"{")], ids=["infer", "live", "bad"]
)
def test_an_idle_connection_is_closed(fast: bool, request_: bytes) -> None:
    """After the keep-alive time, although the receive limit is long."""
    with gated(fast, keep_alive_s=0.1, receive_timeout_s=LONG_S) as (served, _), served.connect() as client:
        client.ask(request_)
        assert client.closed()


@FAST_OR_NOT
def test_an_idle_connection_stays_for_its_time(fast: bool) -> None:
    with (
        gated(fast, keep_alive_s=LONG_S, receive_timeout_s=0.1) as (served, _),
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
        assert client.closed()


@pytest.mark.parametrize("piece", [1, 10, 40, 60])
@pytest.mark.parametrize("warm", [False, True])
def test_headers_that_stop_coming(impatient: Served, piece: int, warm: bool) -> None:
    with impatient.connect() as client:
        if warm:
            assert data_of(client.ask(gate(7))) == [14]
        client.send(gate(7)[:piece])
        too_late(client)


@pytest.mark.parametrize("piece", [0, 1, 20])
@pytest.mark.parametrize("headers", [{}, {"Content-Encoding": "identity"}], ids=["plain", "long-way"])
def test_a_body_that_stops_coming(impatient: Served, piece: int, headers: dict[str, str]) -> None:
    request = gate(7, headers=headers)
    with impatient.connect() as client:
        assert data_of(client.ask(request)) == [14]
        client.send(request[: request.index(b"\r\n\r\n") + 4 + piece])
        too_late(client)


def test_chunks_that_stop_coming(impatient: Served) -> None:
    with impatient.connect() as client:
        client.send(
            f"POST {GATE} HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel".encode()
        )
        too_late(client)


def test_a_body_that_was_asked_for_and_does_not_come(impatient: Served) -> None:
    request = gate(7, headers={"Expect": "100-continue"})
    with impatient.connect() as client:
        client.send(request[: request.index(b"\r\n\r\n") + 4])
        assert client.answer().status == 100
        too_late(client)


def test_a_sender_that_never_stops_and_never_ends(impatient: Served) -> None:
    """A byte now and then does not extend the limit of the whole request."""
    with impatient.connect() as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.send(f"POST {GATE} HTTP/1.1\r\nX: ".encode())
        sent = 0
        while not select.select([client.socket], [], [], 0)[0]:
            client.send(b"x")
            sent += 1
            impatient.ask(get("/v2/health/live"))
        assert sent
        too_late(client)


def test_a_refused_body_that_stops_coming(impatient: Served) -> None:
    """It was answered before, so it gets no second response."""
    with impatient.connect() as client:
        answer = client.ask(post("/v2/models/nobody/infer", b"", {"Content-Length": "10"}))
        assert answer.slug == "unknown-model"
        assert client.closed()


# Delays of the server


@FAST_OR_NOT
def test_a_long_run_is_not_the_client_s_fault(fast: bool) -> None:
    with gated(fast, receive_timeout_s=0.1, keep_alive_s=0.1) as (served, engine), served.connect() as client:
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
        gated(fast, receive_timeout_s=0.2, keep_alive_s=LONG_S) as (served, engine),
        served.connect() as client,
    ):
        engine.hold()
        client.send(gate(1) + gate(2)[:piece])
        assert engine.began.get(timeout=DEADLINE_S) == [1]
        wait_a_limit(served, 3)
        engine.release()
        assert data_of(client.answer()) == [2]
        too_late(client)


@FAST_OR_NOT
def test_a_half_request_that_is_completed_after_a_long_run(fast: bool) -> None:
    with (
        gated(fast, receive_timeout_s=0.2, keep_alive_s=LONG_S) as (served, engine),
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
        for client in stalled:
            too_late(client)


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
