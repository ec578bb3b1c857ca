"""Reading from a connection only where there is room: for the body, for answers, for further requests.

A body beyond FREE_BYTES needs some of the memory that all bodies share, and is read in turn with the others
(`server.http.body_memory`). A client that sends faster than it is answered, or does not take its responses,
is not read.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from cobatch.server.edge.cycle import AsgiCycle
from cobatch.server.edge.framing import Framing
from cobatch.server.http.body_memory import CHUNKED_BYTES, FREE_BYTES
from cobatch.server.http.problem import no_memory
from cobatch.server.inference.service import Inference

# Bytes per second that a client must take of a response.
LEAST_RATE = 4096


class Cycle(Protocol):
    """One request on its connection, from its headers to the end of its response."""

    keep_alive: bool

    @property
    def content_length(self) -> int | None: ...
    @property
    def response_started(self) -> bool: ...
    @property
    def response_complete(self) -> bool: ...
    @property
    def running(self) -> bool: ...
    def on_body(self, data: bytes) -> None: ...
    def on_end(self) -> None: ...
    def on_disconnect(self) -> None: ...


class Receiver(Framing):
    """A connection's requests on their way in, as far as there is room for them."""

    __slots__ = (
        "_allowed_bytes", "_awaits_turn", "_bodies", "_held", "_read_paused", "_unsent", "_unsent_since_s",
        "_waits", "address", "cycle", "inference", "pipeline", "transport", "writable", "write_paused",
    )  # fmt: skip

    def __init__(self, inference: Inference) -> None:
        super().__init__()
        self.inference = inference
        self._bodies = inference.bodies
        self.address = ""
        self.transport: Any = None
        # The newest request, and those between it and the one being answered.
        self.cycle: Cycle | None = None
        self.pipeline: deque[AsgiCycle] = deque()
        self._read_paused = False
        self._allowed_bytes = FREE_BYTES  # beyond these the body needs memory
        self._held: dict[Cycle, int] = {}  # memory that requests have for their bodies
        self._waits = False  # for memory
        self._awaits_turn = False
        self.write_paused = False
        self.writable = asyncio.Event()
        self.writable.set()
        self._unsent = 0
        self._unsent_since_s = 0.0

    def on_body(self, body: bytes) -> None:
        self.body_bytes += len(body)
        self.cycle.on_body(body)  # type: ignore[union-attr]  # set with the headers
        if self.body_bytes > FREE_BYTES:
            if self.body_bytes > self._allowed_bytes:
                self._take_memory()
            if not self._awaits_turn and not self._bodies.turns.may_go_on(self):
                self._awaits_turn = True
                self.pause_reading()

    # Memory for bodies

    def _take_memory(self) -> None:
        """Take memory for the body that is being received, or read no more before there is some."""
        cycle = self.cycle
        assert cycle is not None
        if cycle.response_complete or self._waits or self.transport.is_closing():
            return  # it is discarded, or this is the rest of the last read
        limit = self.inference.settings.server.max_body_bytes
        length = cycle.content_length
        size = min(limit, max(CHUNKED_BYTES, 2 * self.body_bytes) if length is None else length)
        held = self._held.get(cycle, 0)
        if size <= held:
            return  # over the limit: it is refused
        self._allowed_bytes = size
        if self._bodies.take(self.address, size - held, first=not held):
            self._held[cycle] = size
        elif not held and self._bodies.wait(self, size):
            self._waits = True
            self.pause_reading()
        else:
            self.end(no_memory(0.0))

    def on_body_memory(self) -> None:
        """Read on: the memory for the body is taken."""
        assert self.cycle is not None
        self._waits = False
        self._held[self.cycle] = self._allowed_bytes
        self.since_s = time.monotonic()
        self.resume_reading()

    def on_turn(self) -> None:
        """Read on: others have had their turns."""
        self._awaits_turn = False
        if not self.transport.is_closing():
            self.resume_reading()

    def _stop_waiting(self) -> None:
        self._waits = False
        self._bodies.forget(self)
        self.resume_reading()

    def on_cycle_end(self, cycle: Cycle) -> None:
        """Return the memory of a request whose client is gone: nothing has its body any more."""
        if cycle in self._held:
            self._release_memory([cycle])

    def _release_memory(self, cycles: Sequence[Cycle]) -> None:
        for cycle in cycles:
            self._bodies.give_back(self.address, self._held.pop(cycle))

    # Back-pressure

    def pause_reading(self) -> None:
        """Read no more until `resume_reading`."""
        if not self._read_paused:
            self._read_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on, unless requests wait for answers, responses to be taken, the body for memory or a turn."""
        waits = self._waits or self._awaits_turn
        if self._read_paused and not self.write_paused and not self.pipeline and not waits:
            self._read_paused = False
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        # The client does not take its responses: read no more requests from it until it does.
        self.write_paused = True
        self.writable.clear()
        self.pause_reading()

    def resume_writing(self) -> None:
        self.write_paused = False
        self.writable.set()
        self._note_unsent()
        self.resume_reading()

    def _is_stuck(self, limit_s: float) -> bool:
        """Return True if the client takes a response too slowly: less than LEAST_RATE, after `limit_s`."""
        unsent = self.transport.get_write_buffer_size()
        late_s = time.monotonic() - self._unsent_since_s - limit_s
        if unsent == 0 or self.since_s >= self._unsent_since_s:
            self._note_unsent()  # all is taken, or there is a new response
            return False
        return late_s >= 0 and self._unsent - unsent <= LEAST_RATE * late_s

    def _note_unsent(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._unsent_since_s = time.monotonic()
