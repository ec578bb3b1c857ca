"""Handlers whose requests say what they do. Files are gates: a handler writes one, and waits for another."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Annotated

import msgspec

from cobatch import BadRequest, Response


class Ask(msgspec.Struct):
    """What to do, and with what."""

    do: str = "answer"
    text: str = ""


class Told(msgspec.Struct):
    """The text, and the process that answered."""

    text: str
    process: int


class Asked:
    """An asynchronous handler."""

    async def handle(self, ask: Ask) -> Told:
        """Do what is asked."""
        match ask.do:
            case "refuse":
                raise BadRequest(ask.text)
            case "fail":
                raise ValueError(ask.text)
            case "exit":
                os._exit(3)
            case "abort":
                os.kill(os.getpid(), signal.SIGABRT)
            case "wait":
                await asyncio.Event().wait()
            case "hold":
                time.sleep(3600)  # noqa: ASYNC251 - a handler that holds the loop
            case "print":
                print(ask.text)
        return Told(ask.text, os.getpid())


class Backwards:
    """A handler in a thread, of any bytes."""

    def handle(self, data: bytes) -> bytes:
        """Return the bytes in reverse."""
        return data[::-1]


class Picture:
    """Bytes of certain types in, a response of its own type out."""

    async def handle(self, picture: Annotated[bytes, "image/png", "image/jpeg"]) -> Response:
        """Return it again."""
        return Response(picture, "image/png")


class Words:
    """A stream of the words of a text; it fails at the word "fail", and waits at "wait"."""

    async def handle(self, text: str) -> AsyncIterator[str]:
        """Yield the words."""
        try:
            for word in text.split(" "):
                if word == "fail":
                    raise ValueError(word)
                if word == "wait":
                    await asyncio.Event().wait()
                yield word
        finally:
            print("the stream is closed")


class Count:
    """A stream of a plain generator."""

    def handle(self, most: int) -> Iterator[int]:
        """Count."""
        yield from range(most)


class TwoArguments:
    """No handler."""

    def handle(self, one: int, two: int) -> int:
        """Add."""
        return one + two
