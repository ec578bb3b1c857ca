"""Long responses: written a part in each iteration of the loop, whole, and dropped with their client."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from cobatch.server.edge.connection import Connection
from cobatch.server.edge.long_write import LongWrite, Piece
from cobatch.server.http.reply import PART_BYTES
from tests.support.fronts.linked import WAYS, way
from tests.support.http.serving import GATE, GatedEngine, Served, data_of, gate, gated, get, post

HEAD_BYTES = 1000
WIDTH = PART_BYTES


class Recorder:
    """A transport that notes the bytes that it is given in each iteration of the loop."""

    def __init__(self, transport: Any, sizes: list[int]) -> None:
        self._transport = transport
        self._sizes = sizes
        self._counts = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _note(self, size: int) -> None:
        if not self._counts:
            self._counts = True
            self._sizes.append(0)
            asyncio.get_running_loop().call_soon(self._end_iteration)
        self._sizes[-1] += size

    def _end_iteration(self) -> None:
        self._counts = False

    def write(self, data: bytes) -> None:
        self._note(len(data))
        self._transport.write(data)

    def writelines(self, pieces: Iterable[bytes]) -> None:
        pieces = list(pieces)
        self._note(sum(map(len, pieces)))
        self._transport.writelines(pieces)


@pytest.fixture(params=WAYS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Served, GatedEngine]]:
    with gated(**way(request.param)) as (served, engine):
        engine.answer_width = WIDTH
        yield served, engine


def large(binary: bool = True, **headers: str) -> bytes:
    """A request with a long answer: in binary of more than four parts."""
    x = {"name": "x", "shape": [1, 2], "datatype": "INT64", "data": [7, 0]}
    return post(GATE, {"inputs": [x], "parameters": {"binary_data_output": binary}}, headers)


def test_an_iteration_writes_one_part(
    pair: tuple[Served, GatedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    served, _ = pair
    sizes: list[int] = []
    made: Any = Connection.connection_made
    monkeypatch.setattr(
        Connection, "connection_made", lambda self, transport: made(self, Recorder(transport, sizes))
    )
    answer = served.ask(large())
    assert len(answer.body) > 4 * PART_BYTES
    assert sum(sizes) > len(answer.body)
    assert max(sizes) < PART_BYTES + HEAD_BYTES


def test_requests_behind_a_long_response(pair: tuple[Served, GatedEngine]) -> None:
    served, _ = pair
    with served.connect(receive_buffer=4096) as client:
        client.send(large() + get("/v2/health/live") + large() + gate(1) + get("/v2/health/live"))
        lengths = [len(client.answer().body) for _ in range(5)]
        assert [length > 4 * PART_BYTES for length in lengths] == [True, False, True, False, False]
        assert client.ask(get("/v2/health/live")).status == 200


def test_the_last_response_of_a_connection(pair: tuple[Served, GatedEngine]) -> None:
    served, _ = pair
    with served.connect(receive_buffer=4096) as client:
        client.send(large(binary=False, Connection="close"))
        answer = client.answer()
        assert data_of(answer) == [14] * WIDTH
        assert client.closed()


@pytest.mark.parametrize("headers", [{}, {"Connection": "close"}], ids=["keep-alive", "close"])
@pytest.mark.parametrize("pair", ["fast", "fronts"], indirect=True)
def test_a_client_that_half_closes_meanwhile(
    pair: tuple[Served, GatedEngine], headers: dict[str, str]
) -> None:
    """It gets the whole response, which is longer than the kernel's buffers."""
    served, engine = pair
    engine.answer_width = 4 * WIDTH
    with served.connect() as client:
        client.send(large(binary=True, **headers))
        assert client.socket.recv(1, socket.MSG_PEEK)
        client.socket.shutdown(socket.SHUT_WR)
        assert len(client.answer().body) > 32 * PART_BYTES
        assert client.closed()


def test_a_client_that_leaves_meanwhile(pair: tuple[Served, GatedEngine]) -> None:
    """No connection is left: `serve` watches them."""
    served, engine = pair
    with served.connect(receive_buffer=4096) as client:
        client.send(large())
        client.socket.recv(1000)
    engine.answer_width = None
    assert data_of(served.ask(gate(1))) == [2]


