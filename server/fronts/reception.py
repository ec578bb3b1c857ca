"""Home's side of relayed connections: made over the sockets that fronts hand over (`server.fronts.relay`)."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from typing import Any

import msgspec

from cobatch.engines.link import slab
from cobatch.server.edge.lingering import ClosedTransport
from cobatch.server.fronts.hand_over import (
    HAND_OVER_BYTES,
    LENGTH_BYTES,
    Answered,
    Handed,
    Returned,
    serve_pipe,
)
from cobatch.server.fronts.leaving import LeavingConnection, is_infer

log = logging.getLogger("cobatch.fronts")

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Handed).decode


class Reception:
    """Home's end of one front's hand-over socket. `make` returns a connection for each socket received."""

    def __init__(self, hand_over: socket.socket, make: Callable[[], asyncio.Protocol]) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._socket = hand_over
        self._make = make
        self._tasks: set[asyncio.Task[Any]] = set()
        hand_over.setblocking(False)
        self.answered = self._share()
        loop.add_reader(hand_over, self._receive)

    def close(self) -> None:
        """Take no more connections. Those that were taken end by themselves."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._socket.close()

    def _share(self) -> Answered:
        """Make the words, and give the front their memory."""
        with contextlib.ExitStack() as stack:
            memory = slab.create("cobatch-answered", Answered.SIZE)
            stack.callback(os.close, memory)
            readable = slab.for_reading(memory)
            stack.callback(os.close, readable)
            with contextlib.suppress(OSError):  # the front has ended
                socket.send_fds(self._socket, [_encode(Returned(0, 0))], [readable])
            return Answered(memory, writable=True)

    def send_back(self, number: int, sent: int) -> bool:
        """Announce that a connection is given back; False if the front cannot be told now."""
        try:
            self._socket.send(_encode(Returned(number, sent)))
        except OSError:
            return False
        return True

    def _receive(self) -> None:
        with contextlib.suppress(BlockingIOError, InterruptedError):
            while self._socket.fileno() >= 0:
                try:
                    message, fds, _, _ = socket.recv_fds(
                        self._socket, HAND_OVER_BYTES, 1, socket.MSG_CMSG_CLOEXEC
                    )
                except ConnectionError:  # the front has ended before it received all
                    message, fds = b"", []
                received = [socket.socket(fileno=fd) for fd in fds]
                if message and not fds:
                    log.error("too many open files: a request is refused")
                if not message:
                    self.close()
                    return
                for one in received:
                    self._adopt(_decode(message), one)

    def _adopt(self, handed: Handed, pipe: socket.socket) -> None:
        connection = self._make()
        assert isinstance(connection, HomeConnection)
        connection.reception, connection.handed = self, handed
        pipe.setblocking(False)
        task = self._loop.create_task(serve_pipe(connection, pipe))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class HandedTransport:
    """The transport of a relayed connection: that of the Unix socket, with the client's addresses.

    `sent`: the bytes written.
    """

    def __init__(self, transport: Any, handed: Handed) -> None:
        self._transport = transport
        self._is_tls = handed.scheme == "https"
        self._names = {"peername": handed.client, "sockname": handed.server, "sslcontext": self._is_tls}
        self.sent = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._names.get(name, default)

    def can_write_eof(self) -> bool:
        """Over TLS the client would not be told, so the connection ends at once in both directions."""
        return not self._is_tls

    def write(self, data: bytes) -> None:
        self.sent += len(data)
        self._transport.write(data)

    def writelines(self, pieces: Any) -> None:
        self.sent += sum(map(len, pieces))
        self._transport.writelines(pieces)


class HomeConnection(LeavingConnection):
    """A relayed connection. It goes back with the first infer request before which nothing is owed."""

    reception: Reception
    handed: Handed
    stays = False
    _received = _taken = 0  # bytes of the client: all, and those of answered requests

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(HandedTransport(transport, self.handed))  # type: ignore[arg-type]  # as a transport

    def is_ours(self) -> bool:
        return self.stays or self._owes_response() or not is_infer(self.inference, self.method, self.url)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.receiving and not self._owes_response() and not self.transport.is_closing():
            self._taken = self._received
            self._note()

    def allow_body(self) -> None:
        super().allow_body()
        self._note()

    def _note(self) -> None:
        self.reception.answered.note(self.handed.number, self._taken, self.transport.sent)

    def leave(self, raw: bytes) -> None:
        self._note()
        if self.reception.send_back(self.handed.number, self.transport.sent):
            _Returning(self, raw)
        else:
            self.stays = True
            self.begin_again(self.transport, raw)


class _Returning(ClosedTransport, asyncio.Protocol):
    """A connection on its way back to its front."""

    def __init__(self, connection: HomeConnection, raw: bytes) -> None:
        self._connection: HomeConnection | None = connection
        self._raw = raw
        self.transport = connection.transport
        self.transport.set_protocol(self)
        connection.transport = self

    def data_received(self, data: bytes) -> None:
        self._raw += data

    def eof_received(self) -> None:
        """The front, or its client, sends no more: return the bytes and close."""
        self.transport.write(len(self._raw).to_bytes(LENGTH_BYTES, "big") + self._raw)

    def connection_lost(self, exc: Exception | None) -> None:
        connection, self._connection = self._connection, None  # they refer to each other
        if connection is not None:
            connection.connection_lost(exc)
