"""HTTP/1.1 by hand: requests as bytes, and answers read without the server's own code."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Self

ANSWER_S = 60.0


class LostError(Exception):
    """The connection ended, or stalled, before its answer was complete."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete response; the names of its headers are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, address: str, source: str | None = None) -> Self:
        """Connect to HOST:PORT; `source` is the client's own address."""
        host, _, port = address.rpartition(":")
        local = None if source is None else (source, 0)
        reader, writer = await asyncio.open_connection(host, int(port), local_addr=local, limit=1 << 26)
        return cls(reader, writer)

    def send(self, data: bytes) -> None:
        """Write; nothing waits for the bytes to leave."""
        self._writer.write(data)

    async def answer(self, head: bool = False) -> Answer:
        """Read the next response, with `head` one to a HEAD request. Raises LostError."""
        try:
            async with asyncio.timeout(ANSWER_S):
                return await _read_answer(self._reader, head)
        except (TimeoutError, asyncio.IncompleteReadError, OSError) as error:
            raise LostError(repr(error)) from None

    async def rest(self) -> bytes:
        """Return all bytes until the server closes the connection. Raises LostError."""
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self._reader.read()
        except (TimeoutError, OSError) as error:
            raise LostError(repr(error)) from None

    def leave(self, reset: bool = False) -> None:
        """End the connection."""
        if reset:
            self._writer.transport.abort()
        else:
            self._writer.close()


async def _read_answer(reader: asyncio.StreamReader, head: bool) -> Answer:
    start = await reader.readuntil(b"\r\n\r\n")
    if start.startswith(b"HTTP/1.1 100 "):
        start = await reader.readuntil(b"\r\n\r\n")
    first, *lines = start[:-4].decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    length = 0 if head else int(headers.get("content-length", "0"))
    return Answer(int(first.split(" ", 2)[1]), headers, await reader.readexactly(length))


async def ask(address: str, data: bytes, source: str | None = None) -> Answer:
    """Send one request on a connection of its own; return its answer. Raises LostError."""
    client = await Client.connect(address, source)
    try:
        client.send(data)
        return await client.answer(head=data.startswith(b"HEAD "))
    finally:
        client.leave()


def post(target: str, body: bytes, *fields: str, method: str = "POST") -> bytes:
    """Return a request with a body. `fields` are header lines."""
    lines = [f"{method} {target} HTTP/1.1", "Host: trial", f"Content-Length: {len(body)}", *fields]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def get(target: str, *fields: str) -> bytes:
    """Return a GET."""
    return "\r\n".join([f"GET {target} HTTP/1.1", "Host: trial", *fields, "", ""]).encode("latin-1")
