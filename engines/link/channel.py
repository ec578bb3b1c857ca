"""A channel: one end of the messages between two processes, over a SOCK_SEQPACKET socket that never blocks.

The socket keeps the order and the limits of datagrams, wakes the receiver, holds the sender back, and tells
the end. The event loop calls `receive` when the socket can be read, and `flush` when it can be written while
datagrams are `backlogged`. Only `receive` reports the end, after the last message that was sent before it.
"""

import errno
import socket
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeAlias, TypeVar

import msgspec

from cobatch.engines.errors import LinkClosedError, LinkError
from cobatch.engines.link.messages import DATAGRAM_BYTES, MESSAGE_BYTES, Datagram, FromFront, ToFront

_LONGEST_BYTES = DATAGRAM_BYTES + MESSAGE_BYTES
# Linux takes twice as much as is set.
_SEND_BUFFER_BYTES = 208 << 10
_FULL = (errno.EAGAIN, errno.ENOBUFS)
_CLOSED = (errno.EPIPE, errno.ECONNRESET)

Sent = TypeVar("Sent", bound=FromFront | ToFront)
Received = TypeVar("Received", bound=FromFront | ToFront)


class Channel(Generic[Sent, Received]):
    """An end of a link that owns its socket. `decode` is that of the messages from the other end."""

    __slots__ = ("_backlog", "_buffer", "_datagram", "_decode", "_sock")

    def __init__(self, sock: socket.socket, decode: Callable[[memoryview], list[Received]]) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._sock = sock
        self._decode = decode
        self._buffer = memoryview(bytearray(_LONGEST_BYTES))
        self._datagram: Datagram | None = None
        # Datagrams that are full, or that the socket did not take.
        self._backlog: deque[bytearray] = deque()

    def fileno(self) -> int:
        """Return the socket's descriptor, or -1 if it is closed."""
        return self._sock.fileno()

    @property
    def backlogged(self) -> bool:
        """Are datagrams waiting for `flush`, other than the one that is being filled?"""
        return bool(self._backlog)

    def send(self, message: Sent) -> None:
        """Queue a message for `flush`; its payload is copied. Raises ValueError if it is too long."""
        datagram = self._datagram
        if datagram is None:
            datagram = self._datagram = Datagram()
        if datagram.add(message):
            self._backlog.append(datagram.close())
            self._datagram = None

    def flush(self) -> None:
        """Send the queue, as far as the socket takes it: the rest is `backlogged`."""
        backlog = self._backlog
        while backlog or self._datagram is not None:
            if not backlog:
                backlog.append(self._datagram.close())  # type: ignore[union-attr]  # or the loop had ended
                self._datagram = None
            try:
                self._sock.send(backlog[0])
            except OSError as error:
                if error.errno in _FULL:
                    return
                if error.errno not in _CLOSED:
                    raise
                self._datagram = None
                backlog.clear()
                return
            backlog.popleft()

    def receive(self) -> list[Received]:
        """Return the messages of one datagram, [] if none has come.

        Raises LinkClosedError when the other end is closed, LinkError for a datagram that is not of messages.
        """
        try:
            try:
                size = self._sock.recv_into(self._buffer)
            except ConnectionResetError:
                # The other end was closed before it had read everything. Its messages can be read still.
                size = self._sock.recv_into(self._buffer)
        except BlockingIOError:
            return []
        if not size:
            raise LinkClosedError("the other process closed the link")
        try:
            return self._decode(self._buffer[:size])
        except msgspec.MsgspecError as error:
            raise LinkError(f"a datagram of {size} bytes is not one of messages: {error}") from None

    def close(self) -> None:
        """Close the socket. The queue is lost."""
        self._sock.close()


FrontChannel: TypeAlias = Channel[FromFront, ToFront]
HomeChannel: TypeAlias = Channel[ToFront, FromFront]
