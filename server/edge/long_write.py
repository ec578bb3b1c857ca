"""A long response, written in parts: one in each iteration of the event loop.

The kernel takes what it is given for as long as the client reads as fast: one write of 335 MB kept the event
loop for 0.3 s. Each piece is let go once it is written.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Any

from cobatch.server.http.reply import PART_BYTES

Piece = bytes | memoryview


class LongWrite(asyncio.Protocol):
    """Stands between a protocol and its transport until all is written: the transport of one, the protocol
    of the other. To the protocol it looks like a transport with a full buffer.
    """

    def __init__(
        self, protocol: Any, transport: Any, loop: asyncio.AbstractEventLoop, pieces: Iterable[Piece]
    ) -> None:
        self._protocol = protocol
        self._transport = transport
        self._loop = loop
        self._pieces = deque(pieces)
        self._unwritten_bytes = sum(map(len, self._pieces))
        self._full = False
        self._end = ""  # the method that ends the transport once all is written
        protocol.pause_writing()
        protocol.transport = self
        transport.set_protocol(self)
        self._write_part()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    # The transport

    def write(self, data: bytes) -> None:
        """Write the data behind the response."""
        self._pieces.append(data)
        self._unwritten_bytes += len(data)

    def close(self) -> None:
        """Close the transport once all is written."""
        self._end = "close"

    def write_eof(self) -> None:
        """Close the transport in one direction once all is written."""
        self._end = self._end or "write_eof"

    def abort(self) -> None:
        """Close the transport now."""
        self._pieces.clear()
        self._transport.abort()

    def is_closing(self) -> bool:
        """Return True if nothing more is written."""
        return self._end == "close" or self._transport.is_closing()

    def get_write_buffer_size(self) -> int:
        """Return the bytes that the client has not taken."""
        size: int = self._unwritten_bytes + self._transport.get_write_buffer_size()
        return size

    def set_protocol(self, protocol: Any) -> None:
        """Give what comes to this protocol from now on."""
        self._protocol = protocol

    # The protocol

    def data_received(self, data: bytes) -> None:
        self._protocol.data_received(data)

    def eof_received(self) -> bool:
        if not self._protocol.eof_received():
            self.close()  # as the transport does, which would not wait for what it has not been given
        return self._transport.can_write_eof() is True  # TLS ends in both directions

    def connection_lost(self, exc: Exception | None) -> None:
        self._pieces.clear()
        protocol, self._protocol = self._protocol, None  # they refer to each other
        protocol.connection_lost(exc)

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._loop.call_soon(self._write_part)

    def _write_part(self) -> None:
        left = PART_BYTES
        while self._pieces and left and not self._full:
            piece = self._pieces.popleft()
            if len(piece) > left:
                view = memoryview(piece)
                piece = view[:left]
                self._pieces.appendleft(view[left:])
            left -= len(piece)
            self._unwritten_bytes -= len(piece)
            self._transport.write(piece)
        if self._pieces:
            if not self._full:
                self._loop.call_soon(self._write_part)
        elif self._protocol is not None:
            self._leave()

    def _leave(self) -> None:
        """Bring protocol and transport together again."""
        protocol, self._protocol = self._protocol, None
        protocol.transport = self._transport
        self._transport.set_protocol(protocol)
        if self._end:
            getattr(self._transport, self._end)()
        if not self._full:
            protocol.resume_writing()
