"""The memory that all bodies share: shares of clients, order, and requests that wait for it unread."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cobatch.server.edge import connection, framing, receiver
from cobatch.server.edge.connection import Connection
from cobatch.server.edge.receiver import LEAST_RATE
from cobatch.server.http.body_memory import (
    CLIENT_SHARE,
    FREE_BYTES,
    MOST_WAITING,
    READS_AT_ONCE,
    BodyMemory,
    ReadTurns,
    client_of,
    default_bytes,
    memory_bytes,
)
from cobatch.server.v2.pieces import in_pieces
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
    get,
    post,
    rows_of,
)


@dataclass(eq=False)
class Taker:
    """A connection that waits for `size` bytes."""

    memory: BodyMemory
    address: str
    size: int
    served: list[Taker] = field(default_factory=list)

    def on_body_memory(self) -> None:
        self.served.append(self)

    def wait(self) -> bool:
        return self.memory.wait(self, self.size)


def test_a_client_alone_has_most_of_it() -> None:
    memory = BodyMemory(100)
    assert [memory.take("a", 10) for _ in range(10)] == [True] * 8 + [False] * 2
    assert memory.used_bytes == 100 * CLIENT_SHARE // (CLIENT_SHARE + 1)


def test_a_client_that_fills_its_share_leaves_room() -> None:
    memory = BodyMemory(100)
    while memory.take("a", 10):
        pass
    assert memory.take("b", 20)
    assert not memory.take("b", 10)
    assert not memory.take("a", 10)
    memory.give_back("a", 10)
    assert not memory.take("a", 10)
    assert memory.take("c", 10)


def test_a_body_larger_than_all_memory_is_received_alone() -> None:
    memory = BodyMemory(100)
    assert memory.take("a", 1000)
    assert not memory.take("b", 1)
    memory.give_back("a", 1000)
    assert memory.take("b", 1)
    assert not memory.take("a", 1000)


def test_a_large_body_is_not_overtaken() -> None:
    memory = BodyMemory(100)
    assert memory.take("a", 50)
    large = Taker(memory, "b", 80)
    assert not memory.take("b", 80)
    assert large.wait()
    small = Taker(memory, "c", 1)
    assert not memory.take("c", 1)
    assert small.wait()
    memory.give_back("a", 50)
    assert (large.served, small.served) == ([large], [small])


def test_a_client_over_its_share_holds_up_no_other() -> None:
    memory = BodyMemory(100)
    while memory.take("a", 10):
        pass
    assert Taker(memory, "a", 10).wait()
    assert memory.take("b", 10)


def test_one_that_leaves_holds_up_no_other() -> None:
    memory = BodyMemory(100)
    memory.take("a", 50)
    large, small = Taker(memory, "b", 80), Taker(memory, "c", 10)
    assert large.wait()
    assert small.wait()
    memory.forget(large)
    assert (large.served, small.served) == ([], [small])


def test_the_number_that_waits_is_bounded() -> None:
    memory = BodyMemory(10)
    memory.take("x", 10)
    waiting = dict.fromkeys("abcd", 0)
    for client in waiting:
        while Taker(memory, client, 10).wait():
            waiting[client] += 1
    assert waiting["a"] == MOST_WAITING // 2
    assert all(waiting.values())
    assert sum(waiting.values()) < MOST_WAITING


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 60), st.integers(0, 5))))
def test_memory_is_kept_track_of(steps: list[tuple[str, int, int]]) -> None:
    """Never more is used than there is; when all is given back, none waits and none is used."""
    memory = BodyMemory(100)
    served: list[Taker] = []
    taken: list[tuple[str, int]] = []
    waiting: list[Taker] = []
    for client, size, place in steps:
        if place > 2 and taken:
            memory.give_back(*taken.pop(place % len(taken)))
        elif memory.take(client, size):
            taken.append((client, size))
        else:
            taker = Taker(memory, client, size, served)
            assert taker.wait()
            waiting.append(taker)
        while served:
            taker = served.pop()
            waiting.remove(taker)
            taken.append((taker.address, taker.size))
        assert memory.used_bytes == sum(size for _, size in taken) <= 100
        assert taken or not waiting
    while taken:
        memory.give_back(*taken.pop())
        taken += [(taker.address, taker.size) for taker in served]
        waiting = [taker for taker in waiting if taker not in served]
        served.clear()
    assert (memory.used_bytes, waiting) == (0, [])


@pytest.mark.parametrize(
    ("address", "client"),
    [
        (None, ""), (("10.1.2.3", 5), "10.1.2.3"), (("", 0), ""),
        (("2001:db8:1:2:3:4:5:6", 5), "2001:db8:1:2::/64"), (("fe80::1%eth0", 5), "fe80::/64"),
    ],
)  # fmt: skip
def test_the_client_of_an_address(address: tuple[str, int] | None, client: str) -> None:
    assert client_of(address) == client


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max\n", "a/memory.max": "1000\n"}, 1000),
        ("0::/a/b\n", {"a/b/memory.max": "500\n", "a/memory.max": "1000\n", "memory.max": "800"}, 500),
        ("0::/of/the/host\n", {"memory.max": "700\n"}, 700),
        ("1:cpu:/\n4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": "600\n"}, 600),
        ("4:cpu,memory:/x\n", {"memory/memory.limit_in_bytes": "900\n"}, 900),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": f"{2**63 - 4096}\n"}, None),
        ("", {}, None),
    ],
)
def test_the_memory_that_the_process_may_use(
    groups: str, files: dict[str, str], expected: int | None, tmp_path: Path
) -> None:
    (tmp_path / "own").write_text(groups)
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = memory_bytes(tmp_path / "groups", tmp_path / "own")
    assert found == (expected or memory_bytes(tmp_path, tmp_path / "none"))
    assert 0 < default_bytes() <= 2 << 30


# Over sockets

MEMORY = 1 << 20
LARGE = 900_000
LIMIT_S = 1000.0


@pytest.fixture(scope="module", params=WAYS)
def module_pair(request: pytest.FixtureRequest) -> Iterator[tuple[Served, GatedEngine]]:
    with gated(**way(request.param), body_memory_bytes=MEMORY) as pair:
        yield pair


@pytest.fixture
def served(module_pair: tuple[Served, GatedEngine]) -> Iterator[Served]:
    served, engine = module_pair
    yield served
    engine.release()
    until(served, lambda: not served.connections())
    until(served, lambda: memory_of(served).used_bytes == 0)


@pytest.fixture
def first(served: Served) -> Iterator[tuple[Client, bytes]]:
    """A client that has sent most of a body, and the rest of it."""
    request = large(7)
    with served.connect() as client:
        client.send(request[:-5])
        until(served, lambda: memory_of(served).used_bytes > 0)
        yield client, request[-5:]


def memory_of(served: Served) -> BodyMemory:
    """Return the server's memory for bodies."""
    return served.inference.bodies


