"""The connection, over raw sockets, on the fast path and through ASGI.

Pieces, pipelines, old versions, chunks, limits, disconnects.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.support.fronts.linked import WAYS, way
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


@pytest.fixture(scope="module", params=WAYS)
def module_pair(request: pytest.FixtureRequest) -> Iterator[tuple[Served, GatedEngine]]:
    with gated(**way(request.param), max_body_bytes=100_000) as pair:
        yield pair


@pytest.fixture
def pair(module_pair: tuple[Served, GatedEngine]) -> Iterator[tuple[Served, GatedEngine]]:
    served, engine = module_pair
    yield served, engine
    engine.answer_width = None
    engine.release()


@pytest.fixture
def served(pair: tuple[Served, GatedEngine]) -> Served:
    return pair[0]


@pytest.fixture
def engine(pair: tuple[Served, GatedEngine]) -> GatedEngine:
    return pair[1]


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with served.connect() as client:
        yield client


# In pieces


def test_many_requests_on_one_connection(client: Client) -> None:
    for n in range(50):
        assert data_of(client.ask(gate(n))) == [2 * n]


def test_a_byte_at_a_time(client: Client) -> None:
    request = gate(7)
    for _ in range(2):
        for n in range(len(request)):
            client.send(request[n : n + 1])
        assert data_of(client.answer()) == [14]


def test_every_place_to_cut_a_request_in_two(client: Client) -> None:
    """Whole requests in between, so that the header block is in the fast path's cache."""
    request = gate(7)
    for n in range(1, len(request)):
        client.send(request[:n])
        client.send(request[n:])
        assert data_of(client.answer()) == [14]
        assert data_of(client.ask(request)) == [14]


def test_headers_and_body_apart(client: Client) -> None:
    request = gate(7)
    end = request.index(b"\r\n\r\n") + 4
    for _ in range(3):
        client.send(request[:end])
        client.send(request[end:])
        assert data_of(client.answer()) == [14]


def test_blank_lines_before_a_request(client: Client) -> None:
    """RFC 9112, 2.2: a server should ignore them."""
    for before in (b"\r\n", b"\r\n\r\n", b""):
        for _ in range(2):
            assert data_of(client.ask(before + gate(7))) == [14]


def test_a_large_body(client: Client) -> None:
    x = {"name": "x", "shape": [1, 9999], "datatype": "INT64", "data": list(range(9999))}
    for _ in range(2):
        assert data_of(client.ask(post(GATE, {"inputs": [x]}))) == [2 * n for n in range(9999)]


# Pipelines


@pytest.mark.parametrize("count", [2, 3, 20])
def test_a_pipeline_is_answered_in_order(client: Client, count: int) -> None:
    for _ in range(3):
        client.send(b"".join(gate(n, id=str(n)) for n in range(count)))
        for n in range(count):
            answer = client.answer()
            assert data_of(answer) == [2 * n]
            assert answer.json["id"] == str(n)


def mixed(count: int) -> tuple[bytes, list[int | str]]:
    """Requests of all kinds, each with its expected number, slug or status."""
    kinds: list[tuple[bytes, int | str]] = []
    for n in range(count):
        kinds += [
            (gate(n), 2 * n),
            (post(GATE, b"{"), "not-json"),
            (get("/v2/health/live"), 200),
            (post("/v2/models/nobody/infer", rows_of(n)), "unknown-model"),
            (post(GATE, rows_of(n), {"Expect": "100-continue"}), 2 * n),
            (get(GATE), "method-not-allowed"),
        ]
    return b"".join(data for data, _ in kinds), [what for _, what in kinds]


def check_mixed(client: Client, expected: list[int | str]) -> None:
    for what in expected:
        answer = client.answer()
        while answer.status == 100:
            answer = client.answer()
        if isinstance(what, str):
            assert answer.slug == what
        elif answer.json.get("outputs"):
            assert data_of(answer) == [what]
        else:
            assert answer.status == what


def test_a_pipeline_of_good_and_bad_and_other_requests(client: Client) -> None:
    data, expected = mixed(3)
    for _ in range(2):
        client.send(data)
        check_mixed(client, expected)


def test_a_pipeline_cut_anywhere(served: Served) -> None:
    data, expected = mixed(1)
    for step in (1, 7, 100):
        with served.connect() as client:
            for n in range(0, len(data), step):
                client.send(data[n : n + step])
            check_mixed(client, expected)


