"""The hand-over socket between a front and home: descriptors of connections, and what home owes them."""

import asyncio
import contextlib
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


class Answered(Struct, frozen=True, array_like=True):
    """Home has written `sent` bytes, and owes nothing for the first `taken` bytes of the client.

    `leaves`: it gives the connection back.
    """

    number: int
    taken: int
    sent: int
    leaves: bool


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Answered).decode


class Relayed(Protocol):
    """A relayed connection of a front. `number`: given by `HandOver`."""

    number: int

    def on_answered(self, answered: Answered) -> None:
        """Home owes nothing, or gives the connection back."""


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
        self._number = 0
        self._waiting: deque[tuple[bytes, socket.socket]] = deque()

    def attach(self, hand_over: socket.socket) -> None:
        """Use the socket to a new home, and close the one before."""
        self.detach()
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
                message = self.socket.recv(HAND_OVER_BYTES)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                message = b""
            if not message:
                self.detach()
                return
            answered = _decode(message)
            relay = self.relays.get(answered.number)
            if relay is not None:
                relay.on_answered(answered)