def until(served: Served, condition: Any) -> None:
    """Look at the server between the steps of its loop until a condition holds."""
    for _ in range(100_000):
        if served.call(condition):
            return
    raise AssertionError("it never happens")


def large(number: int, target: str = GATE, size: int = LARGE) -> bytes:
    """Return a request whose body, mostly spaces, has about `size` bytes: the number, again and again."""
    count = size // 1000
    x = {"name": "x", "shape": [1, count], "datatype": "INT64", "data": []}
    data = ",".join([" " * 999 + str(number)] * count)
    return post(target, json.dumps({"inputs": [x]}).replace("[]", f"[{data}]").encode())


def doubled(client: Client) -> int:
    """Return the number in the answer to `large`."""
    (number,) = set(data_of(client.answer()))
    assert isinstance(number, int)
    return number


def waiting(served: Served) -> int:
    count: int = served.call(lambda: sum(one._waits for one in served.connections()))
    return count


def test_a_body_waits_for_the_memory_of_another(served: Served, first: tuple[Client, bytes]) -> None:
    client, rest = first
    with served.connect() as second:
        second.socket.setblocking(False)
        request = memoryview(large(8))
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < len(request):
                sent += second.socket.send(request[sent:])
        until(served, lambda: any(one._waits for one in served.connections()))
        # Small ones do not wait, on new connections or on that of the first.
        small = post(GATE, rows_of(5), {"X": "y" * 5000})
        for _ in range(3):
            assert data_of(served.ask(small)) == [10]
        assert waiting(served) == 1
        client.send(rest)
        assert doubled(client) == 14
        second.socket.settimeout(DEADLINE_S)
        second.send(bytes(request[sent:]))
        assert doubled(second) == 16