class Transport:
    """A transport that is full after some bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.written = b""
        self.protocol: Any = None
        self.ends: list[str] = []
        self.one_way = True

    def can_write_eof(self) -> bool:
        return self.one_way

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def write(self, data: bytes | memoryview) -> None:
        self.written += data
        self.room -= len(data)
        if self.room <= 0:
            self.protocol.pause_writing()

    def make_room(self, room: int) -> None:
        self.room = room
        self.protocol.resume_writing()

    def get_write_buffer_size(self) -> int:
        return 5

    def is_closing(self) -> bool:
        return bool(self.ends)

    def close(self) -> None:
        self.ends.append("close")

    def write_eof(self) -> None:
        self.ends.append("write_eof")

    def abort(self) -> None:
        self.ends.append("abort")


class Protocol(asyncio.Protocol):
    """A protocol that counts what it is told."""

    def __init__(self) -> None:
        self.transport: Any = None
        self.told: list[str] = []

    def pause_writing(self) -> None:
        self.told.append("pause")

    def resume_writing(self) -> None:
        self.told.append("resume")

    def connection_lost(self, exc: Exception | None) -> None:
        self.told.append("lost")


async def turns(count: int = 1) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_full_transport() -> None:
    transport, protocol = Transport(PART_BYTES + 10), Protocol()
    pieces: list[Piece] = [b"a" * PART_BYTES, b"b" * 10, memoryview(b"c" * 2 * PART_BYTES)]
    LongWrite(protocol, transport, asyncio.get_running_loop(), pieces)
    writing = protocol.transport
    assert transport.protocol is writing
    assert transport.written == pieces[0]
    assert writing.get_write_buffer_size() == 2 * PART_BYTES + 15
    await turns(3)
    assert len(transport.written) == PART_BYTES + 10, "it is full"
    writing.write(b"next")
    writing.close()
    assert writing.is_closing()
    transport.make_room(1 << 30)
    await turns(4)
    assert transport.written == b"".join([*pieces, b"next"])
    assert (transport.protocol, protocol.transport) == (protocol, transport)
    assert transport.ends == ["close"]
    assert protocol.told == ["pause", "resume"]


async def test_a_transport_that_is_full_at_the_end() -> None:
    """It tells the protocol itself when there is room."""
    transport, protocol = Transport(10), Protocol()
    LongWrite(protocol, transport, asyncio.get_running_loop(), [b"a" * 10])
    assert transport.protocol is protocol.transport.protocol is protocol
    assert protocol.told == ["pause"]
    transport.make_room(10)
    assert protocol.told == ["pause", "resume"]


@pytest.mark.parametrize("last", ["protocol", "another protocol"])
async def test_half_closed_by_the_client(last: str) -> None:
    """The transport is closed once all is written."""
    transport, protocol = Transport(1 << 30), Protocol()
    LongWrite(protocol, transport, asyncio.get_running_loop(), [b"a" * 2 * PART_BYTES])
    if last == "another protocol":
        protocol.transport.set_protocol(Protocol())
        protocol.transport.write_eof()
    assert transport.protocol.eof_received() is True
    assert protocol.transport.is_closing()
    assert transport.ends == []
    await turns()
    assert len(transport.written) == 2 * PART_BYTES
    assert transport.ends == ["close"]


async def test_ended_by_a_client_over_tls() -> None:
    """Such a transport cannot stay open in one direction."""
    transport, protocol = Transport(1 << 30), Protocol()
    transport.one_way = False
    LongWrite(protocol, transport, asyncio.get_running_loop(), [b"a" * 2 * PART_BYTES])
    assert not transport.protocol.eof_received()


async def test_half_closed_by_another_protocol() -> None:
    transport, protocol, last = Transport(1 << 30), Protocol(), Protocol()
    LongWrite(protocol, transport, asyncio.get_running_loop(), [b"a" * 2 * PART_BYTES])
    last.transport = protocol.transport
    last.transport.set_protocol(last)
    last.transport.write_eof()
    await turns()
    assert len(transport.written) == 2 * PART_BYTES
    assert transport.ends == ["write_eof"]
    assert last.transport is transport
    assert transport.protocol is last


async def test_a_lost_connection() -> None:
    transport, protocol = Transport(1 << 30), Protocol()
    LongWrite(protocol, transport, asyncio.get_running_loop(), [b"a" * 3 * PART_BYTES])
    protocol.transport.abort()
    transport.protocol.connection_lost(None)
    await turns(3)
    assert len(transport.written) == PART_BYTES
    assert protocol.told == ["pause", "lost"]
    assert transport.ends == ["abort"]
