"""Malformed requests, and requests hidden in the bytes of others.

The fast path remembers header blocks and serves a block that it knows without the parser. Whatever is
sent, and however it is cut into packets, the answers must be those that the parser alone would give.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import cobatch.server.edge.header_cache
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
    with gated(**way(request.param)) as pair:
        yield pair


@pytest.fixture
def served(module_pair: tuple[Served, GatedEngine]) -> Iterator[Served]:
    served, engine = module_pair
    yield served
    engine.release()


@pytest.fixture
def engine(module_pair: tuple[Served, GatedEngine]) -> GatedEngine:
    return module_pair[1]


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    """A connection after a request with `gate(7)`'s header block."""
    with served.connect() as client:
        assert data_of(client.ask(gate(7))) == [14]
        yield client


BLOCK, BODY = (gate(7)[: gate(7).index(b"\r\n\r\n") + 4], gate(7)[gate(7).index(b"\r\n\r\n") + 4 :])


def refused(client: Client) -> None:
    """Check for a problem, and for the end of the connection."""
    answer = client.answer()
    assert (answer.status, answer.slug) == (400, "bad-http")
    assert answer.headers["connection"] == "close"
    assert client.closed()


# Bad framing


def head(*lines: str) -> bytes:
    return "\r\n".join([f"POST {GATE} HTTP/1.1", "Host: test", *lines, "", ""]).encode("latin-1")


