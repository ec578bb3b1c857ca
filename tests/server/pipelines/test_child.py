"""The child of a pool, without a process: calls that are cancelled, or end in the middle of a stream."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cobatch.server.links.steps import Caller
from cobatch.server.pipelines.call import Begun, Call, Cancel, End, ToHome, decode_to_home
from cobatch.server.pipelines.child import Child
from cobatch.server.pipelines.handler import Handler
from cobatch.server.pipelines.wire import Wire


async def streamed(handle: Any) -> asyncio.Task[None]:
    """Begin a call whose client reads nothing."""
    home, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    no_link: Any = None
    with home:
        child = Child(far, ())
        child._handler = Handler(handle, "handle")
        task = asyncio.create_task(child._answer(Call(1, "text/plain", 1, memoryview(b"a")), Caller(no_link)))
        await asyncio.sleep(0)
        return task


async def test_a_cancelled_stream_has_closed_its_generator_when_it_ends() -> None:
    closed, waits = asyncio.Event(), asyncio.Event()

    async def handle(text: str) -> AsyncIterator[str]:
        try:
            while True:
                yield text
                waits.set()
        finally:
            await asyncio.sleep(0)
            closed.set()

    task = await streamed(handle)
    await waits.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed.is_set()


async def test_an_item_that_cannot_be_encoded_closes_the_generator() -> None:
    closed = asyncio.Event()

    async def handle(text: str) -> AsyncIterator[object]:
        try:
            yield object()
        finally:
            await asyncio.sleep(0)
            closed.set()

    with pytest.raises(TypeError, match="object cannot be encoded"):
        await (await streamed(handle))
    assert closed.is_set()


async def test_a_call_that_is_cancelled_at_once_has_its_end() -> None:
    async def handle(text: str) -> None:
        await asyncio.Event().wait()

    home, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    told: asyncio.Queue[ToHome] = asyncio.Queue()
    wire: Wire[Any, ToHome] = Wire(home, decode_to_home, told.put_nowait, lambda why: None)
    child = Child(far, ())
    child._handler = Handler(handle, "handle")
    no_link: Any = object()
    child._steps = no_link
    child._on_message(Call(1, "text/plain", 1, memoryview(b"a")))
    child._on_message(Cancel(1))
    assert await told.get() == Begun(1)
    end = await told.get()
    assert isinstance(end, End)
    assert end.slug == "cancelled"
    wire.close()
    child._wire.close()
