"""A front's side of connections whose requests are for home: all but infer requests.

Home gets one end of a pair of Unix sockets over the hand-over socket, with the addresses of the connection,
and the front copies bytes between the client and the other end, so that TLS ends in the front. Home answers
as on a connection of its own (`server.fronts.reception`). When an infer request comes, home gives the
connection back: it names the number of bytes that it has written (`Returned`), the front ends its direction,
and home then returns the bytes that it has not used. So the place of each message is exact on both ways.
"""

import asyncio
import select
import socket
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
from msgspec import Struct

from cobatch.server.edge.fast_path import FastConnection
from cobatch.server.edge.framing import HEADERS
from cobatch.server.edge.lingering import ClosedTransport
from cobatch.server.fronts.leaving import LeavingConnection, is_infer
from cobatch.server.http.problem import Problem
from cobatch.server.inference.service import Inference

HAND_OVER_BYTES = 4096
# Between looks at a socket that takes nothing, or whose other end was closed in one direction.
_LOOK_S = 0.1
# Before the bytes that home gives back.
LENGTH_BYTES = 8
# The end of home's sockets is seen within this time of each other.
_SAME_END_S = 0.05


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


def unavailable() -> Problem:
    """Return the problem of a request while there is no engine process."""
    detail = "the process with the models is being started again"
    return Problem("starting", detail, retry_after_s=1)


class HandOver:
    """The front's end of the hand-over socket; there is none while home is started again.

    `is_alive`: home runs and does not hang. `relays`: the relayed connections, by number.
    """

    def __init__(self, is_alive: Callable[[], bool] = lambda: True) -> None:
        self._is_alive = is_alive
        self.relays: dict[int, Relay] = {}
        self.socket: socket.socket | None = None
        self._number = 0
        self._waiting: deque[tuple[bytes, socket.socket]] = deque()

    def attach(self, hand_over: socket.socket) -> None:
        """Use the socket to a new home, and close the one before."""
        self.detach()
        hand_over.setblocking(False)
        self.socket = hand_over
        asyncio.get_running_loop().add_reader(hand_over, self._receive)

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

    def hand_over(self, relay: "Relay", scope: Any) -> socket.socket:
        """Send home one end of a new pair of sockets, return the other."""
        self._number += 1
        relay.number = self._number
        self.relays[relay.number] = relay
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        handed = Handed(relay.number, scope["client"], scope["server"], scope["scheme"])
        self._waiting.append((_encode(handed), theirs))
        if len(self._waiting) == 1:
            self._send()
        return ours

    def _send(self) -> None:
        while self._waiting:
            message, theirs = self._waiting[0]
            if self.socket is not None:
                try:
                    socket.send_fds(self.socket, [message], [theirs.fileno()])
                except (BlockingIOError, InterruptedError):
                    asyncio.get_running_loop().call_later(_LOOK_S, self._send)
                    return
                except OSError:
                    pass  # home is gone
            self._waiting.popleft()
            theirs.close()

    def _receive(self) -> None:
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
            returned = _decode(message)
            relay = self.relays.get(returned.number)
            if relay is not None:
                relay.on_returned(returned.sent)


class FrontConnection(LeavingConnection):
    """A client's connection to a front."""

    def __init__(self, hand_over: HandOver, *arguments: Any, **of_uvicorn: Any) -> None:
        super().__init__(*arguments, **of_uvicorn)
        self.hand_over = hand_over

    def is_ours(self) -> bool:
        return not self.hand_over.available or is_infer(self.inference, self.method, self.url)

    def leave(self, raw: bytes) -> None:
        Relay(self, self._scope, raw)


class FastFrontConnection(FrontConnection, FastConnection):
    """The same, with the fast path."""


def front_protocol(inference: Inference, hand_over: HandOver) -> Any:
    """Return the factory of a front's connections, for uvicorn."""
    if not inference.settings.server.fast_path:
        return partial(FrontConnection, hand_over, inference)
    return partial(FastFrontConnection, hand_over, inference, {})