def test_a_pipeline_while_the_first_still_runs(served: Served, engine: GatedEngine, client: Client) -> None:
    assert data_of(client.ask(gate(5))) == [10]
    engine.hold()
    client.send(gate(1))
    assert engine.began.get(timeout=DEADLINE_S) == [1]
    # The same header block again, in a packet of its own, while the response before it is pending.
    client.send(gate(2))
    client.send(gate(3) + get("/v2/health/live"))
    assert served.ask(get("/v2/health/live")).status == 200
    engine.release()
    assert [data_of(client.answer()) for _ in range(3)] == [[2], [4], [6]]
    assert client.answer().status == 200
    assert data_of(client.ask(gate(4))) == [8]


# Old versions and Connection: close


def test_http_1_0_ends_with_the_answer(client: Client) -> None:
    assert data_of(client.ask(post(GATE, rows_of(7), version="1.0"))) == [14]
    assert client.closed()


def test_http_1_0_keeps_the_connection_if_asked_to(client: Client) -> None:
    """As `ab -k` asks."""
    request = post(GATE, rows_of(7), {"Connection": "Keep-Alive"}, version="1.0")
    for _ in range(2):
        answer = client.ask(request)
        assert (data_of(answer), answer.headers["connection"]) == ([14], "keep-alive")
    client.send(request + request)
    assert [data_of(client.answer()), data_of(client.answer())] == [[14], [14]]
    answer = client.ask(request.replace(GATE.encode(), b"/v2/models/none/infer"))
    assert (answer.slug, answer.headers["connection"]) == ("unknown-model", "keep-alive")
    assert data_of(client.ask(post(GATE, rows_of(8), version="1.0"))) == [16]
    assert client.closed()


def test_http_1_0_without_a_host(client: Client) -> None:
    client.send(b"GET /v2/health/live HTTP/1.0\r\n\r\n")
    assert client.answer().status == 200
    assert client.closed()


@pytest.mark.parametrize("value", ["close", "Close", "keep-alive, close"])
def test_connection_close(client: Client, value: str) -> None:
    assert data_of(client.ask(gate(7))) == [14]
    answer = client.ask(gate(7, headers={"Connection": value}))
    assert data_of(answer) == [14]
    assert answer.headers["connection"] == "close"
    assert client.closed()


def test_nothing_is_read_after_connection_close(served: Served, engine: GatedEngine, client: Client) -> None:
    taken = served.batcher().counters.accepted
    client.send(gate(7, headers={"Connection": "close"}) + gate(8))
    assert data_of(client.answer()) == [14]
    assert client.closed()
    assert served.batcher().counters.accepted == taken + 1


def test_a_bad_request_with_connection_close(client: Client) -> None:
    answer = client.ask(post(GATE, b"{", {"Connection": "close"}))
    assert answer.slug == "not-json"
    assert answer.headers["connection"] == "close"
    assert client.closed()


# Expect: 100-continue


def test_expect_100_continue(client: Client) -> None:
    request = gate(7, headers={"Expect": "100-continue"})
    end = request.index(b"\r\n\r\n") + 4
    for _ in range(2):
        client.send(request[:end])
        assert client.answer().status == 100
        client.send(request[end:])
        assert data_of(client.answer()) == [14]


def test_too_large_a_body_is_not_asked_for(client: Client) -> None:
    headers = {"Expect": "100-continue", "Content-Length": "100001"}
    answer = client.ask(post(GATE, b"", headers))
    assert (answer.status, answer.slug) == (413, "body-too-large")
    assert client.closed()


# Chunks


