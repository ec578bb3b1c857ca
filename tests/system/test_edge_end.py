"""How it ends: draining with connections in every state, and uvicorns that the fast path does not know."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
from uvicorn.protocols.http import flow_control
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from cobatch.server.edge import uvicorn_parts
from cobatch.server.edge.connection import Connection
from tests.support.http.serving import DEADLINE_S, GATE, Served, data_of, gate, gated, get, post, rows_of

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
def test_what_was_accepted_is_answered(fast: bool) -> None:
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
def test_a_pipeline_is_cut_after_the_one_that_was_accepted(fast: bool) -> None:
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
def test_an_answer_that_nobody_takes_does_not_hold_up_the_end(fast: bool) -> None:
    x = {"name": "x", "shape": [1, 2], "datatype": "INT64", "data": [1, 2]}
    request = post(GATE, {"inputs": [x], "parameters": {"binary_data_output": True}})
    with gated(fast, drain_timeout_s=0.1) as (served, engine), served.connect(receive_buffer=4096) as client:
        engine.answer_width = 1 << 21
        client.send(request)
        served.until(lambda: served.batcher().counters.accepted == 1)
        served.stop()
        stopped(served)


@FAST_OR_NOT
def test_what_is_not_done_in_time_is_told_so(fast: bool, caplog: pytest.LogCaptureFixture) -> None:
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


# Uvicorn's inside


def test_this_uvicorn_is_as_expected() -> None:
    assert uvicorn_parts.missing() is None


def other(*parameters: str) -> Callable[..., None]:
    """A function with these parameters."""
    made: Callable[..., None] = eval(f"lambda self, {', '.join(parameters)}: None")
    return made


CHANGES: list[tuple[Any, str, Any]] = [
    (HttpToolsProtocol, "on_body", None),
    (HttpToolsProtocol, "on_body", other("body", "more")),
    (HttpToolsProtocol, "data_received", other("buffer")),
    (HttpToolsProtocol, "__init__", other("config", "server_state")),
    (HttpToolsProtocol, "__init__", other("config", "server_state", "app_state", "_loop")),
    (HttpToolsProtocol, "_start_asgi_task", None),
    (RequestResponseCycle, "__init__", other("scope")),
    (flow_control.FlowControl, "resume_reading", None),
    (flow_control.FlowControl, "__init__", other("transport", "limit")),
    (flow_control, "FlowControl", None),
    (ServerState, "__init__", other("config=None")),
]


@pytest.mark.parametrize(("owner", "name", "value"), CHANGES)
def test_a_changed_part_is_named(owner: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, value)
    missing = uvicorn_parts.missing()
    assert missing is not None
    assert owner.__name__.rpartition(".")[2] in missing


def test_a_changed_uvicorn_is_served_through_asgi(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Slower, right, and said once."""
    on_body = HttpToolsProtocol.on_body

    def changed(self: HttpToolsProtocol, body: bytes, more: bool = False) -> None:
        on_body(self, body)

    monkeypatch.setattr(HttpToolsProtocol, "on_body", changed)
    with gated(True) as (served, _), served.connect() as client:
        for n in range(3):
            assert data_of(client.ask(gate(n))) == [2 * n]
        assert data_of(client.ask(post(GATE, rows_of(1, 2)))) == [2, 4]
        (protocol,) = served.call(served.connections)
        assert isinstance(protocol, HttpToolsProtocol)
        assert not isinstance(protocol, Connection)
    said = [record.getMessage() for record in caplog.records if "no fast path" in record.getMessage()]
    assert len(said) == 1
    assert "HttpToolsProtocol.on_body" in said[0]
