"""Requests that are for home, on connections that a front has: relayed, and given back."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

from cobatch.server.fronts.reception import HomeConnection, Reception
from cobatch.server.fronts.relay import Relay
from cobatch.server.http.reply import PART_BYTES
from cobatch.server.settings.schema import ModelSettings
from tests.support.fronts.linked import LinkedServer, linked
from tests.support.http.process import eventually
from tests.support.http.serving import (
    DEADLINE_S,
    GATE,
    Client,
    GatedEngine,
    Served,
    data_of,
    gate,
    get,
    post,
)

MODEL = ModelSettings(path="gate", max_batch_size=4, max_queue_rows=1000)
LIVE = get("/v2/health/live")
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "asgi"])
def module_pair(request: pytest.FixtureRequest) -> Iterator[tuple[Served, GatedEngine]]:
    engine = GatedEngine()
    with linked(request.param, (MODEL,), engines={"gate": engine}, max_body_bytes=400_000) as served:
        yield served, engine


@pytest.fixture
def engine(module_pair: tuple[Served, GatedEngine]) -> GatedEngine:
    return module_pair[1]


@pytest.fixture
def served(module_pair: tuple[Served, GatedEngine]) -> Iterator[Served]:
    served, engine = module_pair
    yield served
    engine.answer_width = None
    engine.release()


@pytest.fixture
def server(served: Served) -> LinkedServer:
    server = served.server
    assert isinstance(server, LinkedServer)
    return server


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with served.connect() as client:
        yield client


def is_live(client: Client) -> bool:
    answer = client.answer()
    return answer.status == 200 and answer.json == {"live": True}


def is_bad(client: Client) -> bool:
    return client.answer().slug == "bad-request"


def chunked(body: bytes, size: int) -> bytes:
    """Return an infer request in chunks of `size` bytes, with a trailer."""
    head = f"POST {GATE} HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return head + b"".join([b"%x\r\n%b\r\n" % (len(part), part) for part in parts]) + b"0\r\nX: y\r\n\r\n"


def body_of(request: bytes) -> bytes:
    return request.partition(b"\r\n\r\n")[2]


# A message of each kind, and its answer. The BYTES in the chunks look like the end of a body, and like a
# request that would stop the answers if it were taken for one.
TRAP = b"0\r\n\r\nDELETE / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
KINDS: dict[str, tuple[bytes, Callable[[Client], bool]]] = {
    "infer": (gate(7), lambda client: data_of(client.answer()) == [14]),
    "query": (gate(7).replace(b"infer ", b"infer?a=b "), lambda client: data_of(client.answer()) == [14]),
    "chunks": (chunked(body_of(gate(7)), 9), lambda client: data_of(client.answer()) == [14]),
    "trap": (chunked(TRAP * 3, 500), is_bad),
    "get": (LIVE, is_live),
    "blank lines": (b"\r\n\r\n" + LIVE, is_live),
    "post": (post("/v2/repository/index", b""), lambda client: client.answer().json[0]["name"] == "gate"),
    "absolute": (LIVE.replace(b"/v2", b"http://test/v2", 1), is_live),
    "upgrade": (LIVE.replace(b"\r\n\r\n", b"\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"), is_live),
}


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_two_kinds_in_turns(client: Client, first: str, second: str) -> None:
    """Each behind the answer before it, then all in one packet, then a byte at a time."""
    for name in (first, second, first):
        message, check = KINDS[name]
        client.send(message)
        assert check(client), name
    order = (first, second, second, first)
    whole = b"".join(KINDS[name][0] for name in order)
    for pieces in ([whole], [whole[at : at + 1] for at in range(len(whole))]):
        for piece in pieces:
            client.send(piece)
        for name in order:
            assert KINDS[name][1](client), name


def test_every_place_to_cut_a_pipeline_in_two(client: Client) -> None:
    whole = gate(7) + LIVE + gate(8) + LIVE
    for at in range(1, len(whole)):
        client.send(whole[:at])
        client.send(whole[at:])
        assert data_of(client.answer()) == [14]
        assert is_live(client)
        assert data_of(client.answer()) == [16]
        assert is_live(client)


def test_a_connection_goes_back_to_its_front(served: Served, server: LinkedServer, client: Client) -> None:
    """Health checks and infer requests on one connection, as from a proxy."""
    before = server.relayed
    for n in range(10):
        for _ in range(3):
            client.send(LIVE)
            assert is_live(client)
        for _ in range(3):
            assert data_of(client.ask(gate(n))) == [2 * n]
    assert server.relayed == before + 10
    assert not served.call(lambda: [hand_over.relays for hand_over in server.hand_overs if hand_over.relays])


def test_earlier_requests_are_answered_first(served: Served, engine: GatedEngine, client: Client) -> None:
    engine.hold()
    client.send(gate(7) + LIVE + gate(8))
    assert engine.began.get(timeout=DEADLINE_S) == [7]
    client.socket.settimeout(0.01)
    with pytest.raises(TimeoutError):
        client.socket.recv(1, socket.MSG_PEEK)
    client.socket.settimeout(DEADLINE_S)
    engine.release()
    assert data_of(client.answer()) == [14]
    assert is_live(client)
    assert data_of(client.answer()) == [16]


def test_a_body_for_home_may_come_later(client: Client) -> None:
    request = post("/v1/models/gate/predictions", {"inputs": {"x": [[7]]}}, {"Expect": "100-continue"} | JSON)
    end = request.index(b"\r\n\r\n") + 4
    for _ in range(2):
        client.send(request[:end])
        assert client.answer().status == 100
        client.send(request[end:])
        assert client.answer().status == 200
        assert data_of(client.ask(gate(7))) == [14]


def test_a_large_answer_to_a_slow_reader(served: Served) -> None:
    """More than all buffers between: home waits for the client."""
    with served.connect(receive_buffer=4096) as client:
        client.send(get("/openapi.json") * 40)
        sizes = {len(client.answer().body) for _ in range(40)}
        assert len(sizes) == 1
        assert data_of(client.ask(gate(7))) == [14]


def of_the_loop(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the event loop has logged: errors of callbacks."""
    return [record.getMessage() for record in caplog.records if record.name == "asyncio"]


