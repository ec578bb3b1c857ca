"""The end: draining with connections in every state."""

from __future__ import annotations

import socket

import pytest

from tests.support.http.serving import DEADLINE_S, GATE, Served, data_of, gate, gated, get, post

FAST_OR_NOT = pytest.mark.parametrize("fast", [True, False], ids=["fast", "asgi"])


def stopped(served: Served) -> None:
    served.join()
    assert served.server.status == 0
    assert served.connections() == []
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", served.server.port)):
        pass


@FAST_OR_NOT
def test_idle_connections_are_closed(fast: bool) -> None:
    with gated(fast) as (served, _), served.connect() as used, served.connect() as fresh:
        assert data_of(used.ask(gate(7))) == [14]
        served.stop()
        assert used.closed()
        assert fresh.closed()
        stopped(served)


@FAST_OR_NOT
def test_accepted_requests_are_answered(fast: bool) -> None:
    with gated(fast) as (served, engine):
        clients = [served.connect() for _ in range(3)]
        engine.hold()
        for n, client in enumerate(clients):
            client.send(gate(n))
            served.until(lambda n=n: served.batcher().counters.accepted == n + 1)  # type: ignore[misc]
            if n == 0:
                engine.began.get(timeout=DEADLINE_S)
        served.stop()
        assert served.ask(get("/v2/health/ready")).status == 503
        engine.release()
        for n, client in enumerate(clients):
            assert data_of(client.answer()) == [2 * n]
            assert client.closed()
            client.close()
        stopped(served)


@FAST_OR_NOT
def test_a_pipeline_is_cut_after_the_accepted_request(fast: bool) -> None:
    with gated(fast) as (served, engine), served.connect() as client:
        engine.hold()
        client.send(gate(1) + gate(2) + gate(3))
        assert engine.began.get(timeout=DEADLINE_S) == [1]
        served.stop()
        assert served.ask(get("/v2/health/ready")).status == 503
        engine.release()
        assert data_of(client.answer()) == [2]
        answer = client.answer()
        assert (answer.status, answer.slug) == (503, "draining")
        assert answer.headers["connection"] == "close"
        assert client.closed()
        stopped(served)


@FAST_OR_NOT
@pytest.mark.parametrize("piece", [1, 10, -5])
@pytest.mark.parametrize("headers", [{}, {"Content-Encoding": "identity"}], ids=["plain", "long-way"])
def test_a_half_request_is_refused(fast: bool, piece: int, headers: dict[str, str]) -> None:
    """The rest of it may never come, and the end does not wait for it."""
    with gated(fast) as (served, _), served.connect() as client:
        client.send(gate(7, headers=headers)[:piece])
        assert served.ask(get("/v2/health/live")).status == 200
        served.stop()
        answer = client.answer()
        assert (answer.status, answer.slug) == (503, "draining")
        assert answer.headers["retry-after"] == "1"
        assert client.closed()
        stopped(served)


@FAST_OR_NOT
def test_an_unread_response_does_not_delay_the_end(fast: bool) -> None:
    x = {"name": "x", "shape": [1, 2], "datatype": "INT64", "data": [1, 2]}
    request = post(GATE, {"inputs": [x], "parameters": {"binary_data_output": True}})
    with gated(fast, drain_timeout_s=0.1) as (served, engine), served.connect(receive_buffer=4096) as client:
        engine.answer_width = 1 << 21
        client.send(request)
        served.until(lambda: served.batcher().counters.accepted == 1)
        served.stop()
        stopped(served)


@FAST_OR_NOT
def test_unfinished_requests_get_abandoned(fast: bool, caplog: pytest.LogCaptureFixture) -> None:
    with gated(fast, drain_timeout_s=0.1) as (served, engine), served.connect() as client:
        engine.hold()
        client.send(gate(1))
        assert engine.began.get(timeout=DEADLINE_S) == [1]
        served.stop()
        answer = client.answer()
        assert (answer.status, answer.slug) == (503, "abandoned")
        assert answer.headers["retry-after"] == "1"
        assert client.closed()
        engine.release()
        stopped(served)
