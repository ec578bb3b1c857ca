"""The end: draining with connections in every state."""

from __future__ import annotations

import contextlib
import errno
import socket
import time

import pytest

from cobatch.server.listeners import let_in_no_more
from tests.support.fronts.linked import WAYS, way
from tests.support.http.serving import DEADLINE_S, GATE, Client, Served, data_of, gate, gated, get, post

ALL_WAYS = pytest.mark.parametrize("path", WAYS)


def stopped(served: Served) -> None:
    served.join()
    assert served.server.status == 0
    assert served.connections() == []
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", served.server.port)):
        pass


@ALL_WAYS
def test_idle_connections_are_closed(path: str) -> None:
    with gated(**way(path)) as (served, _), served.connect() as used, served.connect() as fresh:
        assert data_of(used.ask(gate(7))) == [14]
        served.stop()
        assert used.closed()
        assert fresh.closed()
        stopped(served)


def test_the_server_ends_although_a_batcher_cannot_drain(caplog: pytest.LogCaptureFixture) -> None:
    async def drain(*_: float) -> bool:
        raise ValueError("a defect")

    with gated(True) as (served, _):
        served.call(lambda: setattr(served.batcher(), "drain", drain))
        served.stop()
        served.join()
    assert "draining failed" in caplog.text


@ALL_WAYS
def test_a_request_that_crosses_the_end_is_not_reset(path: str) -> None:
    """Its client sees the end of the connection."""
    with gated(**way(path)) as (served, _), served.connect() as client:
        assert data_of(client.ask(gate(7))) == [14]

        def cross() -> None:
            (connection,) = served.connections()
            client.send(gate(8))
            connection.shutdown()

        served.call(cross)
        assert client.socket.recv(1) == b""


@ALL_WAYS
def test_accepted_requests_are_answered(path: str) -> None:
    with gated(**way(path)) as (served, engine):
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


@ALL_WAYS
def test_a_pipeline_is_cut_after_the_accepted_request(path: str) -> None:
    with gated(**way(path)) as (served, engine), served.connect() as client:
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


@ALL_WAYS
@pytest.mark.parametrize("piece", [1, 10, -5])
@pytest.mark.parametrize("headers", [{}, {"Content-Encoding": "identity"}], ids=["plain", "long-way"])
def test_a_half_request_is_refused(path: str, piece: int, headers: dict[str, str]) -> None:
    """The rest of it may never come, and the end does not wait for it."""
    with gated(**way(path)) as (served, _), served.connect() as client:
        client.send(gate(7, headers=headers)[:piece])
        assert served.ask(get("/v2/health/live")).status == 200
        served.stop()
        answer = client.answer()
        assert (answer.status, answer.slug) == (503, "draining")
        assert answer.headers["retry-after"] == "1"
        assert client.closed()
        stopped(served)


@ALL_WAYS
def test_an_unread_response_does_not_delay_the_end(path: str) -> None:
    x = {"name": "x", "shape": [1, 2], "datatype": "INT64", "data": [1, 2]}
    request = post(GATE, {"inputs": [x], "parameters": {"binary_data_output": True}})
    with (
        gated(**way(path), drain_timeout_s=0.1) as (served, engine),
        served.connect(receive_buffer=4096) as client,
    ):
        engine.answer_width = 1 << 21
        client.send(request)
        served.until(lambda: served.batcher().counters.accepted == 1)
        served.stop()
        stopped(served)


