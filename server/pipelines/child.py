"""A process of a pipeline's pool: `python -m cobatch.server.pipelines.child NAME PARENT SOCKET ...`.

NAME is for the list of processes; PARENT is home's number, the others are descriptors. It runs the handler's
calls on an event loop, until home closes the socket.
"""

import asyncio
import os
import socket
import sys
import time
import traceback
from asyncio import Semaphore, Task
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import uvloop

from cobatch.engines.errors import BadRequest, EngineLoadError
from cobatch.engines.python.child import encodable, join_home
from cobatch.engines.python.model import open_object
from cobatch.server.links.step_end import StepEnd
from cobatch.server.links.steps import CALLER, Caller, StepError, models_of
from cobatch.server.pipelines.around import around
from cobatch.server.pipelines.call import (
    FAILED,
    MOST_AHEAD,
    MOST_TEXT,
    Begun,
    Call,
    Cancel,
    Data,
    End,
    Head,
    NotLoaded,
    Start,
    Taken,
    ToChild,
    ToHome,
    decode_to_child,
)
from cobatch.server.pipelines.handler import Handler, Refused, encoded, event_text
from cobatch.server.pipelines.prints import mark_lines, marked
from cobatch.server.pipelines.wire import INLINE_BYTES, Wire, in_memory


class Child:
    """Runs the calls that home sends."""

    def __init__(self, sock: socket.socket, link: Sequence[int]) -> None:
        self.ended = asyncio.Event()
        self._wire: Wire[ToHome, ToChild] = Wire(
            sock, decode_to_child, self._on_message, lambda why: self.ended.set()
        )
        self._handler: Handler | None = None
        self._link = link  # the descriptors of its end
        self._steps: StepEnd | None = None
        self._calls: dict[int, tuple[Task[None], Caller]] = {}
        self._room: dict[int, Semaphore] = {}  # for items of streams

    def _on_message(self, message: ToChild) -> None:
        match message:
            case Start():
                self._start(message)
            case Call():
                self._wire.send(Begun(message.number))
                caller = self._caller(message)
                self._calls[message.number] = asyncio.create_task(self._run(message, caller)), caller
            case Cancel():
                if message.number in self._calls:
                    task, caller = self._calls[message.number]
                    caller.end()  # a thread may wait for a step
                    # Not before its first step, without which it would send no `End`.
                    asyncio.get_running_loop().call_soon(task.cancel)
            case Taken():
                if message.number in self._room:
                    self._room[message.number].release()

    def _start(self, start: Start) -> None:
        try:
            self._handler = handler = self._load(start)
            self._wire.send(handler.described)
        except EngineLoadError as error:
            self._wire.send(NotLoaded(_beginning(str(error))))
        except Exception:  # noqa: BLE001 - without an answer home would wait for ever
            self._wire.send(NotLoaded(_tail(traceback.format_exc())))

    def _load(self, start: Start) -> Handler:
        """Return the handler. Raises EngineLoadError."""
        self._steps = StepEnd(self._link, start.models)
        if start.around:
            found = open_object(start.source, start.folder, alone=True, loader="load_requests")
            handle = around(found, start.around, start.datatypes, batched=start.batched)
            handler = Handler(handle, start.source)
        else:
            found = open_object(start.source, start.folder, alone=True)
            handler = Handler(found, start.source)
        if (why := self._steps.unknown(models_of(found))) is not None:
            raise EngineLoadError(f"{start.source}: {why}")
        return handler

    def _caller(self, call: Call) -> Caller:
        assert self._steps is not None
        deadline_s = None if call.timeout_s is None else time.monotonic() + call.timeout_s
        return Caller(
            self._steps,
            tenant=call.tenant,
            priority=call.priority,
            deadline_s=deadline_s,
            source=call.source or None,
        )

    async def _run(self, call: Call, caller: Caller) -> None:
        CALLER.set(caller)
        error: BaseException | None = None
        try:
            with marked(call.request_id):
                await self._answer(call, caller)
        except (SystemExit, KeyboardInterrupt):
            raise  # which end the process
        except BaseException as raised:  # noqa: BLE001 - the user's own code
            error = raised
        caller.end()
        del self._calls[call.number]
        try:
            slug, text, members = _reason(error)
            cut = _tail if slug == FAILED else _beginning
            self._wire.send(End(call.number, slug, cut(text), members, tuple(caller.steps)))
        except Exception:  # noqa: BLE001 - without `End` home would wait for ever
            self._wire.send(End(call.number, FAILED, _tail(traceback.format_exc())))
        finally:
            error = None  # its traceback refers to this frame, a cycle

    async def _answer(self, call: Call, caller: Caller) -> None:
        handler = self._handler
        assert handler is not None
        request = handler.request(call)
        if not handler.described.streamed:
            content_type, data = encoded(await handler.answer(request))
            self._wire.send(Head(call.number, content_type, streamed=False))
            self._send(call.number, data)
            return
        room = self._room[call.number] = Semaphore(MOST_AHEAD)
        head: Head | None = Head(call.number, handler.described.returns, streamed=True)
        try:
            async with aclosing(handler.parts(request)) as items:
                async for item in items:
                    if caller.ended:
                        break  # the generator has not heeded its cancellation
                    if head is not None:  # an error before this has a status of its own
                        self._wire.send(head)
                        head = None
                    await room.acquire()
                    self._send(call.number, event_text(item))
            if head is not None:
                self._wire.send(head)
        finally:
            del self._room[call.number]

    def _send(self, number: int, data: bytes) -> None:
        if len(data) <= INLINE_BYTES:
            self._wire.send(Data(number, len(data), memoryview(data)))
        else:
            self._wire.send(Data(number, len(data)), in_memory(data))


def _reason(error: BaseException | None) -> tuple[str, str, dict[str, Any]]:
    """Return the kind of problem, the text and the members of an error of a call."""
    match error:
        case None:
            return "", "", {}
        case Refused():
            return error.slug, str(error), {}
        case BadRequest():
            return "refused-by-model", str(error), {}
        case StepError():
            return error.kind, str(error), error.members
        case asyncio.CancelledError():
            return "cancelled", "", {}
        case _:
            return FAILED, "".join(traceback.format_exception(error)), {}


def _beginning(text: str) -> str:
    """Return as much of a text as fits a message."""
    return encodable(text).encode()[:MOST_TEXT].decode(errors="ignore")


def _tail(text: str) -> str:
    """Return the end of a traceback, which says most."""
    return encodable(text).encode()[-MOST_TEXT:].decode(errors="ignore")


async def serve(sock: int, link: Sequence[int]) -> None:
    """Run calls until home closes the socket. `link`: the descriptors of the far end of a link."""
    child = Child(socket.socket(fileno=sock), link)
    await child.ended.wait()


def main() -> None:
    """Join home and run."""
    parent, *descriptors = map(int, sys.argv[2:])
    del sys.argv[1:]
    join_home(parent)
    mark_lines()
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    uvloop.run(serve(descriptors[0], descriptors[1:]))


if __name__ == "__main__":
    main()