def test_another_address_has_its_share(served: Served, first: tuple[Client, bytes]) -> None:
    with socket.create_connection(
        ("127.0.0.1", served.server.port), DEADLINE_S, source_address=("127.0.0.2", 0)
    ) as other:
        body = b" " * 100_000
        other.sendall(post(GATE, body))
        assert other.recv(100).startswith(b"HTTP/1.1 400 ")


def test_a_client_that_leaves_gives_its_memory_back(served: Served, first: tuple[Client, bytes]) -> None:
    client, _ = first
    with served.connect() as second:
        request = large(8)
        second.send(request[:300_000])
        until(served, lambda: any(one._waits for one in served.connections()))
        client.close()
        second.send(request[300_000:])
        assert doubled(second) == 16


def test_one_that_waits_may_leave(served: Served, first: tuple[Client, bytes]) -> None:
    client, rest = first
    with served.connect() as second:
        second.send(large(8)[:300_000])
        until(served, lambda: any(one._waits for one in served.connections()))
    client.send(rest)
    assert doubled(client) == 14


def test_one_that_leaves_gets_no_memory(module_pair: tuple[Served, GatedEngine], served: Served) -> None:
    """The first of two requests on a connection has memory; the second waits for it."""
    _, engine = module_pair
    with served.connect() as client:
        engine.hold()
        client.send(large(7))
        assert engine.began.get(timeout=DEADLINE_S) == [7]
        (connection,) = served.connections()
        served.call(lambda: connection.data_received(large(8)[:300_000]))
        assert waiting(served) == 1
        served.call(connection.transport.abort)
        until(served, lambda: not served.connections())


@pytest.mark.parametrize("target", ["/v2/models/none/infer", "/nothing"])
def test_a_refused_body_needs_no_memory(served: Served, first: tuple[Client, bytes], target: str) -> None:
    with served.connect() as second:
        second.send(large(8, target))
        assert second.answer().status == 404
        assert data_of(second.ask(gate(9))) == [18]


def test_bodies_in_a_pipeline(served: Served) -> None:
    with served.connect() as client:
        client.send(large(1) + gate(2) + large(3) + large(4))
        assert [doubled(client) for _ in range(4)] == [2, 4, 6, 8]


def test_chunks_that_outgrow_the_memory(served: Served, first: tuple[Client, bytes]) -> None:
    """A body of unknown length does not wait in the middle."""
    client, rest = first
    head = post(GATE, b"", {"Transfer-Encoding": "chunked"}).replace(b"Content-Length: 0\r\n", b"")
    client.send(rest)
    assert doubled(client) == 14
    with served.connect() as chunked:
        chunked.send(head + b"%x\r\n" % (3 << 20) + b" " * (3 << 19))
        answer = chunked.answer()
        assert (answer.status, answer.slug) == (503, "body-memory")
        assert answer.headers["retry-after"] == "1"
        assert chunked.closed()


@pytest.mark.parametrize("path", WAYS)
def test_a_body_waits_no_longer_than_it_may_take(path: str) -> None:
    with (
        gated(**way(path), clock=Clock(), body_memory_bytes=MEMORY, receive_timeout_s=LIMIT_S) as (
            served,
            engine,
        ),
        served.connect() as client,
        served.connect() as second,
    ):
        engine.hold()
        client.send(large(7))
        assert engine.began.get(timeout=DEADLINE_S) == [7]
        second.send(large(8)[:100_000])
        until_waiting(served, 1)
        served.skip(LIMIT_S)
        answer = second.answer()
        assert (answer.status, answer.slug) == (503, "body-memory")
        assert second.closed()
        engine.release()
        assert doubled(client) == 14


@pytest.mark.parametrize("path", WAYS)
def test_a_body_is_gone_when_it_is_decoded(path: str) -> None:
    """While the request runs, and while its connection is idle."""
    request = large(7, size=8 << 20)
    with gated(**way(path)) as (served, engine), served.connect() as client:
        assert data_of(client.ask(gate(1))) == [2]
        tracemalloc.start()
        try:
            engine.hold()
            client.send(request)
            assert engine.began.get(timeout=DEADLINE_S) == [7]
            assert served.ask(get("/v2/health/live")).status == 200
            running, peak = served.call(tracemalloc.get_traced_memory)
            engine.release()
            assert doubled(client) == 14
            idle, _ = served.call(tracemalloc.get_traced_memory)
        finally:
            tracemalloc.stop()
    assert peak > 8 << 20
    assert running < 1 << 20
    assert idle < 1 << 20


