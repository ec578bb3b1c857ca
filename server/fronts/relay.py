"""A front's side of connections whose requests are for home: all but infer requests.

Home gets one end of a pair of Unix sockets over the hand-over socket, with the addresses of the connection,
and the front copies bytes between the client and the other end, so that TLS ends in the front. Home answers
as on a connection of its own (`server.fronts.reception`). When an infer request comes, home gives the
connection back: the front ends its direction, and home then returns the bytes that it has not used.

Home notes how many bytes it has taken and written whenever it owes nothing, in memory that it shares with
the front (`Answered`). So the place of each message is exact on both ways, and the front knows what is owed
if home dies.
"""

import asyncio
import logging
import select
import socket
import time
from functools import partial
from typing import Any

from cobatch.server.edge.fast_path import FastConnection
from cobatch.server.edge.framing import HEADERS
from cobatch.server.edge.lingering import ClosedTransport
from cobatch.server.fronts.hand_over import LENGTH_BYTES, Answered, HandOver, serve_pipe
from cobatch.server.fronts.leaving import LeavingConnection, is_infer
from cobatch.server.http.problem import Problem
from cobatch.server.inference.service import Inference

log = logging.getLogger("cobatch.fronts")

# Between looks at a socket whose other end was closed in one direction.
_LOOK_S = 0.1


def unavailable(detail: str = "the process with the models is being started again") -> Problem:
    """Return the problem of a request that cannot be relayed now."""
    return Problem("starting", detail, retry_after_s=1)


class FrontConnection(LeavingConnection):
    """A client's connection to a front."""

    def __init__(self, hand_over: HandOver, *arguments: Any, **of_uvicorn: Any) -> None:
        super().__init__(*arguments, **of_uvicorn)
        self.hand_over = hand_over

    def is_ours(self) -> bool:
        return not self.hand_over.available or is_infer(self.inference, self.method, self.url)

    def leave(self, raw: bytes) -> None:
        try:
            pipes = socket.socketpair()
        except OSError as error:
            log.error("cannot relay a request: %s", error.strerror)  # noqa: TRY400
            self.raw = None
            self.refuse("too many files are open")
        else:
            Relay(self, self._scope, raw, *pipes)

    def refuse(self, *why: str) -> None:
        """Answer a request that is not relayed; it is the connection's last."""
        problem = unavailable(*why)
        problem.close = True
        self.receiving = HEADERS
        self.end(problem)

    def rest(self) -> None:
        """Be idle, after a home that died or has closed an idle connection."""
        http = self.inference.settings.server
        if self.inference.draining or time.monotonic() >= self.since_s + http.keep_alive_s:
            self.close()


class FastFrontConnection(FrontConnection, FastConnection):
    """The same, with the fast path."""


def front_protocol(inference: Inference, hand_over: HandOver) -> Any:
    """Return the factory of a front's connections, for uvicorn."""
    if not inference.settings.server.fast_path:
        return partial(FrontConnection, hand_over, inference)
    return partial(FastFrontConnection, hand_over, inference, {})


class Relay(ClosedTransport, asyncio.Protocol):
    """The client's side of a relayed connection, which sees this as its transport from then on."""

    number: int
    answered: Answered | None

    def __init__(
        self, connection: FrontConnection, scope: Any, raw: bytes, ours: socket.socket, theirs: socket.socket
    ) -> None:
        self.connection = connection
        self.hand_over = connection.hand_over
        self.transport = connection.transport
        self.transport.pause_reading()
        self.transport.set_protocol(self)
        connection.transport = self
        self.pipe: _Pipe | None
        self.pipe = pipe = _Pipe(self, raw)
        ours.setblocking(False)
        self.hand_over.hand_over(self, scope, theirs)
        self._connecting = connection.loop.create_task(serve_pipe(pipe, ours))

    # From the client

    def data_received(self, data: bytes) -> None:
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
            self.pipe.pause_reading()

    def resume_writing(self) -> None:
        self.connection.resume_writing()
        if self.pipe is not None:
            self.pipe.resume_reading()

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

    def on_closed(self) -> None:
        """Home has ended its side: it died, closed the connection, or gave it back."""
        if self.pipe is None:
            return
        self.hand_over.receive()  # what it told before
        pipe, connection = self.pipe, self.connection
        back = pipe.returned()
        taken, sent = (0, 0) if self.answered is None else self.answered.find(self.number)
        if back is None and not pipe.is_between_responses(sent):
            self.transport.close()
            return
        self._end()
        connection.begin_again(self.transport, back or b"")
        if back is None:
            connection.refuse() if pipe.forwarded > taken else connection.rest()

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
        self.forwarded = 0  # bytes of the client
        self._received = 0  # those of home
        self._sent: int | None = None  # bytes of responses, once home gives the connection back
        self._back = bytearray()  # the bytes behind the responses, if home gives the connection back
        self._closed = self._eof = self._half_closed = False
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
        self.forwarded += len(data)
        if not self.transport.is_closing() and not self._eof:
            self.transport.write(data)

    def pause_reading(self) -> None:
        """Let home wait, now or when this is connected."""
        if self.transport is not None:
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Let home write again."""
        if self.transport is not None:
            self.transport.resume_reading()

    def write_eof(self) -> None:
        """Pass on that the client sends no more."""
        if not self._eof:
            self._eof = True
            if self.transport is not None and not self.transport.is_closing():
                self.transport.write_eof()

    def on_returned(self, sent: int) -> None:
        """Keep the bytes behind the responses, and let home send them."""
        self._sent = sent
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
            relay.connection.since_s = time.monotonic()
            relay.transport.write(data)

    def pause_writing(self) -> None:
        if self._relay is not None:
            self._relay.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._relay is not None and self._sent is None:
            self._relay.transport.resume_reading()

    def eof_received(self) -> bool:
        if self._sent is None and not self._is_hung_up():
            self._half_closed = True
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
            self._relay.on_closed()

    def returned(self) -> bytes | None:
        """Return the bytes that home gave back; None if it closed the connection, or died before the last."""
        length, back = self._back[:LENGTH_BYTES], self._back[LENGTH_BYTES:]
        if len(length) < LENGTH_BYTES or len(back) != int.from_bytes(length, "big"):
            return None
        return bytes(back)

    def is_between_responses(self, sent: int) -> bool:
        """Return True if all responses that began are whole, and the last one did not end the connection."""
        return self._received == sent and not self._half_closed

    def end(self) -> None:
        """Close, without a word to the relay."""
        self._relay = None
        if self._timer is not None:
            self._timer.cancel()
        if self.transport is not None:
            self.transport.abort()
