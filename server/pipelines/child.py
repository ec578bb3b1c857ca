"""A process of a pipeline's pool: `python -m cobatch.server.pipelines.child NAME PARENT SOCKET ...`.

NAME is for the list of processes; PARENT is home's number, the others are descriptors. It runs the handler's
calls on an event loop, until home closes the socket.
"""

import asyncio
import os
import socket
import sys
import traceback
from asyncio import Semaphore, Task

from cobatch.engines.errors import BadRequest, EngineLoadError
from cobatch.engines.python.child import encodable, join_home
from cobatch.engines.python.model import open_object
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
from cobatch.server.pipelines.running import RUNNING, Running
from cobatch.server.pipelines.wire import INLINE_BYTES, Wire, in_memory


class Child:
    """Runs the calls that home sends."""

    def __init__(self, sock: socket.socket) -> None:
        self.ended = asyncio.Event()
        self._wire: Wire[ToHome, ToChild] = Wire(
            sock, decode_to_child, self._on_message, lambda why: self.ended.set()
        )
        self._handler: Handler | None = None
        self._tasks: dict[int, Task[None]] = {}
        self._room: dict[int, Semaphore] = {}  # for items of streams

    def _on_message(self, message: ToChild) -> None:
        match message:
            case Start():
                self._start(message)
            case Call():
                self._wire.send(Begun(message.number))
                task = asyncio.create_task(self._run(message))
                self._tasks[message.number] = task
            case Cancel():
                if message.number in self._tasks:
                    self._tasks[message.number].cancel()
            case Taken():
                if message.number in self._room:
                    self._room[message.number].release()

    def _start(self, start: Start) -> None:
        try:
            self._handler = handler = Handler(
                open_object(start.source, start.folder, alone=True), start.source
            )
        except EngineLoadError as error:
            self._wire.send(NotLoaded(encodable(str(error)[:MOST_TEXT])))
        else:
            self._wire.send(handler.described)

    async def _run(self, call: Call) -> None:
        running = Running(call)
        RUNNING.set(running)
        slug, text = "", ""
        try:
            await self._answer(call)
        except Refused as refused:
            slug, text = refused.slug, str(refused)
        except BadRequest as refused:
            slug, text = "refused-by-model", str(refused)
        except asyncio.CancelledError:
            slug = "cancelled"
        except Exception:  # noqa: BLE001 - the user's own code
            slug, text = FAILED, traceback.format_exc()[-MOST_TEXT:]
        running.ended = True
        del self._tasks[call.number]
        self._wire.send(End(call.number, slug, encodable(text), steps=tuple(running.steps)))

    async def _answer(self, call: Call) -> None:
        handler = self._handler
        assert handler is not None
        request = handler.request(call)
        if not handler.described.streamed:
            content_type, data = encoded(await handler.answer(request))
            self._wire.send(Head(call.number, content_type, streamed=False))
            self._send(call.number, data)
            return
        room = self._room[call.number] = Semaphore(MOST_AHEAD)
        self._wire.send(Head(call.number, handler.described.returns, streamed=True))
        try:
            async for item in handler.parts(request):
                await room.acquire()
                self._send(call.number, event_text(item))
        finally:
            del self._room[call.number]

    def _send(self, number: int, data: bytes) -> None:
        if len(data) <= INLINE_BYTES:
            self._wire.send(Data(number, len(data), memoryview(data)))
        else:
            self._wire.send(Data(number, len(data)), in_memory(data))


async def serve(descriptor: int) -> None:
    """Run calls until home closes the socket."""
    child = Child(socket.socket(fileno=descriptor))
    await child.ended.wait()


def main() -> None:
    """Join home and run."""
    parent, *descriptors = map(int, sys.argv[2:])
    del sys.argv[1:]
    join_home(parent)
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    asyncio.run(serve(descriptors[0]))


if __name__ == "__main__":
    main()
