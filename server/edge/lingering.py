"""The end of a connection whose client may still be sending (RFC 9112, 9.6).

A socket that is closed before all bytes are read is reset, and then the client, or the proxy before it, loses
the response. So the connection is closed in one direction, and further bytes are discarded for a while.
"""

import asyncio
from typing import Any

# A client that has read the response stops sending; these bound one that does not. The times begin when the
# client has taken the response.
LINGER_BYTES = 128 << 20
LINGER_S = 30.0
# Without a byte received; the second one if the server is about to stop.
LINGER_IDLE_S = 5.0
STOPPING_IDLE_S = 0.25


class ClosedTransport:
    """The transport that a connection sees when another protocol has its socket: a closed one."""

    transport: Any

    def is_closing(self) -> bool:
        """The connection takes no more responses."""
        return True

    def write(self, data: bytes) -> None:
        """Drop the data."""

    def close(self) -> None:
        """Do nothing: the connection ends by itself."""

    def abort(self) -> None:
        """Close the socket now."""
        self.transport.abort()

    def get_write_buffer_size(self) -> int:
        """Return the bytes of the last response that the client has not taken."""
        size: int = self.transport.get_write_buffer_size()
        return size

    pause_reading = resume_reading = close


class LingeringClose(ClosedTransport, asyncio.Protocol):
    """A connection's last protocol, and the transport that the connection sees from then on."""

    def __init__(
        self, connection: asyncio.Protocol, transport: Any, loop: asyncio.AbstractEventLoop, stopping: bool
    ) -> None:
        self._connection: asyncio.Protocol | None = connection
        self.transport = transport
        self._loop = loop
        self._left_bytes = LINGER_BYTES
        self._received_s = loop.time()
        self._end_s = self._received_s + LINGER_S
        self._idle_s = STOPPING_IDLE_S if stopping else LINGER_IDLE_S
        transport.set_protocol(self)
        if transport.can_write_eof():  # not over TLS
            transport.write_eof()
        transport.resume_reading()
        self._timer = loop.call_later(min(self._idle_s, LINGER_S), self._tick)

    def data_received(self, data: bytes) -> None:
        self._received_s = self._loop.time()
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()
        connection, self._connection = self._connection, None  # they refer to each other
        if connection is not None:
            connection.connection_lost(exc)

    def _tick(self) -> None:
        now_s = self._loop.time()
        if self.transport.get_write_buffer_size():
            # `Connection` ends it if the client takes the response too slowly.
            self._received_s, self._end_s = now_s, now_s + LINGER_S
        left_s = min(self._received_s + self._idle_s, self._end_s) - now_s
        if left_s <= 0:
            self.abort()
        else:
            self._timer = self._loop.call_later(left_s, self._tick)
