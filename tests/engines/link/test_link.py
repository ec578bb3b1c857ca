"""The link against a model of it, over a real socket pair and real shared memory, in one process.

Nothing is lost, doubled or reordered; a block is never used by two; each row is its own until it is answered
or released; at the end all blocks are free. `COBATCH_EXAMPLES=100` tries a hundred times as many.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from benchmarks.link.ends import Answered, FrontEnd, HomeEnd, Row
from cobatch.engines.errors import LinkError
from cobatch.engines.link import slab
from cobatch.engines.link.channel import Channel
from cobatch.engines.link.messages import (
    INLINE_BYTES,
    Dropped,
    Release,
    Submit,
    decode_from_front,
    decode_to_front,
)
from cobatch.engines.link.slab import BLOCK_BYTES
from tests.support.examples import examples

SLAB_BYTES = 8 * BLOCK_BYTES
SIZES = [8, INLINE_BYTES, INLINE_BYTES + 8, BLOCK_BYTES + 8, SLAB_BYTES]
# More rows of INLINE_BYTES than the socket takes.
BURST = 40
# An end breaks the rules by other bytes than messages, or by other messages than the other end expects.
BAD_BYTES = b"\x91"
BAD_RELEASE, BAD_BLOCK, BAD_DROPPED = Release((1,)), Submit(0, 0, 1, (8,), SLAB_BYTES), Dropped((0,))


class CheckedChannel(Channel[Any, Any]):
    """A channel that receives the messages of the other end, in this order, each once."""

    def __init__(self, sock: socket.socket, decode: Any, sent: deque[Any], coming: deque[Any]) -> None:
        super().__init__(sock, decode)
        self.sock = sock
        self.sent, self.coming = sent, coming

    def send(self, message: Any) -> None:
        super().send(message)
        self.sent.append(message)

    def receive(self) -> list[Any]:
        messages = super().receive()
        for message in messages:
            assert message == self.coming.popleft()
        return messages


def row_of(number: int, size: int, *, answer: bool) -> bytes:
    return (number << 1 | answer).to_bytes(8, "little") * (size // 8)


class Linked(RuleBasedStateMachine):
    """`open` has the size of each request without an answer, `unread` the answers without a release."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.sockets: tuple[socket.socket, ...] = ()
        self.connect()

    def connect(self) -> None:
        self.close()
        self.open: dict[int, int] = {}
        self.unread: list[Answered] = []
        self.closed = 0
        self.sockets = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        requests, answers = slab.create("requests", SLAB_BYTES), slab.create("answers", SLAB_BYTES)
        readers = slab.SlabReader(slab.for_reading(answers)), slab.SlabReader(slab.for_reading(requests))
        writers = slab.SlabWriter(requests), slab.SlabWriter(answers)
        self.to_home, self.to_front = deque[Any](), deque[Any]()
        front = CheckedChannel(self.sockets[0], decode_to_front, self.to_home, self.to_front)
        home = CheckedChannel(self.sockets[1], decode_from_front, self.to_front, self.to_home)
        self.front = FrontEnd(front, writers[0], readers[0])
        self.home = HomeEnd(home, readers[1], writers[1])

    @rule(size=st.sampled_from(SIZES), count=st.sampled_from([1, 2, 3, 4, BURST]))
    def submit(self, size: int, count: int) -> None:
        for _ in range(count):
            self.number += 1
            if self.front.submit(Row(self.number, row_of(self.number, size, answer=False)), size):
                self.open[self.number] = size
            else:
                assert self.front.requests.arena.blocks

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.front.cancel(data.draw(st.lists(st.sampled_from(list(self.open)), min_size=1, max_size=3)))

    @rule(flushes=st.booleans(), size=st.sampled_from(SIZES), at=st.integers(0, 3), most=st.integers(0, 8))
    def home_turn(self, *, flushes: bool, size: int, at: int, most: int) -> None:
        if flushes:
            self.front.channel.flush()
        self.home.receive()
        self.answer(list(self.home.held)[at:][: min(most, SLAB_BYTES // size)], size)

    def answer(self, numbers: list[int], size: int) -> None:
        for number in numbers:
            assert self.home.held[number].tobytes() == row_of(number, self.open[number], answer=False)
        if numbers:
            self.home.answer([Row(number, row_of(number, size, answer=True)) for number in numbers])

    @rule(flushes=st.booleans(), at=st.integers(0, 3), most=st.integers(0, 3))
    def front_turn(self, *, flushes: bool, at: int, most: int) -> None:
        if flushes:
            self.home.channel.flush()
        self.front_receives()
        for answered in self.unread[at:][:most]:
            self.release(answered)

    def front_receives(self) -> None:
        for message in self.front.receive():
            if isinstance(message, Dropped):
                self.closes(message.ids)
            else:
                self.unread.append(message)
                self.closes([row.number for row in message.rows])

    def closes(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            del self.open[number]
            self.closed += 1

    def release(self, answered: Answered) -> None:
        for row in answered.rows:
            assert bytes(row.data) == row_of(row.number, len(row.data), answer=True)
        self.unread.remove(answered)
        self.front.release(answered)

    def everything_is_answered(self) -> None:
        messages = len(self.open) + len(self.unread) + len(self.to_home) + len(self.to_front)
        for _ in range(3 * messages + 3):
            self.home_turn(flushes=True, size=8, at=0, most=8)
            self.front_turn(flushes=True, at=0, most=3)
        assert not self.open
        assert not self.front.open
        assert not self.home.held
        assert not self.home.delayed
        assert not self.to_home
        assert not self.to_front
        assert self.front.requests.arena.blocks == self.home.answers.arena.blocks == 0

    @precondition(lambda self: self.closed > 3)
    @rule(bad=st.sampled_from([None, BAD_BYTES, BAD_RELEASE, BAD_BLOCK]))
    def front_ends(self, bad: Any) -> None:
        self.end(self.front.channel, self.home.receive, bad)
        # Rows that run keep the slab of a front that has ended.
        self.front.requests.close()
        self.answer(list(self.home.held), 8)
        self.home.channel.flush()
        self.connect()

    @precondition(lambda self: self.closed > 3)
    @rule(bad=st.sampled_from([None, BAD_BYTES, BAD_DROPPED]))
    def home_ends(self, bad: Any) -> None:
        self.end(self.home.channel, self.front_receives, bad)
        self.connect()

    def end(self, channel: Channel[Any, Any], receive: Callable[[], None], bad: Any) -> None:
        """Close a channel, or break the rules. The other end gets all that the socket took, then the end."""
        assert isinstance(channel, CheckedChannel)
        if bad is not None and bad != BAD_BYTES:
            channel.send(bad)
        channel.flush()
        flushed = not channel.backlogged
        with suppress(BlockingIOError):
            if bad == BAD_BYTES:
                channel.sock.send(bad)
        channel.close()
        with suppress(LinkError):
            for _ in range(len(channel.sent) + 2):
                receive()
            pytest.fail("no end")
        assert not (flushed and channel.sent)

    def teardown(self) -> None:
        try:
            self.everything_is_answered()
        finally:
            self.close()

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


Linked.TestCase.settings = examples(50, stateful_step_count=50)
TestLinked = Linked.TestCase