def test_a_relay_begins_while_a_long_answer_is_written(
    served: Served, engine: GatedEngine, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    engine.answer_width = PART_BYTES // 7
    x = {"name": "x", "shape": [1, 2], "datatype": "INT64", "data": [1_000_000, 0]}
    client.send(post(GATE, {"inputs": [x]}) + LIVE)
    answer = client.answer()
    assert PART_BYTES < len(answer.body) < 2 * PART_BYTES
    assert is_live(client)
    assert data_of(client.ask(gate(7))) == [14]
    assert not of_the_loop(caplog)


def test_a_refusal_reaches_a_client_that_still_sends(client: Client) -> None:
    request = post("/v1/models/gate/predictions", b" " * 3_000_000)
    client.send(request[:500_000])
    answer = client.answer()
    assert (answer.status, answer.slug) == (413, "body-too-large")
    assert answer.headers["connection"] == "close"
    client.send(request[500_000:])  # no reset
    assert client.closed()


def test_connection_close_ends_both_sides(served: Served, server: LinkedServer, client: Client) -> None:
    answer = client.ask(LIVE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    assert answer.headers["connection"] == "close"
    assert client.closed()
    client.close()
    ended(served, server)


def test_a_client_that_leaves_ends_both_sides(served: Served, server: LinkedServer) -> None:
    for half in (True, False):
        with served.connect() as client:
            client.send(LIVE)
            assert is_live(client)
            if half:
                client.socket.shutdown(socket.SHUT_WR)
                assert client.closed()
        ended(served, server)


def ended(served: Served, server: LinkedServer) -> None:
    """Wait until no connection is relayed."""
    eventually(lambda: not served.call(lambda: sum(len(one.relays) for one in server.hand_overs)))


def test_home_s_problems_have_the_client_s_path(client: Client) -> None:
    answer = client.ask(get("/nothing"))
    assert (answer.status, answer.slug, answer.json["instance"]) == (404, "not-found", "/nothing")


def test_without_home(served: Served, server: LinkedServer, client: Client) -> None:
    """A request that home owes is answered at its end; later ones at once, until there is another home."""
    client.send(LIVE)
    assert is_live(client)
    with served.connect() as other:
        other.send(LIVE)
        assert is_live(other)
        served.call(server.unlink)
        relays = served.call(lambda: [r for h in server.hand_overs for r in h.relays.values()])
        assert all(type(relay) is Relay for relay in relays)
        with served.connect() as new:
            for _ in range(2):
                answer = new.ask(get("/v2/models/gate"))
                assert (answer.status, answer.slug) == (503, "starting")
                assert answer.headers["retry-after"] == "1"
                assert new.ask(gate(7)).status == 503
                new.send(LIVE)
                assert is_live(new)
            served.call(server.link_all)
            assert new.ask(get("/v2/models/gate")).status == 200


def homes(served: Served) -> list[HomeConnection]:
    """Return home's connections, in the server's loop."""
    return [one for one in served.connections() if type(one) is HomeConnection]


def die(served: Served, server: LinkedServer, *, first: bool) -> None:
    """End home's connections. `first`: fronts see before that it is gone; else it seems to be there."""
    if first:
        server.unlink()
    for one in homes(served):
        one.transport.abort()


@pytest.fixture(params=[True, False], ids=["home seen gone", "not yet"])
def first(request: pytest.FixtureRequest, served: Served, server: LinkedServer) -> Iterator[bool]:
    """Return the order in which fronts see the ends of home's sockets."""
    ended(served, server)  # the connections of other tests
    yield request.param
    if request.param:
        served.call(server.link_all)


@pytest.mark.parametrize("more", [{}, {"Expect": "100-continue"}], ids=["", "after 100"])
def test_home_dies_with_a_request(
    served: Served, server: LinkedServer, client: Client, first: bool, more: dict[str, str]
) -> None:
    request = post("/v1/models/gate/predictions", {"inputs": {"x": [[7]]}}, more | JSON)
    head = request.index(b"\r\n\r\n") + 4
    client.send(request[:head])
    if more:
        assert client.answer().status == 100
    client.send(request[head:-5])

    def dies() -> bool:
        if not any(one.cycle for one in homes(served)):
            return False  # the request is on its way
        die(served, server, first=first)
        return True

    eventually(lambda: served.call(dies))
    answer = client.answer()
    assert (answer.status, answer.slug) == (503, "starting")
    assert answer.headers["connection"] == "close"
    client.send(request[-5:])
    assert client.closed()


def test_home_dies_before_it_has_read_a_request(
    served: Served, server: LinkedServer, client: Client, first: bool
) -> None:
    client.send(LIVE)
    assert is_live(client)
    served.call(lambda: [one.transport.pause_reading() for one in homes(served)])
    client.send(LIVE[:9])

    def forwarded() -> bool:
        relays = [relay for hand_over in server.hand_overs for relay in hand_over.relays.values()]
        pipes = [relay.pipe for relay in relays if isinstance(relay, Relay)]
        return any(pipe is not None and pipe.forwarded > len(LIVE) for pipe in pipes)

    eventually(lambda: served.call(forwarded))
    served.call(lambda: die(served, server, first=first))
    answer = client.answer()
    assert (answer.status, answer.slug) == (503, "starting")
    assert answer.headers["retry-after"] == "1"


def test_an_idle_connection_stays_when_home_dies(
    served: Served, server: LinkedServer, client: Client, first: bool
) -> None:
    for _ in range(2):
        client.send(LIVE)
        assert is_live(client)
    served.call(lambda: die(served, server, first=first))
    ended(served, server)
    answer = client.ask(gate(7))
    if first:
        assert (answer.status, answer.slug) == (503, "starting")
    else:
        assert data_of(answer) == [14]
    client.send(LIVE)
    assert is_live(client)


def test_home_dies_within_a_response(
    served: Served, server: LinkedServer, client: Client, first: bool
) -> None:
    client.send(LIVE)
    assert is_live(client)
    part = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345"
    served.call(lambda: [one.transport.write(part) for one in homes(served)])
    assert client.socket.recv(len(part), socket.MSG_WAITALL) == part
    served.call(lambda: die(served, server, first=first))
    assert client.closed()  # and nothing more is written


@pytest.mark.parametrize("given", [b"", b"\0" * 7, b"\0" * 7 + b"\x50POST"])
def test_home_dies_while_it_gives_a_connection_back(
    served: Served, server: LinkedServer, client: Client, first: bool, given: bytes
) -> None:
    client.send(LIVE)
    assert is_live(client)

    def dies(returning: Any) -> None:
        returning.transport.write(given)
        if first:
            server.unlink()
        returning.transport.abort()

    with mock.patch("cobatch.server.fronts.reception._Returning.eof_received", dies):
        answer = client.ask(gate(7))
    assert (answer.status, answer.slug) == (503, "starting")
    assert answer.headers["connection"] == "close"
    assert client.closed()


def test_a_front_without_descriptors_refuses(client: Client) -> None:
    def fail() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with mock.patch("socket.socketpair", fail):
        answer = client.ask(get("/v2"))
    assert (answer.status, answer.slug) == (503, "starting")
    assert answer.headers["retry-after"] == "1"
    assert client.closed()


def test_a_home_without_descriptors_refuses(client: Client) -> None:
    receive = socket.recv_fds

    def lose(*arguments: Any) -> Any:
        message, fds, flags, address = receive(*arguments)
        for fd in fds:
            os.close(fd)
        return message, [], flags | socket.MSG_CTRUNC, address

    with mock.patch("socket.recv_fds", lose):
        answer = client.ask(get("/v2"))
    assert (answer.status, answer.slug) == (503, "starting")
    assert client.closed()


async def test_a_front_that_dies_before_it_reads_ends_its_hand_over_socket(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    Reception(ours, asyncio.Protocol)
    theirs.close()  # home's first message is there
    async with asyncio.timeout(DEADLINE_S):
        while ours.fileno() >= 0:  # noqa: ASYNC110 - some iterations
            await asyncio.sleep(0)
    assert not of_the_loop(caplog)