@ALL_WAYS
def test_unfinished_requests_get_abandoned(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with gated(**way(path), drain_timeout_s=0.1) as (served, engine), served.connect() as client:
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


@ALL_WAYS
def test_connections_in_the_backlog_are_answered(path: str) -> None:
    """Those that come in the last moment, whose connections the loop has not accepted yet."""
    clients: list[Client] = []
    with contextlib.ExitStack() as stack, gated(**way(path)) as (served, _):
        shutdown = served.server.shutdown

        async def late(sockets: object = None) -> None:
            for n in range(16):
                clients.append(stack.enter_context(served.connect()))
                clients[-1].send(gate(n))
            await shutdown()

        served.server.shutdown = late  # type: ignore[method-assign]
        served.stop()
        stopped(served)
        for client in clients:
            answer = client.answer()
            assert (answer.status, answer.slug) == (503, "draining")
            assert client.closed()
    assert len(clients) == 16


def test_a_listener_lets_in_what_waits_and_no_more() -> None:
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def connects() -> bool:
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
            # On loopback the handshake is over when `connect_ex` returns.
            return client.connect_ex(listener.getsockname()) in (0, errno.EISCONN)

        assert connects()
        let_in_no_more(listener.fileno())
        assert not connects()
        listener.setblocking(False)
        stack.enter_context(listener.accept()[0])
        with pytest.raises(BlockingIOError):
            listener.accept()


# The delay


def second_half(served: Served) -> None:
    """Go on to the second half of a delay of 1000 s."""
    for ahead_s in (0, 600):
        served.call(lambda ahead_s=ahead_s: served.server._leave(time.monotonic() + ahead_s))  # type: ignore[misc]


@ALL_WAYS
def test_the_server_serves_on_unready_until_the_delay_is_over_or_cut_short(path: str) -> None:
    with gated(**way(path), drain_delay_s=1000) as (served, _), served.connect() as client:
        served.stop()
        for target in ("/v2/health/ready", "/v2/models/gate/ready"):
            assert client.ask(get(target)).status == 503
        assert client.ask(get("/v2/health/live")).status == 200
        for n in (1, 2):
            assert data_of(client.ask(gate(n))) == [2 * n]
            assert data_of(served.ask(gate(n))) == [2 * n]
        served.stop()
        answer = client.ask(gate(3))
        assert (answer.status, answer.slug) == (503, "draining")
        assert client.closed()
        stopped(served)


@ALL_WAYS
def test_the_delay_ends_by_itself(path: str) -> None:
    with gated(**way(path), drain_delay_s=0.001) as (served, _):
        served.stop()
        stopped(served)


@ALL_WAYS
@pytest.mark.parametrize("request_", [gate(1), gate(1, headers={"Accept": "*/*"}), get("/v2/health/live")])
def test_each_response_in_the_second_half_of_the_delay_is_its_connections_last(
    path: str, request_: bytes
) -> None:
    with gated(**way(path), drain_delay_s=1000) as (served, _), contextlib.ExitStack() as stack:
        used, fresh = (stack.enter_context(served.connect()) for _ in range(2))
        for _ in range(2):
            assert "connection" not in used.ask(request_).headers
        served.stop()
        assert "connection" not in used.ask(request_).headers
        second_half(served)
        late = stack.enter_context(served.connect())
        for client in (used, fresh, late):
            answer = client.ask(request_)
            assert (answer.status, answer.headers["connection"]) == (200, "close")
            assert client.closed()


@ALL_WAYS
def test_a_request_that_waits_then_is_its_connections_last(path: str) -> None:
    with gated(**way(path), drain_delay_s=1000) as (served, engine), served.connect() as client:
        engine.hold()
        client.send(gate(1))
        assert engine.began.get(timeout=DEADLINE_S) == [1]
        served.stop()
        second_half(served)
        engine.release()
        answer = client.answer()
        assert (data_of(answer), answer.headers["connection"]) == ([2], "close")
        assert client.closed()


@ALL_WAYS
@pytest.mark.parametrize("first", [{}, {"Connection": "close"}], ids=["kept", "closed"])
def test_of_a_pipeline_only_the_last_response_closes(path: str, first: dict[str, str]) -> None:
    with gated(**way(path), drain_delay_s=1000) as (served, engine), served.connect() as client:
        engine.hold()
        served.stop()
        second_half(served)
        client.send(gate(1, headers=first) + gate(2) + get("/v2/health/live"))
        assert engine.began.get(timeout=DEADLINE_S) == [1]
        engine.release()
        if not first:
            for n in (1, 2):
                answer = client.answer()
                assert (data_of(answer), "connection" in answer.headers) == ([2 * n], False)
        assert client.answer().headers["connection"] == "close"
        assert client.closed()
