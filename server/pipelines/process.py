"""A process of a pool as home sees it: its calls, on the event loop."""

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
from collections.abc import Callable
from functools import partial

from cobatch.batcher.errors import EngineRestartingError
from cobatch.batcher.request import State
from cobatch.engines.errors import (
    BadRequest,
    CallerError,
    EngineEndedError,
    EngineError,
    EngineLoadError,
    EngineRunError,
)
from cobatch.engines.python.process import ModelProcess
from cobatch.server.http.problem import Problem
from cobatch.server.links.downlink import Downlink
from cobatch.server.links.hub import Hub
from cobatch.server.links.uplink import SOURCE_BITS
from cobatch.server.pipelines.call import (
    FAILED,
    NOTHING,
    Begun,
    Call,
    Cancel,
    Data,
    Described,
    End,
    Head,
    NotLoaded,
    Start,
    Taken,
    ToChild,
    ToHome,
    decode_to_home,
)
from cobatch.server.pipelines.request import PipelineRequest
from cobatch.server.pipelines.seat import Seat
from cobatch.server.pipelines.wire import INLINE_BYTES, Wire, in_memory

log = logging.getLogger("cobatch.python")

_MODULE = "cobatch.server.pipelines.child"
# From the cancellation of a call that ran too long to its end.
_END_S = 1.0
_RETRY_S = 1.0


