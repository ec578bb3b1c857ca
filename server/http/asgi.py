"""Bodies and replies through ASGI: a body read within its limit, a reply sent.

A body takes memory that all bodies share (`server.http.body_memory`) before it is kept.
"""

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Protocol

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from cobatch.server.http.body import Body, decompress, joined, measure
from cobatch.server.http.body_memory import FREE_BYTES, BodyMemory
from cobatch.server.http.problem import no_memory, too_large
from cobatch.server.http.reply import LONG_BYTES, PART_BYTES, Reply

_PLAIN = (b"", b"identity")
# In an ASGI scope: the kind of problem in the response, for the record.
PROBLEM = "cobatch.problem"


class MemoryTaker(Protocol):
    """A request that takes memory for its decompressed body. `held`: bytes of the body as it came."""

    async def take_memory(self, size: int, held: int) -> None: ...


async def read_body(
    headers: Mapping[bytes, bytes], receive: Receive, limit: int, request: MemoryTaker | None
) -> Body:
    """Return the whole body, decompressed; at most `limit` bytes before and after.

    `request`: None if the limit is at most FREE_BYTES. Raises Problem, and ClientDisconnect if the body
    is not complete.
    """
    length = limit
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and (len(declared) > 18 or (length := int(declared)) > limit):
        raise too_large(int(declared[:18]), limit)
    body: Body = b""
    end = 0
    more_body = True
    while more_body:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientDisconnect
        data = message.get("body", b"")
        end += len(data)
        if end > length:
            raise too_large(end, length)
        body = joined(body, data, end, length) if body else data
        more_body = message.get("more_body", False)
    if end < length:
        body = body[:end]  # of the buffer
    coding = headers.get(b"content-encoding")
    if coding is None or (coding := coding.strip().lower()) in _PLAIN:
        return body
    # In threads: decompressing a small body can take a large part of a second.
    length = await asyncio.to_thread(measure, body, coding, limit)
    if length > FREE_BYTES:
        assert request is not None
        await request.take_memory(length, len(body))
    return await asyncio.to_thread(decompress, body, coding, length)


class Share:
    """The memory of one request beside that of its connection: for its body, decompressed."""

    def __init__(self, memory: BodyMemory, address: str) -> None:
        self.address = address
        self._memory = memory
        self._size = 0
        self._wanted = 0
        self._served: asyncio.Future[None] | None = None

    async def take(self, size: int, receive: Receive, timeout_s: float, *, waits: bool) -> None:
        """Take memory; wait for it if the request has none yet. Raises Problem, ClientDisconnect."""
        self._wanted = size
        if self._memory.take(self.address, size, first=waits):
            self._size = size
            return
        if not waits or not self._memory.wait(self, size):
            raise no_memory(0.0)
        self._served = asyncio.get_running_loop().create_future()
        # After the body, the only message is that the client has disconnected.
        left = asyncio.ensure_future(receive())
        both = (self._served, left)
        try:
            await asyncio.wait(both, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            self._memory.forget(self)
        if not self._size:
            raise ClientDisconnect if left.done() else no_memory(timeout_s)

    def on_body_memory(self) -> None:
        """Go on: the memory is taken."""
        self._size = self._wanted
        assert self._served is not None
        self._served.set_result(None)

    def give_back(self) -> None:
        """Return the memory that was taken."""
        if self._size:
            self._memory.give_back(self.address, self._size)


def note_problem(scope: Scope, slug: str) -> None:
    """Note the kind of problem that a request through ASGI is answered with, if there is one."""
    if slug:
        scope[PROBLEM] = slug


async def send_reply(reply: Reply, scope: Scope, send: Send) -> None:
    """Send a whole reply through ASGI. (`server.edge.asgi` has its own, faster way.)"""
    note_problem(scope, reply.slug)
    await send({"type": "http.response.start", "status": reply.status, "headers": reply.header_list()})
    await send_body(reply, send)


async def send_body(reply: Reply, send: Send) -> None:
    """Send a body through ASGI: joined, or in parts if it is long, each let go once it is written.

    `send` waits only for slow clients, so others get their turn here.
    """
    if reply.length < LONG_BYTES:
        await send({"type": "http.response.body", "body": b"".join(reply.body)})
        return
    pieces = deque(reply.body)
    reply.body = ()
    while pieces:
        piece = pieces.popleft()
        for at in range(0, len(piece), PART_BYTES):
            part = bytes(piece[at : at + PART_BYTES])
            await send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(0)
    await send({"type": "http.response.body", "body": b""})