SIZE = f"Content-Length: {len(BODY)}"
BAD = {
    "garbage": b"\x00\x01\x02\x03\r\n\r\n",
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "text": b"hello, is anybody there?\r\n\r\n",
    "lower-case method": b"post " + gate(7)[5:],
    "http/0.9": f"POST {GATE}\r\n\r\n".encode(),
    "http/0.9 by name": gate(7).replace(b"HTTP/1.1", b"HTTP/0.9"),
    "http/2": gate(7).replace(b"HTTP/1.1", b"HTTP/2.0"),
    "rtsp": gate(7).replace(b"HTTP/1.1", b"RTSP/1.0"),
    "rtsp/1.1": gate(7).replace(b"HTTP/1.1", b"RTSP/1.1"),
    "ice": b"SOURCE" + gate(7).replace(b"HTTP/1.1", b"ICE/1.0")[4:],
    "no host": gate(7).replace(b"Host: test\r\n", b""),
    "two hosts": head("Host: test", SIZE) + BODY,
    "two hosts in http/1.0": head("Host: test", "Content-Length: 0").replace(b"HTTP/1.1", b"HTTP/1.0"),
    "chunks in http/1.0": head("Transfer-Encoding: chunked").replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n",
    "http/2 without asking": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "space in the target": b"POST /v2/models/gate /infer HTTP/1.1\r\nHost: test\r\n\r\n",
    "two lengths": head(SIZE, SIZE) + BODY,
    "two different lengths": head(SIZE, "Content-Length: 1") + BODY,
    "length and chunks": head(SIZE, "Transfer-Encoding: chunked") + BODY,
    "chunks and length": head("Transfer-Encoding: chunked", SIZE) + BODY,
    "a list of lengths": head(f"Content-Length: {len(BODY)}, {len(BODY)}") + BODY,
    "a signed length": head(f"Content-Length: +{len(BODY)}") + BODY,
    "a negative length": head("Content-Length: -1") + BODY,
    "a hexadecimal length": head("Content-Length: 0x10") + BODY,
    "an underscore in the length": head("Content-Length: 1_0") + BODY,
    "no length": head("Content-Length: ") + BODY,
    "a length beyond 64 bits": head("Content-Length: 18446744073709551617") + BODY,
    "a space before the colon": head(f"Content-Length : {len(BODY)}") + BODY,
    "a folded header": head("X: a", " b", SIZE) + BODY,
    "a NUL in a header": head("X: a\0b", SIZE) + BODY,
    "a bare CR in a header": head("X: a\rb", SIZE) + BODY,
    "lines that end in LF": BLOCK.replace(b"\r\n", b"\n") + BODY,
    "an LF that ends the headers": head(SIZE)[:-2] + b"\n" + BODY,
    "chunks, then something else": head("Transfer-Encoding: chunked, identity") + b"0\r\n\r\n",
    "an unknown transfer coding": head("Transfer-Encoding: gzip") + b"abc",
    "a chunk size that is no number": head("Transfer-Encoding: chunked") + b"zz\r\nab\r\n0\r\n\r\n",
    "a negative chunk size": head("Transfer-Encoding: chunked") + b"-1\r\nab\r\n0\r\n\r\n",
    "a chunk longer than its size": head("Transfer-Encoding: chunked") + b"1\r\nabc\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_framing(served: Served, client: Client, name: str) -> None:
    taken = served.batcher().counters.accepted
    client.send(BAD[name])
    refused(client)
    assert served.batcher().counters.accepted == taken


@pytest.mark.parametrize("name", BAD)
def test_bad_framing_first_thing_a_byte_at_a_time(served: Served, name: str) -> None:
    with served.connect() as client:
        try:
            for n in range(len(BAD[name])):
                client.send(BAD[name][n : n + 1])
        except (BrokenPipeError, ConnectionResetError):
            pass  # it ended the connection at the byte that was wrong
        else:
            refused(client)
    assert data_of(served.ask(gate(8))) == [16]


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("name", ["http/0.9", "http/0.9 by name", "http/2", "rtsp", "rtsp/1.1"])
def test_another_version_beside_good_requests_in_one_packet(client: Client, name: str, before: int) -> None:
    client.send(gate(7) * before + BAD[name] + gate(7))
    for _ in range(before):
        assert data_of(client.answer()) == [14]
    refused(client)


def test_a_body_may_name_another_version(client: Client) -> None:
    client.send(post(GATE, BAD["http/2"]) + b"\r\n" + gate(8) + gate(8))
    assert client.answer().slug == "not-json"
    assert [data_of(client.answer()) for _ in range(2)] == [[16], [16]]


@pytest.mark.parametrize("name", ["garbage", "two lengths", "a chunk size that is no number"])
@pytest.mark.parametrize("before", [1, 3])
def test_requests_before_a_bad_one_are_answered_first(
    served: Served, engine: GatedEngine, client: Client, name: str, before: int
) -> None:
    engine.hold()
    client.send(b"".join(gate(n) for n in range(before)) + BAD[name])
    assert engine.began.get(timeout=DEADLINE_S) == [0]
    assert served.ask(get("/v2/health/live")).status == 200
    engine.release()
    for n in range(before):
        assert data_of(client.answer()) == [2 * n]
    refused(client)


def test_bad_bytes_while_an_answer_is_due(served: Served, engine: GatedEngine, client: Client) -> None:
    engine.hold()
    client.send(gate(1))
    assert engine.began.get(timeout=DEADLINE_S) == [1]
    client.send(BAD["garbage"])
    assert served.ask(get("/v2/health/live")).status == 200
    engine.release()
    assert data_of(client.answer()) == [2]
    refused(client)


def test_a_bad_chunk_after_the_answer(client: Client) -> None:
    """The request was refused early for its model's name; there is no second response to it."""
    client.send(
        post("/v2/models/nobody/infer", b"", {"Transfer-Encoding": "chunked"}).replace(
            b"Content-Length: 0\r\n", b""
        )
    )
    assert client.answer().slug == "unknown-model"
    client.send(b"zz\r\n")
    assert client.closed()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("codings", [["gzip, chunked"], ["gzip", "chunked"], ["identity, chunked"]])
def test_a_transfer_coding_that_is_not_known(client: Client, codings: list[str], apart: bool) -> None:
    """RFC 9112, 6.1."""
    request = head(*[f"Transfer-Encoding: {coding}" for coding in codings])
    pieces = [request, b"0\r\n\r\n"] if apart else [request + b"0\r\n\r\n"]
    for piece in pieces:
        client.send(piece)
    answer = client.answer()
    assert (answer.status, answer.slug) == (501, "unsupported-transfer-coding")
    assert client.closed()


def test_headers_without_end(served: Served, client: Client) -> None:
    client.send(b"GET / HTTP/1.1\r\nX: ")
    for _ in range(20):
        client.send(b"x" * 50_000)
        assert served.ask(get("/v2/health/live")).status == 200
    answer = client.answer()
    assert (answer.status, answer.slug) == (431, "headers-too-large")
    assert client.closed()
    assert data_of(served.ask(gate(8))) == [16]


def test_large_headers_are_refused_once(served: Served, engine: GatedEngine, client: Client) -> None:
    engine.hold()
    client.send(gate(1) + b"GET / HTTP/1.1\r\nX: ")
    assert engine.began.get(timeout=DEADLINE_S) == [1]
    client.send(b"x" * 70_000)
    engine.release()
    assert data_of(client.answer()) == [2]
    answer = client.answer()
    assert (answer.status, answer.slug) == (431, "headers-too-large")
    assert client.closed()


def test_many_headers_that_are_not_too_many(client: Client) -> None:
    headers = {f"X-{n}": "y" * 100 for n in range(300)}
    for _ in range(2):
        assert data_of(client.ask(gate(7, headers=headers))) == [14]


# Cached header blocks


def test_a_known_block_with_another_body(client: Client) -> None:
    assert data_of(client.ask(BLOCK + BODY.replace(b"7", b"8"))) == [16]
    assert client.ask(BLOCK + BODY.replace(b"7", b"x")).slug == "not-json"
    assert client.ask(BLOCK + b"x" * len(BODY)).slug == "not-json"
    assert data_of(client.ask(gate(7))) == [14]


@pytest.mark.parametrize("missing", [1, 2, len(BODY) - 1, len(BODY)])
def test_a_known_block_with_a_part_of_its_body(served: Served, client: Client, missing: int) -> None:
    taken = served.batcher().counters.accepted
    client.send((BLOCK + BODY)[:-missing])
    assert served.ask(get("/v2/health/live")).status == 200
    assert served.batcher().counters.accepted == taken
    client.send(BODY[-missing:])
    assert data_of(client.answer()) == [14]


def test_a_known_block_with_a_whole_request_behind(client: Client) -> None:
    for behind in (gate(8), gate(8, headers={"X": "y"})):
        client.send(gate(7) + behind)
        assert [data_of(client.answer()), data_of(client.answer())] == [[14], [16]]


def test_a_known_block_with_a_part_of_the_next_request_behind(client: Client) -> None:
    for cut in range(1, len(gate(8)), 7):
        client.send(gate(7) + gate(8)[:cut])
        assert data_of(client.answer()) == [14]
        client.send(gate(8)[cut:])
        assert data_of(client.answer()) == [16]


def test_a_known_block_with_garbage_behind(client: Client) -> None:
    client.send(gate(7) + b"\0")
    assert data_of(client.answer()) == [14]
    refused(client)


def test_a_known_request_within_a_body_is_a_body(served: Served, client: Client) -> None:
    """In a packet of its own, after headers with exactly its length."""
    taken = served.batcher().counters.accepted
    client.send(post(GATE, b"", {"Content-Length": str(len(gate(7)))}))
    client.send(gate(7))
    assert client.answer().slug == "not-json"
    client.send(post(GATE, gate(7)))
    assert client.answer().slug == "not-json"
    assert served.batcher().counters.accepted == taken
    assert data_of(client.ask(gate(7))) == [14]


def test_a_known_request_within_a_chunk_is_a_body(served: Served, client: Client) -> None:
    taken = served.batcher().counters.accepted
    client.send(head("Transfer-Encoding: chunked") + b"%x\r\n" % len(gate(7)))
    client.send(gate(7))
    client.send(b"\r\n0\r\n\r\n")
    assert client.answer().slug == "not-json"
    assert served.batcher().counters.accepted == taken


def test_a_known_request_within_a_header_is_a_header(served: Served, client: Client) -> None:
    taken = served.batcher().counters.accepted
    client.send(f"POST {GATE}/nowhere HTTP/1.1\r\nX: ".encode())
    client.send(gate(7))
    assert client.answer().slug == "not-found"
    assert served.batcher().counters.accepted == taken
    assert data_of(client.ask(gate(7))) == [14]


def test_a_known_request_within_the_body_of_a_refused_one(served: Served, client: Client) -> None:
    """A request that is answered before its body has arrived still owns that body."""
    taken = served.batcher().counters.accepted
    client.send(post("/v2/models/nobody/infer", b"", {"Content-Length": str(len(gate(7)))}))
    assert client.answer().slug == "unknown-model"
    client.send(gate(7))
    assert data_of(client.ask(gate(8))) == [16]
    assert served.batcher().counters.accepted == taken + 1


def test_a_block_with_a_blank_line_before_it(client: Client) -> None:
    for before in (b"\r\n", b"\r\n\r\n", b"\r\n\r\n\r\n"):
        for _ in range(3):
            assert data_of(client.ask(before + gate(7))) == [14]


def test_a_body_that_has_blank_lines(client: Client) -> None:
    body = b"\r\n\r\n" + BODY + b"\r\n\r\n"
    for _ in range(3):
        assert data_of(client.ask(post(GATE, body))) == [14]


def test_header_blocks_with_different_meanings(client: Client) -> None:
    """Equal except for one header: each keeps its own meaning."""
    for _ in range(2):
        assert data_of(client.ask(gate(7, headers={"X": "a"}))) == [14]
        assert client.ask(gate(7, headers={"Inference-Header-Content-Length": "5"})).slug == "not-json"
        length = str(len(BODY))
        assert data_of(client.ask(gate(7, headers={"Inference-Header-Content-Length": length}))) == [14]
        assert client.ask(gate(7, headers={"Content-Encoding": "gzip"})).slug == "bad-encoding"
        assert client.ask(post("/v2/models/gat_/infer", rows_of(7))).slug == "unknown-model"
    answer = client.ask(gate(7, headers={"Connection": "close"}))
    assert answer.headers["connection"] == "close"
    assert client.closed()


def test_the_number_of_cached_blocks_is_bounded(
    served: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    while len(served.call(served.connections)) > 1:
        pass  # a connection of an earlier test is about to end
    (protocol,) = served.call(served.connections)
    if not served.fast:
        assert not hasattr(protocol, "cache")
        return
    known = protocol.cache
    limit = len(known) + 3
    monkeypatch.setattr(cobatch.server.edge.header_cache, "_BLOCKS", limit)
    for n in range(10):
        assert data_of(client.ask(gate(7, headers={"X": str(n)}))) == [14]
    assert len(known) == limit
    kept = list(known)
    assert data_of(client.ask(gate(7, headers={"X": "y" * 5000}))) == [14]  # too long to keep
    assert list(known) == kept


# Upgrades


UPGRADE = {"Upgrade": "h2c", "Connection": "Upgrade, HTTP2-Settings", "HTTP2-Settings": "AAMAAABkAAQ"}


@pytest.mark.parametrize("protocol", ["websocket", "h2c"])
def test_an_upgrade_is_ignored(client: Client, protocol: str) -> None:
    """RFC 9110, 7.8: the connection goes on in HTTP/1.1."""
    fields = f"Upgrade: {protocol}\r\nConnection: Upgrade\r\n"
    for _ in range(2):
        client.send(f"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n{fields}\r\n".encode())
        answer = client.answer()
        assert answer.status == 200
        assert "upgrade" not in answer.headers


@pytest.mark.parametrize("step", [10_000, 100, 1])
def test_an_upgrade_with_a_body(client: Client, step: int) -> None:
    """As curl --http2 and Java's HttpClient send it; alone, in chunks, and in a pipeline."""
    chunks = {"Transfer-Encoding": "chunked"} | UPGRADE
    chunked = post(GATE, b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY), chunks)
    chunked = chunked.replace(b"Content-Length: %d\r\n" % (len(BODY) + 11), b"")
    assert b"Content-Length" not in chunked
    data = gate(7, headers=UPGRADE) + chunked + gate(8) + gate(9, headers=UPGRADE) * 2
    for at in range(0, len(data), step):
        client.send(data[at : at + step])
    assert [data_of(client.answer()) for _ in range(5)] == [[14], [14], [16], [18], [18]]
    assert data_of(client.ask(gate(7, headers=UPGRADE))) == [14]


def test_an_upgrade_and_the_end(client: Client) -> None:
    headers = UPGRADE | {"Connection": "close, Upgrade"}
    assert data_of(client.ask(gate(7, headers=headers) + gate(8))) == [14]
    assert client.closed()


@pytest.mark.parametrize("apart", [False, True])
def test_the_body_of_an_upgrade_is_no_request(served: Served, client: Client, apart: bool) -> None:
    taken = served.batcher().counters.accepted
    request = post(GATE, gate(7), UPGRADE)
    end = request.index(b"\r\n\r\n") + 4
    if apart:
        client.send(request[:end])
        client.send(request[end:])
    else:
        client.send(request)
    assert client.answer().slug == "not-json"
    assert served.batcher().counters.accepted == taken
    assert data_of(client.ask(gate(8))) == [16]


def test_an_upgrade_header_alone_means_nothing(client: Client) -> None:
    for _ in range(2):
        assert data_of(client.ask(gate(7, headers={"Upgrade": "h2c"}))) == [14]
    assert data_of(client.ask(gate(7))) == [14]


def test_connect(client: Client) -> None:
    client.send(b"CONNECT example.org:443 HTTP/1.1\r\nHost: example.org\r\n\r\n")
    refused(client)


@pytest.mark.parametrize(
    ("target", "slug"),
    [
        ("*", "not-found"),
        ("//", "not-found"),
        ("?", "bad-http"),
        ("http://", "bad-http"),
        ("http://[", "bad-http"),
    ],
)
def test_an_invalid_target(client: Client, target: str, slug: str) -> None:
    assert client.ask(post(target, rows_of(7))).slug == slug


def test_an_invalid_target_behind_a_running_request(
    served: Served, engine: GatedEngine, client: Client
) -> None:
    engine.hold()
    client.send(gate(1) + post("http://[", rows_of(7)))
    assert engine.began.get(timeout=DEADLINE_S) == [1]
    engine.release()
    assert data_of(client.answer()) == [2]
    refused(client)