class Relay(ClosedTransport, asyncio.Protocol):
    """The client's side of a relayed connection, which sees this as its transport from then on.

    `expects`: the client was the last to send, so a response is owed.
    """

    number: int

    def __init__(self, connection: FrontConnection, scope: Any, raw: bytes) -> None:
        self.connection = connection
        self.hand_over = connection.hand_over
        self.transport = connection.transport
        self.transport.pause_reading()
        self.transport.set_protocol(self)
        connection.transport = self
        self.expects = True
        self.home = self.hand_over.socket
        self.pipe: _Pipe | None
        self.pipe = pipe = _Pipe(self, raw)
        ours = self.hand_over.hand_over(self, scope)
        loop = connection.loop
        self._connecting = loop.create_task(loop.create_unix_connection(lambda: pipe, sock=ours))

    # From the client

    def data_received(self, data: bytes) -> None:
        self.expects = True
        if self.pipe is not None:
            self.pipe.write(data)

    def eof_received(self) -> bool:
        """Tell home, which ends the connection: a client that sends no more is gone, as with one process."""
        if self.pipe is not None:
            self.pipe.write_eof()
        return self.transport.can_write_eof() is True  # TLS ends in both directions

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()
        self.connection.connection_lost(exc)
        del self.connection  # they refer to each other

    def pause_writing(self) -> None:
        self.connection.pause_writing()
        if self.pipe is not None:
            self.pipe.transport.pause_reading()

    def resume_writing(self) -> None:
        self.connection.resume_writing()
        if self.pipe is not None:
            self.pipe.transport.resume_reading()

    # From home

    def on_returned(self, sent: int) -> None:
        """Stop, since home gives the connection back."""
        if self.pipe is not None and not self.transport.is_closing():
            self.transport.pause_reading()
            self.pipe.on_returned(sent)

    def on_half_closed(self) -> None:
        """Home has written its last byte and reads on."""
        if self.transport.can_write_eof() and not self.transport.is_closing():
            self.transport.write_eof()

    def on_closed(self, back: bytes | None) -> None:
        """Home has closed the connection, or given `back` the bytes that it did not use."""
        if self.pipe is None:
            return
        if back is not None:
            self._end()
            self.connection.begin_again(self.transport, back)
        elif self.expects and not self.transport.is_closing():
            self.connection.loop.call_later(_SAME_END_S, self._on_silent_end)
        else:
            self.transport.close()

    def _on_silent_end(self) -> None:
        """Answer instead of a home that died; it may also have closed a connection without a request."""
        if self.pipe is None:
            return
        if self.home is not None and self.hand_over.socket is self.home:
            self.transport.close()
            return
        self._end()
        connection = self.connection
        connection.begin_again(self.transport, b"")
        connection.receiving = HEADERS
        problem = unavailable()
        problem.close = True
        connection.end(problem)

    def _end(self) -> None:
        pipe, self.pipe = self.pipe, None
        self.hand_over.relays.pop(self.number, None)
        if pipe is not None:
            pipe.end()


class _Pipe(asyncio.Protocol):
    """Home's side of a relayed connection."""

    def __init__(self, relay: Relay, raw: bytes) -> None:
        self.transport: Any = None
        self._relay: Relay | None = relay
        self._raw = raw
        self._received = 0
        self._sent: int | None = None  # bytes of responses, once home gives the connection back
        self._back = bytearray()
        self._closed = self._eof = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        relay = self._relay
        if relay is None:
            self.transport.abort()
            return
        if relay.connection.write_paused:
            self.transport.pause_reading()
        relay.transport.resume_reading()
        self.write(self._raw)
        self._raw = b""
        if self._eof:
            self.transport.write_eof()

    def write(self, data: bytes) -> None:
        """Pass on the bytes that the client has sent."""
        if not self.transport.is_closing() and not self._eof:
            self.transport.write(data)

    def write_eof(self) -> None:
        """Pass on that the client sends no more."""
        if not self._eof:
            self._eof = True
            if self.transport is not None and not self.transport.is_closing():
                self.transport.write_eof()

    def on_returned(self, sent: int) -> None:
        """Keep the bytes behind the responses, and let home send them."""
        self._sent = sent
        if self._relay is not None:
            self._relay.expects = True  # the request that home does not serve
        self.write_eof()

    def data_received(self, data: bytes) -> None:
        relay = self._relay
        if relay is None:
            return
        if self._sent is not None:
            left = max(0, self._sent - self._received)
            self._back += data[left:]
            data = data[:left]
        self._received += len(data)
        if data:
            relay.expects = self._sent is not None  # then the client has sent a request that is given back
            relay.transport.write(data)

    def pause_writing(self) -> None:
        if self._relay is not None:
            self._relay.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._relay is not None and self._sent is None:
            self._relay.transport.resume_reading()

    def eof_received(self) -> bool:
        if self._sent is None and not self._is_hung_up():
            if self._relay is not None:
                self._relay.on_half_closed()
            self._look()
            return True
        self._on_closed()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_closed()

    def _look(self) -> None:
        """Look again and again for the end of home's other direction, of which no event tells."""
        if self._relay is None:
            return
        if self._is_hung_up():
            self._on_closed()
        else:
            self._timer = self._relay.connection.loop.call_later(_LOOK_S, self._look)

    def _is_hung_up(self) -> bool:
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), 0)
        return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))

    def _on_closed(self) -> None:
        if not self._closed and self._relay is not None:
            self._closed = True
            self._relay.on_closed(self._returned())

    def _returned(self) -> bytes | None:
        """Return what home gave back; None if it closed the connection, or died before it had given all."""
        length, back = self._back[:LENGTH_BYTES], self._back[LENGTH_BYTES:]
        if len(length) < LENGTH_BYTES or len(back) != int.from_bytes(length, "big"):
            return None
        return bytes(back)

    def end(self) -> None:
        """Close, without a word to the relay."""
        self._relay = None
        if self._timer is not None:
            self._timer.cancel()
        if self.transport is not None:
            self.transport.abort()