class PoolProcess:
    """A process, from its start to its end. `on_end` is told of it on the loop, before its calls fail.

    `seats`: where calls run; there are some once it is loaded. `ended`: why it has ended.
    """

    def __init__(
        self, name: str, start: Start, hub: Hub, on_end: Callable[["PoolProcess", str], None]
    ) -> None:
        self._name = name
        self._on_end = on_end
        self.seats: list[Seat] = []
        self.ended = ""
        self.on_seat: Callable[[Seat], None] = lambda seat: None
        self._loop = loop = asyncio.get_running_loop()
        self._described: asyncio.Future[Described] = loop.create_future()
        self._described.add_done_callback(_retrieve)
        self._numbers = itertools.count(1)
        self._running: dict[int, Seat] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._retired: set[Seat] = set()
        self._killers: dict[int, asyncio.TimerHandle] = {}  # of calls that ran too long
        self._dying = False
        try:
            link = hub.open_steps(self._on_link_end)
        except OSError as error:
            raise EngineLoadError(f"its link cannot be made: {error}") from error
        try:
            self._process = ModelProcess(name, link, {}, self._ended_elsewhere, _MODULE)
        finally:
            for descriptor in link:
                os.close(descriptor)
        self._wire: Wire[ToChild, ToHome] = Wire(
            self._process.sock, decode_to_home, self._on_message, self._on_closed
        )
        try:
            self._wire.send(start)
        except OSError as error:
            self._wire.close()
            self._process.kill()
            raise EngineLoadError(f"its process cannot be told what to load: {error}") from error

    async def described(self) -> Described:
        """Wait until it is loaded. Raises EngineLoadError."""
        return await self._described

    def make_seats(self, count: int) -> list[Seat]:
        """Return places for calls."""
        self.seats = [Seat(self) for _ in range(count)]
        return self.seats

    # To the process

    def begin(self, seat: Seat, request: PipelineRequest) -> None:
        """Send a call."""
        number = next(self._numbers)
        self._running[number] = seat
        self._idle.clear()
        request.withdraw = partial(self.cancel, number)
        request.taken = partial(self._wire.send, Taken(number))
        try:
            self._send_call(number, request)
        except OSError as error:  # too many open files, no memory
            del self._running[number]
            if not self._running:
                self._idle.set()
            seat.end(EngineRunError(f"the call cannot be sent to its process: {error}"))

    def _send_call(self, number: int, request: PipelineRequest) -> None:
        if request.descriptor < 0 and request.size > INLINE_BYTES:
            request.descriptor, request.data = in_memory(request.data), NOTHING
        descriptor = -1 if request.descriptor < 0 else os.dup(request.descriptor)
        tenant, source = None, 0
        if request.tenant is not None:
            tenant = request.tenant.name, request.tenant.rule
        elif request.client is not None:
            source = hash(request.client) & SOURCE_BITS
        left_s = None
        if request.timeout_s is not None:
            left_s = request.enqueued_s + request.timeout_s - self._loop.time()
        call = Call(
            number,
            request.content_type,
            request.size,
            request.data,
            request.request_id,
            tenant,
            source,
            request.priority,
            left_s,
        )
        self._wire.send(call, descriptor)

    def cancel(self, number: int) -> None:
        """Tell the process that no one waits for a call."""
        if number in self._running:
            self._wire.send(Cancel(number))

    def give_up(self, seat: Seat, *, concurrent: bool) -> None:
        """End a call that ran too long, or else the process. Its seats are used again after the end."""
        self._retired.update(self.seats)
        number = next((number for number, one in self._running.items() if one is seat), None)
        if number is None:
            return
        if concurrent:
            self.cancel(number)
            self._killers[number] = self._loop.call_later(_END_S, self.kill)
        else:
            self.kill()

    def kill(self) -> None:
        """End the process, which first logs where it is. Its seats are not used again."""
        self._dying = True
        self._process.abandon()

    async def idle(self) -> None:
        """Wait until no call runs."""
        await self._idle.wait()

    async def stop(self) -> None:
        """End the process; its calls have ended."""
        self._on_end = lambda process, why: None
        self._wire.close()
        await asyncio.to_thread(self._process.close)

    # From the process

    def _on_message(self, message: ToHome) -> None:
        match message:
            case Described() | NotLoaded() if self._described.done():
                pass  # no one waits for it any more
            case Described():
                self._described.set_result(message)
            case NotLoaded():
                self._described.set_exception(EngineLoadError(message.text))
            case Begun():
                if (seat := self._running.get(message.number)) is not None and seat.request is not None:
                    seat.begun = True
                    seat.request.let_go()
            case Head():
                if (request := self._waiting(message.number)) is not None:
                    request.head = message
                    request.changed.set()
            case Data():
                if (request := self._waiting(message.number)) is not None:
                    request.items.append(message.data)
                    request.changed.set()
            case End():
                self._end(message)

    def _waiting(self, number: int) -> PipelineRequest | None:
        """Return a call's request, None if no one waits for it."""
        seat = self._running.get(number)
        request = None if seat is None else seat.request
        return request if request is not None and request.state is State.RUNNING else None

    def _end(self, end: End) -> None:
        seat = self._running.pop(end.number, None)
        killer = self._killers.pop(end.number, None)
        if not self._running:
            self._idle.set()
        if seat is None:
            return
        if seat.request is not None:
            seat.request.steps = end.steps
        if killer is None:
            seat.end(_error_of(end))
        else:
            killer.cancel()  # the batcher has given the seat up
        if self._retired and not self._killers and not self._dying:
            self._renew()

    def _renew(self) -> None:
        """Put new seats in place of those that are retired and free."""
        free = self._retired.difference(self._running.values())
        self._retired -= free
        for index, seat in enumerate(self.seats):
            if seat in free:
                self.seats[index] = new = Seat(self)
                self.on_seat(new)

    # The end

    def _on_closed(self, why: str) -> None:
        """Note the end of the socket: the process has ended, or is ended for a message that it sent."""
        if why:
            self._process.kill(f"sent a bad message and was ended: {why}")
        else:  # it has ended, as its socket shows before its status does
            self._loop.call_later(_END_S, self._process.kill, "closed its socket and was ended")

    def _on_link_end(self, link: Downlink, why: str, broken: bool) -> None:
        if broken:
            self._process.kill(f"sent a bad message and was ended: {why}")

    def _ended_elsewhere(self, error: EngineEndedError) -> None:
        """Note the end of the process, in another thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._ended, str(error))

    def _ended(self, why: str) -> None:
        while not self._wire.closed and self._wire.read():
            pass  # the messages before its end say which calls had begun
        self._wire.close()
        if not self._described.done():
            self._described.set_exception(EngineLoadError(f"while it was loaded, {why}"))
        for killer in self._killers.values():
            killer.cancel()
        running, self._running = self._running, {}
        self._idle.set()
        reference = secrets.token_hex(8)
        self.ended = f"(reference {reference}): {why}"
        self._on_end(self, self.ended)  # no call comes any more
        begun = [seat for seat in running.values() if seat.begun]
        for seat in running.values():
            if not seat.begun:
                seat.end(EngineEndedError(why))  # it runs in another process
            elif len(begun) == 1 and not self._dying:
                seat.end(EngineRunError(why))  # it is at fault
            else:
                # Not run again: it may have done something already, and a part of the answer may be sent.
                seat.end(CallerError(EngineRestartingError(self._name, reference, _RETRY_S)))


def _error_of(end: End) -> EngineError | None:
    """Return the error of a call as an engine's."""
    match end.slug:
        case "":
            return None
        case "refused-by-model":
            return BadRequest(end.text)
        case "cancelled":
            return EngineRunError("the handler was cancelled, but not by the server")
        case slug if slug == FAILED:
            return EngineRunError(end.text)
        case slug:
            try:
                return CallerError(Problem(slug, end.text, **end.members))
            except (KeyError, TypeError):  # the handler has changed an error
                return EngineRunError(f"the handler raised no problem: {slug!r}: {end.text}")


def _retrieve(described: asyncio.Future[Described]) -> None:
    """Note that an error is known, which may have no other reader."""
    described.cancelled() or described.exception()
