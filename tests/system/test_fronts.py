"""A server of several processes, of which some are killed or stopped; and TLS in front of them."""

from __future__ import annotations

import os
import select
import signal
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPSConnection, RemoteDisconnected
from pathlib import Path

import pytest

from tests.support.auth.certificates import Pair
from tests.support.http.process import WAIT_S, Answer, Cobatch, Connection
from tests.support.models import models
from tests.support.models.gate import HOLD

pytestmark = pytest.mark.slow

ROW, NEGATED = [[1, 2, 3]], [[-1, -2, -3]]


@pytest.fixture
def negate(tmp_path: Path) -> str:
    """Return a model with y = -x, FP32 [batch, 3]; its name is `negate`."""
    return models.write(tmp_path, models.negate(), "negate.onnx")


@pytest.fixture
def server(tmp_path: Path, negate: str) -> Iterator[Cobatch]:
    """Start home and two fronts; runs with HOLD in their input block."""
    with Cobatch(tmp_path, negate, "--port", "0", "--processes", "3", gate=True) as server:
        yield server.ready()


def child(server: Cobatch, name: str) -> int:
    """Return the process of a child, by its name in the list of processes."""
    supervisor = server.process.pid
    for pid in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split():
        if Path(f"/proc/{pid}/cmdline").read_bytes().endswith(f"\0{name}\0".encode()):
            return int(pid)
    raise AssertionError(f"there is no {name}")


def kill(pid: int) -> None:
    """Kill a process, and wait until it has closed its sockets, with connections that it has not read yet."""
    end = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        select.select([end], [], [], WAIT_S)
    finally:
        os.close(end)


def front(connection: Connection) -> None:
    """Bring a connection back to its front: after a request for another route it is home's."""
    assert connection.infer("negate", [["no number"]]).status == 422


def refused_until_ready(connection: Connection) -> int:
    """Send requests on one connection until one is answered; return how many were refused before."""
    for refused in range(100_000):
        answer = connection.infer("negate", ROW)
        health = connection.get("/v2/health/ready")
        if answer.status == 200:
            assert answer.rows == NEGATED
            return refused
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert health.status in (200, 503)
    raise AssertionError("never ready again")


def test_a_killed_front_ends_its_own_connections_only(server: Cobatch) -> None:
    one, other = server.connect(), server.connect()
    assert one.infer("negate", ROW).rows == other.infer("negate", ROW).rows == NEGATED
    one.send_infer("negate", [[float(HOLD)] * 3])
    server.held()
    other.send_infer("negate", ROW)
    kill(child(server, "front 0"))
    server.release()
    answered = 0
    for connection in (one, other):
        try:
            assert connection.answer().status == 200
            answered += 1
        except (RemoteDisconnected, ConnectionError):
            continue
        assert connection.infer("negate", ROW).rows == NEGATED
    assert answered == 1
    for _ in range(4):
        assert server.connect().infer("negate", ROW).rows == NEGATED
    assert server.stop() == 0
    assert server.stderr.count("starting another") == 1


def test_a_killed_front_loses_no_request_that_it_has_not_read(server: Cobatch) -> None:
    stopped = child(server, "front 0")
    os.kill(stopped, signal.SIGSTOP)
    calls = [Connection(server.port) for _ in range(6)]
    with ExitStack() as stack:
        for call in calls:
            stack.callback(call.close)
            call.send_infer("negate", ROW)
        os.kill(stopped, signal.SIGKILL)
        assert [call.answer().rows for call in calls] == [NEGATED] * 6
    assert server.stop() == 0


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGABRT])
def test_fronts_refuse_until_there_is_another_home(server: Cobatch, sent: signal.Signals) -> None:
    held, waiting, caller = server.connect(), server.connect(), server.connect()
    held.send_infer("negate", [[float(HOLD)] * 3])
    server.held()
    waiting.send_infer("negate", ROW)
    front(caller)
    os.kill(child(server, "home"), sent)
    for connection in (held, waiting):
        answer = connection.answer()
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) >= 1
    assert refused_until_ready(caller) > 0
    # No front was started again, and no connection ended.
    assert held.infer("negate", ROW).rows == waiting.infer("negate", ROW).rows == NEGATED
    assert server.stderr.count("starting another") == 1
    assert server.stop() == 0


def test_a_home_that_stands_still_is_replaced(server: Cobatch) -> None:
    caller = server.connect()
    front(caller)
    os.kill(child(server, "home"), signal.SIGSTOP)
    assert refused_until_ready(caller) > 0
    assert "home does not respond: killing it" in server.stderr
    assert server.stop() == 0


def test_a_signal_ends_all_also_if_home_stands_still(server: Cobatch) -> None:
    os.kill(child(server, "home"), signal.SIGSTOP)
    assert server.stop() == 0


def test_tls_ends_in_the_fronts(tmp_path: Path, negate: str) -> None:
    pair, fresh = Pair(), Pair()
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"

    def use(pair: Pair) -> None:
        cert.write_bytes(pair.certificate)
        key.write_bytes(pair.key())

    def connect() -> HTTPSConnection:
        context = ssl.create_default_context(cadata=cert.read_text())
        connection = HTTPSConnection("127.0.0.1", port, timeout=WAIT_S, context=context)
        stack.callback(connection.close)
        return connection

    def get(connection: HTTPSConnection, path: str) -> Answer:
        connection.request("GET", path)
        return Answer(connection.getresponse())

    use(pair)
    tls = ("--tls-cert", cert, "--tls-key", key)
    with Cobatch(tmp_path, negate, "--port", "0", "--processes", "3", *tls) as server, ExitStack() as stack:
        port = int(server.ready().line("cobatch: listening on https://127.0.0.1:"))
        connections = [connect() for _ in range(4)]
        for connection in connections:
            assert get(connection, "/v2/models/negate").json["name"] == "negate"
        # A client without TLS is sent away, and occupies nothing.
        plain = Connection(port)
        stack.callback(plain.close)
        with pytest.raises((ConnectionError, RemoteDisconnected)):
            plain.get("/v2/health/live")
        use(fresh)
        server.signal(signal.SIGHUP)
        for _ in range(100_000):
            try:
                assert get(connect(), "/v2/health/live").status == 200
                assert get(connect(), "/v2/health/live").status == 200  # at the other front
                break
            except ssl.SSLCertVerificationError:
                continue
        assert get(connections[0], "/v2/health/live").status == 200
        stack.close()  # an idle client that does not end TLS itself is waited for
        assert server.stop() == 0
        assert server.stderr.count("SIGHUP: read the certificate again") == 3
