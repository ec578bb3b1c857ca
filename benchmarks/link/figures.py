"""Microseconds of the link per request: `python -m benchmarks.link.figures`.

Both ends are in one process: no HTTP, no batcher, no other process to wake. The ways of a table take turns,
and each has its fastest of the rounds.

* A turn of the event loop: requests are encoded, sent, received and decoded, and so are their answers, of the
  same size, in one message. Rows are in the messages, or in blocks of the slab, where the sender copies them.
* A datagram of 16 requests of 64 bytes to home: as 16 messages, and as one bundle.
"""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager

from rich.console import Console
from rich.table import Table

from benchmarks.link.ends import Answered, Row, link
from benchmarks.request_cost.report import wide_console
from cobatch.engines.link.messages import INLINE_BYTES, Datagram, Submit, decode_from_front
from cobatch.engines.link.slab import Buffer, SlabWriter

# Bytes of a row, and requests of a turn.
CASES = ((64, 1), (64, 16), (64, 64), (4 << 10, 16), (INLINE_BYTES, 1), (4 * INLINE_BYTES, 1), (200_704, 1))
_BUNDLED, _BUNDLED_BYTES = 16, 64
_SLAB_BYTES = 64 << 20
_ROUNDS = 9
_CALLS = 400
Way = Callable[[], object]


class Messages(SlabWriter):
    """Leaves all payloads in messages."""

    def place(self, buffers: Sequence[Buffer], size: int) -> bytes:  # noqa: ARG002
        return b"".join(buffers)


class Blocks(SlabWriter):
    """Puts all payloads into blocks."""

    def place(self, buffers: Sequence[Buffer], size: int) -> int | None:  # noqa: ARG002
        return self.write(buffers)


@contextmanager
def turn_of(size: int, count: int, writer: type[SlabWriter]) -> Iterator[Way]:
    """Make a link, for a turn of it: `count` requests of `size` bytes, and a message with their answers."""
    descriptors = link(_SLAB_BYTES)
    front, home = descriptors[0].front(writer), descriptors[1].home(writer)
    rows = [Row(number, bytes(size)) for number in range(count)]

    def turn() -> None:
        for row in rows:
            front.submit(row, size)
        front.channel.flush()
        while len(home.held) < count:
            home.receive()
        home.answer([Row(number, view) for number, view in home.held.items()])
        home.channel.flush()
        for message in front.receive():
            assert isinstance(message, Answered)
            front.release(message)

    with closing(front), closing(home):
        yield turn


def best_us(ways: Mapping[str, Way], requests: int) -> dict[str, float]:
    """Return the microseconds per request of each way, each for this number of requests."""
    best = dict.fromkeys(ways, float("inf"))
    calls = max(1, _CALLS // requests)
    for _ in range(_ROUNDS):
        for name, way in ways.items():
            began = time.perf_counter()
            for _ in range(calls):
                way()
            best[name] = min(best[name], (time.perf_counter() - began) / calls / requests * 1e6)
    return best


def show_turns(console: Console) -> None:
    """Print the cost of a turn, by the size of rows and their number."""
    table = Table("row, bytes", "requests a turn", "in messages, us", "in the slab, us", "slab / messages")
    for size, count in CASES:
        with turn_of(size, count, Messages) as messages, turn_of(size, count, Blocks) as blocks:
            us = best_us({"messages": messages, "slab": blocks}, count)
        ratio = f"{us['slab'] / us['messages']:.2f}"
        table.add_row(f"{size:,}", str(count), f"{us['messages']:.1f}", f"{us['slab']:.1f}", ratio)
    console.print(table)


def show_datagrams(console: Console) -> None:
    """Print the parts of a datagram's cost, of messages and of a bundle."""
    table = Table("16 requests as", "encode, us", "send and receive, us", "decode, us", "sum")
    front, home = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    buffer = memoryview(bytearray(1 << 16))
    for name, callers in (("16 messages", 1), ("a bundle", _BUNDLED)):
        size = _BUNDLED_BYTES * callers

        def encode(callers: int = callers, size: int = size) -> Datagram:
            datagram = Datagram()
            for number in range(_BUNDLED // callers):
                datagram.add(Submit(number, 0, callers, (size,), bytes(size), callers))
            return datagram

        def send(data: bytes = bytes(encode().close())) -> None:
            front.send(data)
            home.recv_into(buffer)

        def decode(data: bytes = bytes(encode().close())) -> None:
            decode_from_front(data)

        us = best_us({"encode": encode, "send": send, "decode": decode}, _BUNDLED)
        table.add_row(name, *(f"{part:.2f}" for part in (*us.values(), sum(us.values()))))
    console.print(table)
    front.close()
    home.close()


def main() -> int:
    """Print both tables."""
    console = wide_console()
    show_turns(console)
    show_datagrams(console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
