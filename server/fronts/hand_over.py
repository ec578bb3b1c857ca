"""The hand-over socket between a front and home: descriptors of connections, and what home owes them."""

import asyncio
import contextlib
import mmap
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
from msgspec import Struct

HAND_OVER_BYTES = 4096
# Between tries to send on a full socket.
_AGAIN_S = 0.1
# Before the bytes that home gives back.
LENGTH_BYTES = 8


class Handed(Struct, frozen=True, array_like=True):
    """A connection for home; its descriptor comes along. `client` and `server` are addresses and ports."""

    number: int
    client: tuple[str, int] | None
    server: tuple[str, int | None] | None
    scheme: str


class Returned(Struct, frozen=True, array_like=True):
    """Home gives this connection back. It has written `sent` bytes."""

    number: int
    sent: int


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Returned).decode


class Answered:
    """Words of each relayed connection: home owes nothing for the first `taken` bytes of the client, and has
    written `sent` bytes."""

    SIZE = 3 * 8 << 15

    def __init__(self, descriptor: int, *, writable: bool) -> None:
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._words = memoryview(mmap.mmap(descriptor, self.SIZE, prot=protection)).cast("q")

    def note(self, number: int, taken: int, sent: int) -> None:
        """Write the words of a connection. A home that dies meanwhile leaves none."""
        at = 3 * number % len(self._words)
        self._words[at] = 0
        self._words[at + 1] = taken
        self._words[at + 2] = sent
        self._words[at] = number

    def find(self, number: int) -> tuple[int, int]:
        """Return `taken` and `sent` of a connection, zeros if there are none."""
        at = 3 * number % len(self._words)
        return (self._words[at + 1], self._words[at + 2]) if self._words[at] == number else (0, 0)


class Relayed(Protocol):
    """A relayed connection of a front. `number`, `answered`: given by `HandOver`."""

    number: int
    answered: Answered | None

    def on_returned(self, sent: int) -> None:
        """Home gives the connection back; it has written `sent` bytes."""


async def serve_pipe(protocol: asyncio.Protocol, pipe: socket.socket) -> None:
    """Let a protocol have one end of a pair of sockets.

    Not with `create_unix_connection`: where the connection ends meanwhile, uvloop closes the descriptor twice
    (0.23), and another connection may have it by then.
    """
    with contextlib.suppress(OSError, RuntimeError):  # it has ended already: the protocol was told
        await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, pipe)


class HandOver:
    """The front's end of the hand-over socket; there is none while home is started again.

    `is_alive`: home runs and does not hang. `relays`: the relayed connections, by number.
    """

    def __init__(self, is_alive: Callable[[], bool] = lambda: True) -> None:
        self._is_alive = is_alive
        self.relays: dict[int, Relayed] = {}
        self.socket: socket.socket | None = None
        self._answered: Answered | None = None
        self._number = 0
        self._waiting: deque[tuple[bytes, socket.socket]] = deque()

    def attach(self, hand_over: socket.socket) -> None:
        """Use the socket to a new home, and close the one before."""
        self.detach()
        self._answered = None
        hand_over.setblocking(False)
        self.socket = hand_over
        asyncio.get_running_loop().add_reader(hand_over, self.receive)

    def detach(self) -> None:
        """Home is gone. The relayed connections notice by themselves."""
        hand_over, self.socket = self.socket, None
        if hand_over is not None:
            asyncio.get_running_loop().remove_reader(hand_over)
            hand_over.close()
        while self._waiting:
            self._waiting.popleft()[1].close()

    @property
    def available(self) -> bool:
        """Home takes connections."""
        return self.socket is not None and self._is_alive()

    def hand_over(self, relay: Relayed, scope: Any, pipe: socket.socket) -> None:
        """Send home this socket for a connection."""
        if self._answered is None:
            self.receive()  # home's first message
        relay.answered = self._answered
        self._number += 1
        relay.number = self._number
        self.relays[relay.number] = relay
        handed = Handed(relay.number, scope["client"], scope["server"], scope["scheme"])
        self._waiting.append((_encode(handed), pipe))
        if len(self._waiting) == 1:
            self._send()

    def _send(self) -> None:
        while self._waiting:
            message, theirs = self._waiting[0]
            if self.socket is not None:
                try:
                    socket.send_fds(self.socket, [message], [theirs.fileno()])
                except (BlockingIOError, InterruptedError):
                    asyncio.get_running_loop().call_later(_AGAIN_S, self._send)
                    return
                except OSError:
                    pass  # home is gone
            self._waiting.popleft()
            theirs.close()

    def receive(self) -> None:
        """Receive all that home has told."""
        while self.socket is not None:
            try:
                message, fds, _, _ = socket.recv_fds(self.socket, HAND_OVER_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                message, fds = b"", []
            if not message:
                self.detach()
                return
            for fd in fds:
                self._answered = Answered(fd, writable=False)
                os.close(fd)
            returned = _decode(message)
            relay = self.relays.get(returned.number)
            if relay is not None:
                relay.on_returned(returned.sent)