async def test_long_bodies_are_read_in_turns() -> None:
    turns = ReadTurns()
    told: list[int] = []

    class Numbered:
        def __init__(self, number: int) -> None:
            self.number = number

        def on_turn(self) -> None:
            told.append(self.number)

    count = 2 * READS_AT_ONCE + 3
    assert [turns.may_go_on(Numbered(n)) for n in range(READS_AT_ONCE + count)] == [
        n < READS_AT_ONCE for n in range(READS_AT_ONCE + count)
    ]
    for iteration in range(3):
        await asyncio.sleep(0)
        assert told == list(range(READS_AT_ONCE, READS_AT_ONCE + min(count, READS_AT_ONCE * (iteration + 1))))
    assert turns.may_go_on(Numbered(0))


def test_a_connection_waits_for_its_turn(served: Served) -> None:
    request = large(7)

    def read_some() -> tuple[bool, bool]:
        """Deliver two reads of one iteration."""
        (connection,) = served.connections()
        connection.data_received(request[:200_000])
        memory_of(served).turns._reads = READS_AT_ONCE
        connection.data_received(request[200_000:400_000])
        return connection._awaits_turn, connection._read_paused

    with served.connect() as client:
        until(served, served.connections)
        assert served.call(read_some) == (True, True)
        client.send(request[400_000:])
        assert doubled(client) == 14
        # One that leaves meanwhile is told in vain.
        assert data_of(client.ask(gate(1))) == [2]

        def read_and_leave() -> None:
            read_some()
            served.connections()[0].transport.abort()

        served.call(read_and_leave)
        until(served, lambda: not served.connections())


# Compressed bodies


def form_of(text: bytes, form: str) -> tuple[str, bytes]:
    """Return a request's path, and its body in this form."""
    if form == "/v1":
        rows = text[text.rindex(b"[") : text.rindex(b"]}]}") + 1]
        return "/v1/models/gate/predictions", b'{"inputs":{"x":[%b]}}' % rows
    if form == "/batch":
        item = b'{"id":"a","method":"POST","url":"%b","body":%b}' % (GATE.encode(), text)
        return "/batch", b'{"requests":[%b]}' % item
    return GATE, text


def packed(number: int, form: str = "infer", noise: int = 0) -> bytes:
    """Return a request whose body has LARGE bytes when it is decompressed, and few before without `noise`."""
    target, text = form_of(large(number).partition(b"\r\n\r\n")[2], form)
    body = gzip.compress(text + random.Random(0).randbytes(noise))
    return post(target, body, {"Content-Encoding": "gzip", "Content-Type": "application/json"})


def until_waiting(served: Served, count: int) -> None:
    """Wait until so many requests wait for memory."""
    until(served, lambda: len(memory_of(served)._waiting) == count)


@pytest.mark.parametrize("form", ["infer", "/v1", "/batch"])
def test_decompressed_bodies_share_the_memory(
    module_pair: tuple[Served, GatedEngine], served: Served, form: str
) -> None:
    _, engine = module_pair
    engine.hold()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(served.connect()) for _ in range(4)]
        for number, client in enumerate(clients):
            client.send(packed(number, form))
        engine.began.get(timeout=DEADLINE_S)
        until_waiting(served, 3)
        assert LARGE - 1000 < memory_of(served).used_bytes <= MEMORY
        assert served.call(lambda: served.batcher().queue.rows) == 0
        engine.release()
        assert [client.answer().status for client in clients] == [200] * 4


def test_one_that_waits_to_be_decompressed_may_leave(
    module_pair: tuple[Served, GatedEngine], served: Served
) -> None:
    _, engine = module_pair
    engine.hold()
    with served.connect() as client:
        client.send(packed(7))
        engine.began.get(timeout=DEADLINE_S)
        with served.connect() as second:
            second.send(packed(8))
            until_waiting(served, 1)
        until_waiting(served, 0)
        # A short body does not wait, and a body that has memory already is refused.
        answer = served.ask(packed(9, noise=FREE_BYTES))
        assert (answer.status, answer.slug) == (503, "body-memory")
        short = gzip.compress(json.dumps(rows_of(5)).encode())
        with served.connect() as third:
            third.send(post(GATE, short, {"Content-Encoding": "gzip"}))
            until(served, lambda: served.batcher().queue.rows == 1)
            engine.release()
            assert data_of(third.answer()) == [10]
        assert doubled(client) == 14


