"""Channels: packing, order, back-pressure, and the ends of a link."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from cobatch.engines.errors import LinkError
from cobatch.engines.link.channel import Channel, FrontChannel, HomeChannel
from cobatch.engines.link.messages import (
    DATAGRAM_BYTES,
    INLINE_BYTES,
    MESSAGE_BYTES,
    Cancel,
    Collect,
    Dropped,
    FromFront,
    Submit,
    decode_from_front,
    decode_to_front,
)


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    front, home = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield front, home
    front.close()
    home.close()


@pytest.fixture
def front(sockets: tuple[socket.socket, socket.socket]) -> FrontChannel:
    return Channel(sockets[0], decode_to_front)


@pytest.fixture
def home(sockets: tuple[socket.socket, socket.socket]) -> HomeChannel:
    return Channel(sockets[1], decode_from_front)


def submit(number: int, size: int = 4) -> Submit:
    return Submit(number, 0, 1, (size,), bytes(size))


def received(home: HomeChannel) -> list[FromFront]:
    messages: list[FromFront] = []
    while some := home.receive():
        messages += some
    return messages


def test_messages_of_a_flush_are_one_datagram(front: FrontChannel, home: HomeChannel) -> None:
    sent: list[FromFront] = [submit(1), Cancel((1, 2)), submit(3)]
    for message in sent:
        front.send(message)
    assert home.receive() == []
    front.flush()
    front.flush()
    assert home.receive() == sent
    assert home.receive() == []
    home.send(Dropped((1,)))
    home.flush()
    assert front.receive() == [Dropped((1,))]


def test_a_full_datagram_takes_no_further_message(front: FrontChannel, home: HomeChannel) -> None:
    count = -(-DATAGRAM_BYTES // INLINE_BYTES)
    for number in range(count + 1):
        front.send(submit(number, INLINE_BYTES))
    front.flush()
    assert [message.id for message in home.receive() if isinstance(message, Submit)] == list(range(count))
    assert home.receive() == [submit(count, INLINE_BYTES)]


def test_the_longest_message_is_sent_after_any_other(front: FrontChannel, home: HomeChannel) -> None:
    overhead = 32
    almost_full = submit(1, DATAGRAM_BYTES - overhead)
    longest = submit(2, MESSAGE_BYTES - overhead)
    front.send(almost_full)
    front.send(longest)
    with pytest.raises(ValueError, match="at most"):
        front.send(submit(3, MESSAGE_BYTES))
    front.send(submit(4))
    front.flush()
    messages = received(home)
    front.flush()
    assert messages + received(home) == [almost_full, longest, submit(4)]


def test_a_backlog_keeps_the_order(front: FrontChannel, home: HomeChannel) -> None:
    sent: list[FromFront] = []
    while not front.backlogged:
        sent.append(submit(len(sent), INLINE_BYTES))
        front.send(sent[-1])
        front.flush()
    for _ in range(10):
        sent.append(submit(len(sent)))
        front.send(sent[-1])
        front.flush()
    messages = received(home)
    assert 0 < len(messages) < len(sent)
    front.flush()
    assert not front.backlogged
    assert messages + received(home) == sent


def test_the_end_comes_after_the_last_message(front: FrontChannel, home: HomeChannel) -> None:
    home.send(Collect(1))
    home.flush()
    front.send(submit(1))
    front.flush()
    home.close()
    assert home.fileno() == -1
    front.send(submit(2))
    front.flush()
    assert not front.backlogged
    assert front.receive() == [Collect(1)]
    for _ in range(2):
        with pytest.raises(LinkError, match="closed"):
            front.receive()


@pytest.mark.parametrize(
    "garbage",
    [b"\xc1", b"\x90\x90", b"\xc0", b"\x91\x91\x10", b"\x91\x93\x01\x01", b"\x91\x92\x02\x91\xff"],
    ids=["no type", "two values", "nil", "the other direction", "truncated", "a negative offset"],
)
def test_a_datagram_of_another_form_is_the_end(
    sockets: tuple[socket.socket, socket.socket], home: HomeChannel, garbage: bytes
) -> None:
    sockets[0].send(garbage)
    with pytest.raises(LinkError, match="not one of messages"):
        home.receive()


def test_a_datagram_that_is_too_long_is_the_end(
    sockets: tuple[socket.socket, socket.socket], front: FrontChannel, home: HomeChannel
) -> None:
    front.send(submit(1, MESSAGE_BYTES - 100))
    front.flush()
    data = sockets[1].recv(1 << 20)
    sockets[0].send(data[:-100] + bytes(DATAGRAM_BYTES + 200))
    with pytest.raises(LinkError):
        home.receive()
