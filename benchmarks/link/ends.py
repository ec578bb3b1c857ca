"""The two ends of a link by its rules alone: rows go in, answers come out.

`server.fronts` has the real ends. These have no event loop, no models and no batches: the figures, the stress
and the state machine of the tests need the messages, the blocks and their credits, and nothing else.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cobatch.engines.errors import LinkError
from cobatch.engines.link import slab
from cobatch.engines.link.channel import Channel, FrontChannel, HomeChannel
from cobatch.engines.link.messages import (
    Answers,
    BatchInfo,
    Cancel,
    Dropped,
    Release,
    Submit,
    decode_from_front,
    decode_to_front,
)

BATCH = BatchInfo(1, 1, "full", 0, 0, 0.0, 0.0, 0.0, 0.0)


class Row(NamedTuple):
    """A row of a request, or of its answer. `number`: the request's id."""

    number: int
    data: slab.Buffer


@dataclass
class Answered:
    """The rows of a message, and the offset of their block if they have one."""

    rows: list[Row]
    block: int | None


class FrontEnd:
    """Submits rows, and gives answers' blocks back. `open`: the block of each request without an answer."""

    def __init__(self, channel: FrontChannel, requests: slab.SlabWriter, answers: slab.SlabReader) -> None:
        self.channel = channel
        self.requests = requests
        self.answers = answers
        self.open: dict[int, int | None] = {}

    def submit(self, row: Row, size: int) -> bool:
        """Queue a request of `size` bytes; return False if the slab is full."""
        payload = self.requests.place((row.data,), size)
        if payload is None:
            return False
        self.open[row.number] = payload if isinstance(payload, int) else None
        self.channel.send(Submit(row.number, 0, 1, (size,), payload))
        return True

    def cancel(self, numbers: Sequence[int]) -> None:
        """Ask for no answer to these requests. They stay open until home has said so."""
        self.channel.send(Cancel(tuple(numbers)))

    def receive(self) -> Iterator[Answered | Dropped]:
        """Yield the messages of a datagram. Raises LinkError at the end."""
        for message in self.channel.receive():
            if isinstance(message, Answers):
                view = self.answers.read(message.payload, sum(message.sizes))
                size = len(view) // len(message.ids)
                rows = [
                    Row(number, view[at * size : (at + 1) * size]) for at, number in enumerate(message.ids)
                ]
                self._close(message.ids)
                yield Answered(rows, message.payload if isinstance(message.payload, int) else None)
            elif isinstance(message, Dropped):
                self._close(message.ids)
                yield message

    def release(self, answered: Answered) -> None:
        """Say that an answer was read."""
        if answered.block is not None:
            self.channel.send(Release((answered.block,)))

    def close(self) -> None:
        """Close the link, with its queue."""
        self.channel.close()
        self.requests.close()

    def _close(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            if number not in self.open:
                raise LinkError(f"an answer to {number}, which is not open")
            block = self.open.pop(number)
            if block is not None:
                self.requests.free(block)


class HomeEnd:
    """Takes rows and answers them. `held`: the rows that wait, by id; `delayed`: answers without a block."""

    def __init__(self, channel: HomeChannel, requests: slab.SlabReader, answers: slab.SlabWriter) -> None:
        self.channel = channel
        self.requests = requests
        self.answers = answers
        self.held: dict[int, memoryview] = {}
        self.delayed: deque[tuple[tuple[int, ...], bytes]] = deque()

    def receive(self) -> None:
        """Take the messages of a datagram. Raises LinkError at the end."""
        for message in self.channel.receive():
            if isinstance(message, Submit):
                self.held[message.id] = self.requests.read(message.payload, sum(message.sizes))
            elif isinstance(message, Release):
                for offset in message.offsets:
                    self.answers.free(offset)
            elif isinstance(message, Cancel):
                dropped = tuple(number for number in message.ids if self.held.pop(number, None) is not None)
                if dropped:
                    self.channel.send(Dropped(dropped))
        while self.delayed and self._send(self.delayed[0][0], (self.delayed[0][1],)):
            self.delayed.popleft()

    def answer(self, rows: Sequence[Row]) -> None:
        """Answer held requests by one message; their answers have one size. A full slab delays it."""
        numbers = tuple(row.number for row in rows)
        for number in numbers:
            del self.held[number]
        if self.delayed or not self._send(numbers, [row.data for row in rows]):
            self.delayed.append((numbers, b"".join(row.data for row in rows)))

    def close(self) -> None:
        """Close the link, with its queue."""
        self.channel.close()
        self.answers.close()

    def _send(self, numbers: tuple[int, ...], buffers: Sequence[slab.Buffer]) -> bool:
        size = sum(memoryview(buffer).nbytes for buffer in buffers)
        payload = self.answers.place(buffers, size)
        if payload is None:
            return False
        places = tuple(range(len(numbers)))
        self.channel.send(Answers(0, BATCH, numbers, places, ((size,),), (size,), payload))
        return True


class Descriptors(NamedTuple):
    """An end's share of a link: the socket, the slab that it writes, the slab that it reads."""

    sock: int
    writes: int
    reads: int

    def front(self, writer: type[slab.SlabWriter] = slab.SlabWriter) -> FrontEnd:
        """Return the front's end, which owns the descriptors."""
        channel: FrontChannel = Channel(socket.socket(fileno=self.sock), decode_to_front)
        return FrontEnd(channel, writer(self.writes), slab.SlabReader(self.reads))

    def home(self, writer: type[slab.SlabWriter] = slab.SlabWriter) -> HomeEnd:
        """Return home's end, which owns the descriptors."""
        channel: HomeChannel = Channel(socket.socket(fileno=self.sock), decode_from_front)
        return HomeEnd(channel, slab.SlabReader(self.reads), writer(self.writes))

    def close(self) -> None:
        """Close the descriptors, once the process that uses them has its own."""
        for descriptor in self:
            os.close(descriptor)


def link(size: int) -> tuple[Descriptors, Descriptors]:
    """Return the front's and home's descriptors of a new link, with slabs of `size` bytes."""
    front, home = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    requests, answers = slab.create("requests", size), slab.create("answers", size)
    return (
        Descriptors(front.detach(), requests, slab.for_reading(answers)),
        Descriptors(home.detach(), answers, slab.for_reading(requests)),
    )