@pytest.mark.parametrize("path", WAYS)
def test_a_body_waits_no_longer_to_be_decompressed(path: str) -> None:
    with (
        gated(**way(path), clock=Clock(), body_memory_bytes=MEMORY, receive_timeout_s=LIMIT_S) as (
            served,
            engine,
        ),
        served.connect() as client,
        served.connect() as second,
    ):
        engine.hold()
        client.send(packed(7))
        assert engine.began.get(timeout=DEADLINE_S) == [7]
        second.send(packed(8))
        until_waiting(served, 1)
        served.skip(LIMIT_S)
        answer = second.answer()
        assert (answer.status, answer.slug) == (503, "body-memory")
        engine.release()
        assert doubled(client) == 14


# Clients that leave before their bodies are decoded


@contextlib.contextmanager
def codec_held(served: Served) -> Iterator[None]:
    """Keep the thread that decodes busy."""
    began, go_on = threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        go_on.wait(DEADLINE_S)

    served.call(lambda: in_pieces(work))
    assert began.wait(DEADLINE_S)
    try:
        yield
    finally:
        go_on.set()


@pytest.mark.parametrize("path", WAYS)
def test_a_body_goes_with_its_client(path: str) -> None:
    request = large(7, size=8 << 20)
    with gated(**way(path)) as (served, _), codec_held(served):
        tracemalloc.start()
        try:
            with served.connect() as client:
                client.send(request)
                until(served, lambda: any(one.cycle and not one.receiving for one in served.connections()))
                sent, _ = served.call(tracemalloc.get_traced_memory)
            until(served, lambda: not served.connections())
            until(served, lambda: tracemalloc.get_traced_memory()[0] < 1 << 20)
        finally:
            tracemalloc.stop()
        assert sent > 8 << 20


def receiving(served: Served) -> list[Any]:
    """Return the connections with a request: a relayed one is open twice."""
    return [one for one in served.connections() if one.cycle is not None]


@pytest.mark.parametrize("form", ["/v1", "/batch"])
def test_a_body_that_is_still_to_be_decoded_keeps_its_memory(served: Served, form: str) -> None:
    target, text = form_of(large(7).partition(b"\r\n\r\n")[2], form)
    with codec_held(served):
        with served.connect() as client:
            request = post(target, text, {"Content-Type": "application/json"})
            client.send(request[:-9])
            # It is all with the application, so reading is not paused.
            until(served, lambda: [one.body_bytes for one in receiving(served)] == [len(text) - 9])
            until(served, lambda: not receiving(served)[0].cycle._body)
            client.send(request[-9:])
            until(served, lambda: not receiving(served)[0].receiving)
        until(served, lambda: not served.connections())
        assert memory_of(served).used_bytes > LARGE // 2
    until(served, lambda: memory_of(served).used_bytes == 0)


# Clients that read slowly


class SlowWire:
    """A transport with bytes that the client has not taken."""

    unsent = 0

    def get_write_buffer_size(self) -> int:
        return self.unsent


@pytest.mark.parametrize(
    ("rate", "stuck_s"),
    [(0, 30), (1, 30), (LEAST_RATE // 2, 59), (LEAST_RATE, None), (10 * LEAST_RATE, None)],
)
async def test_a_client_must_take_its_response_at_a_rate(
    rate: int, stuck_s: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    for module in (connection, framing, receiver):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now_s))
    anything: Any = SimpleNamespace(bodies=None)
    wire = SlowWire()
    slow = Connection(anything, anything, anything, anything)
    slow.transport = wire
    size = 40 * LEAST_RATE * 60
    for second in range(200):
        now_s = 101.0 + second
        wire.unsent = max(0, size - rate * second)
        if slow._is_stuck(30.0):
            assert stuck_s is not None
            assert stuck_s <= second <= stuck_s + 2
            return
    assert stuck_s is None
