"""A connection whose requests belong to two processes: it leaves where a request is for the other one.

The other process gets the bytes from the first one of that request on. So the parser is fed no further than
to a place where a message may end: it alone decides where one does, and then the place is known.
"""

from abc import abstractmethod
from typing import Any

from cobatch.server.edge.connection import Connection
from cobatch.server.edge.framing import BODY, NOTHING, Framing
from cobatch.server.inference.service import Inference

# Headers and chunked bodies end with this, and with nothing else.
_END = b"\r\n\r\n"


def is_infer(inference: Inference, method: bytes, target: bytes) -> bool:
    """Return True for a request that a front answers: to an infer route, with or without a query."""
    targets = inference.infer_targets
    return method == b"POST" and (target in targets or target.partition(b"?")[0] in targets)


class Splitting(Framing):
    """Framing in pieces, none of which has bytes of two messages. `cycle`: the request being received."""

    cycle: Any
    raw: bytes | None = None  # the bytes for the other process

    @property
    @abstractmethod
    def ended(self) -> bool:
        """The connection takes no more requests."""

    @abstractmethod
    def go(self) -> None:
        """Leave with `raw`, now or later."""

    def data_received(self, data: bytes) -> None:
        at = 0
        while at < len(data) and self.raw is None and not self.ended:
            end = self._end_of_piece(data, at)
            super().data_received(data[at:end])
            at = end
        if self.raw is not None:
            self.raw += data[at:]
            self.go()

    def _end_of_piece(self, data: bytes, at: int) -> int:
        """Return an end of the piece that begins at `at`: not behind the first message's end."""
        if self.receiving == BODY:
            length = self.cycle.content_length
            if length is not None:
                left: int = length - self.body_bytes
                return at + left
        if at < 3 and self.receiving:
            return at + 1  # the beginning of `_END` may have come before
        end = data.find(_END, max(0, at - 3))
        return len(data) if end < 0 else end + len(_END)


class LeavingConnection(Connection, Splitting):
    """A connection that leaves with the first request that is not for this process."""

    @abstractmethod
    def is_ours(self) -> bool:
        """Return True if the request whose headers are complete is for this process."""

    @abstractmethod
    def leave(self, raw: bytes) -> None:
        """Go to the other process with these bytes and all that follow."""

    @property
    def ended(self) -> bool:
        return self._farewell is not None or self.transport.is_closing()

    def begin_request(self, last: dict[bytes, bytes]) -> None:
        if self.is_ours():
            super().begin_request(last)
        else:
            # `receiving` stays HEADERS: a request is on its way, and it has no cycle.
            self.raw = self._head
            self._headers_bytes = 0

    def go(self) -> None:
        """Leave once all earlier requests are answered; read nothing meanwhile."""
        raw = self.raw
        if raw is None or self.ended:
            return
        if self._owes_response():
            self.pause_reading()
        else:
            self.leave(raw)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.go()

    def resume_reading(self) -> None:
        if self.raw is None:
            super().resume_reading()

    def shutdown(self) -> None:
        if self.raw is None:
            super().shutdown()

    def begin_again(self, transport: Any, data: bytes) -> None:
        """Take requests over this transport again; `data` begins with one."""
        self.transport = transport
        transport.set_protocol(self)
        self.parser = self._new_parser()
        self.receiving = NOTHING
        self.raw = self.cycle = self._ahead = None
        self._read_paused = True
        self.resume_reading()
        self.data_received(data)