def chunked(target: str, *chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    head = f"POST {target} HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + end


def body_of(*rows: int) -> bytes:
    request = gate(*rows)
    return request[request.index(b"\r\n\r\n") + 4 :]


def test_a_chunked_body(client: Client) -> None:
    body = body_of(7)
    assert data_of(client.ask(chunked(GATE, body))) == [14]
    assert data_of(client.ask(chunked(GATE, body[:5], body[5:]))) == [14]
    assert data_of(client.ask(chunked(GATE, *[body[n : n + 1] for n in range(len(body))]))) == [14]
    assert data_of(client.ask(chunked(GATE, body, end=b"0\r\nX-Sum: 1\r\n\r\n"))) == [14]
    assert client.ask(chunked(GATE)).slug == "not-json"
    assert data_of(client.ask(gate(8))) == [16]


def test_a_chunked_body_a_byte_at_a_time(client: Client) -> None:
    request = chunked(GATE, body_of(7)[:9], body_of(7)[9:])
    for n in range(len(request)):
        client.send(request[n : n + 1])
    assert data_of(client.answer()) == [14]


def test_thousands_of_tiny_chunks(client: Client) -> None:
    body = body_of(7).ljust(20_000)
    assert data_of(client.ask(chunked(GATE, *[body[n : n + 1] for n in range(len(body))]))) == [14]


def test_a_chunked_body_that_grows_over_the_limit(client: Client) -> None:
    """Refused while it grows: the last chunk is never sent."""
    client.send(chunked(GATE, b" " * 60_000, end=b""))
    client.send(b"9c41\r\n" + b" " * 40_001)
    answer = client.answer()
    assert (answer.status, answer.slug) == (413, "body-too-large")
    assert answer.headers["connection"] == "close"
    assert client.closed()


def test_a_body_of_the_limit_in_chunks(client: Client) -> None:
    body = body_of(7).ljust(100_000)
    assert data_of(client.ask(chunked(GATE, body[:50_000], body[50_000:]))) == [14]


# Unread responses


MIB_OF_ANSWER = 1 << 17  # INT64 numbers


def greedy_request() -> bytes:
    """Request 1 MiB in binary."""
    x = {"name": "x", "shape": [1, 2], "datatype": "INT64", "data": [1, 2]}
    return post(GATE, {"inputs": [x], "parameters": {"binary_data_output": True}})


def unsent(served: Served) -> int:
    """Return the bytes that the server keeps for clients that do not read."""
    sizes: list[int] = served.call(
        lambda: [protocol.transport.get_write_buffer_size() for protocol in served.connections()]
    )
    return sum(sizes)


def test_unread_responses_to_a_pipeline(served: Served, engine: GatedEngine) -> None:
    """The server buffers little for the client, and other clients are served."""
    engine.answer_width = MIB_OF_ANSWER
    taken = served.batcher().counters.accepted
    with served.connect(receive_buffer=4096) as greedy:
        greedy.send(greedy_request() * 30)
        served.until(lambda: served.batcher().counters.accepted > taken)
        for n in range(25):
            assert data_of(served.ask(gate(n))) == [2 * n]
            assert unsent(served) < 3 << 20
        # 25 of them came from other clients. The system's buffers take some MiB.
        assert served.batcher().counters.accepted - taken < 25 + 20
        assert {len(greedy.answer().body) >> 20 for _ in range(30)} == {1}


def test_unread_responses_to_consecutive_requests(served: Served, engine: GatedEngine) -> None:
    """Without a pipeline: the server stops reading."""
    engine.answer_width = MIB_OF_ANSWER
    taken = served.batcher().counters.accepted
    with served.connect(receive_buffer=4096) as greedy:
        for n in range(30):
            greedy.send(greedy_request())
            assert data_of(served.ask(gate(n))) == [2 * n]
            assert unsent(served) < 3 << 20
        assert served.batcher().counters.accepted - taken < 30 + 20
        assert {len(greedy.answer().body) >> 20 for _ in range(30)} == {1}
        assert data_of(greedy.ask(gate(7))) == [14]


def test_a_client_that_sends_faster_than_it_is_answered(served: Served, engine: GatedEngine) -> None:
    """The server reads on only when all it has read is answered: a pipeline is no longer than a read."""
    requests = 3_000
    longest = 0
    with served.connect() as flood:
        sender = threading.Thread(target=flood.send, args=(gate(1) * requests,))
        sender.start()
        for n in range(requests):
            assert data_of(flood.answer()) == [2]
            if n % 100 == 0:
                longest = max(longest, *served.call(lambda: [len(p.pipeline) for p in served.connections()]))
        sender.join()
    assert 0 < longest <= (1 << 18) // len(gate(1))


# Disconnects


def held(served: Served, engine: GatedEngine, stack: contextlib.ExitStack) -> Client:
    """A request that runs until the test releases the engine."""
    engine.hold()
    client = stack.enter_context(served.connect())
    client.send(gate(1))
    assert engine.began.get(timeout=DEADLINE_S) == [1]
    return client


def test_a_disconnect_drops_a_queued_request_before_packing(served: Served, engine: GatedEngine) -> None:
    batcher = served.batcher()
    cancelled, taken = batcher.counters.cancelled, batcher.counters.accepted
    engine.ran.clear()
    with contextlib.ExitStack() as stack:
        first = held(served, engine, stack)
        leaver, stayer = stack.enter_context(served.connect()), stack.enter_context(served.connect())
        leaver.send(gate(2))
        stayer.send(gate(3))
        served.until(lambda: batcher.counters.accepted == taken + 3)
        leaver.close()
        served.until(lambda: batcher.counters.cancelled == cancelled + 1)
        assert batcher.queue.rows == 1
        engine.release()
        assert data_of(first.answer()) == [2]
        assert data_of(stayer.answer()) == [6]
    assert engine.ran == [[1], [3]]


def test_a_disconnect_during_the_run_harms_no_other_request(served: Served, engine: GatedEngine) -> None:
    batcher = served.batcher()
    cancelled = batcher.counters.cancelled
    with contextlib.ExitStack() as stack:
        first = held(served, engine, stack)
        first.close()
        served.until(lambda: batcher.counters.cancelled == cancelled + 1)
        engine.release()
        assert data_of(served.ask(gate(5))) == [10]


def test_a_client_that_resets_the_connection(served: Served, engine: GatedEngine) -> None:
    batcher = served.batcher()
    cancelled = batcher.counters.cancelled
    with contextlib.ExitStack() as stack:
        first = held(served, engine, stack)
        first.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        first.close()
        served.until(lambda: batcher.counters.cancelled == cancelled + 1)
        engine.release()
        assert data_of(served.ask(gate(5))) == [10]


def test_a_disconnect_with_a_pipeline(served: Served, engine: GatedEngine) -> None:
    """With requests in the pipeline the server does not read, so it cannot notice the disconnect."""
    taken = served.batcher().counters.accepted
    with contextlib.ExitStack() as stack:
        first = held(served, engine, stack)
        leaver = stack.enter_context(served.connect())
        leaver.send(gate(2) + gate(3) + gate(4))
        served.until(lambda: served.batcher().counters.accepted == taken + 2)
        leaver.close()
        engine.release()
        assert data_of(first.answer()) == [2]
        assert data_of(served.ask(gate(5))) == [10]


@pytest.mark.parametrize("piece", [0, 1, 40, -1])
def test_a_disconnect_before_the_end_of_the_request(served: Served, piece: int) -> None:
    taken = served.batcher().counters.accepted
    with served.connect() as leaver:
        leaver.send(gate(2)[:piece])
        leaver.socket.shutdown(socket.SHUT_WR)
        assert leaver.closed()
    assert served.batcher().counters.accepted == taken


def test_a_half_closed_connection_counts_as_disconnected(
    served: Served, engine: GatedEngine, client: Client
) -> None:
    """As in most HTTP servers, a half-closed connection counts as disconnected."""
    cancelled = served.batcher().counters.cancelled
    engine.hold()
    client.send(gate(7))
    assert engine.began.get(timeout=DEADLINE_S) == [7]
    client.socket.shutdown(socket.SHUT_WR)
    served.until(lambda: served.batcher().counters.cancelled == cancelled + 1)
    assert client.closed()
    engine.release()
    assert data_of(served.ask(gate(8))) == [16]


# Other forms of a target, and other methods


@pytest.mark.parametrize(
    "target",
    [
        "/v2/models/gate/infer?x=1",
        "/v2/models/gate/infer?",
        "/v2/models/%67ate/infer",
        "/v2/models/gate/%69nfer",
        "http://test/v2/models/gate/infer",
        "http://test:80/v2/models/gate/infer?x=1",
    ],
)
def test_other_spellings_of_the_target(client: Client, target: str) -> None:
    for _ in range(2):
        assert data_of(client.ask(post(target, rows_of(7)))) == [14]
        assert data_of(client.ask(gate(8))) == [16]


def test_an_encoded_slash_in_a_name_is_no_separator(client: Client) -> None:
    assert client.ask(post("/v2/models/ga%2Fte/infer", rows_of(7))).slug == "not-found"
    assert data_of(client.ask(gate(8))) == [16]


def test_head(client: Client) -> None:
    client.send(get("/v2/health/live", "HEAD"))
    answer = client.answer(head=True)
    assert answer.status == 200
    assert int(answer.headers["content-length"]) > 0
    client.send(get(GATE, "HEAD"))
    assert client.answer(head=True).status == 405
    assert data_of(client.ask(gate(8))) == [16]


@pytest.mark.parametrize("headers", list(itertools.product(["Host", "host", "HOST"], ["Content-Length"])))
def test_header_names_in_any_case(client: Client, headers: tuple[str, str]) -> None:
    body = body_of(7)
    request = f"POST {GATE} HTTP/1.1\r\n{headers[0]}: x\r\ncOnTeNt-LeNgTh:{len(body)}\r\n\r\n".encode() + body
    for _ in range(2):
        assert data_of(client.ask(request)) == [14]


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "asgi"])
@pytest.mark.parametrize("line", [b"x-1: " + b"y" * 1000 + b"\r\n", b"y" * 1000], ids=["lines", "one line"])
def test_endless_trailers_are_not_kept(fast: bool, line: bytes) -> None:
    head = f"POST {GATE} HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with gated(fast) as (served, _), served.connect() as client:
        start = b"" if line.startswith(b"x-1") else b"x-1: "
        client.send(head + b"2\r\n{}\r\n0\r\n" + start)
        with contextlib.suppress(ConnectionError):
            for _ in range(2000):
                client.send(line)
        with contextlib.suppress(ConnectionError):
            while client.socket.recv(1 << 16):
                pass  # until it is closed; a time-out is no ConnectionError
        assert data_of(served.ask(gate(7))) == [14]
