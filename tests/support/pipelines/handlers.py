"""Handlers whose requests say what they do. Files are gates: a handler writes one, and waits for another."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from cobatch import BadRequest, Response, StepError
from cobatch.server.http.problem import Problem


class Ask(msgspec.Struct):
    """What to do, and with what."""

    do: str = "answer"
    text: str = ""


class Told(msgspec.Struct):
    """The text, and the process that answered."""

    text: str
    process: int


def note(path: str) -> None:
    """Add a line to a file."""
    with Path(path).open("a") as file:
        file.write("begun\n")


class Leave(BaseException):
    """No `Exception`."""


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
            case "note":
                note(ask.text)
                await asyncio.Event().wait()
            case "wait":
                await asyncio.Event().wait()
            case "leave":
                raise Leave(ask.text)
            case "hold":
                time.sleep(3600)  # noqa: ASYNC251 - a handler that holds the loop
            case "print":
                print(ask.text)
            case "problem":
                error = StepError("gate", Problem("expired", "too late"))
                error.kind, _, member = ask.text.partition(" ")
                error.members = {member: 1} if member else {}
                raise error
        return Told(ask.text, os.getpid())


class Backwards:
    """A handler in a thread, of any bytes."""

    def handle(self, data: bytes) -> bytes:
        """Return the bytes in reverse."""
        if data == b"stop":
            raise StopIteration
        return data[::-1]


class Gated:
    """A handler in a thread that waits for a file's writer."""

    def handle(self, path: str) -> str:
        """Return what the file has."""
        return Path(path).read_text()


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


class Numbers(msgspec.Struct):
    """Three numbers."""

    values: list[float]


class Summed:
    """A model in Python with requests of its own shape. Only its own process has loaded it."""

    inputs = {"x": ("FP32", [-1, 3])}
    outputs = {"y": ("FP32", [-1, 1])}
    factor = 0.0

    def load(self) -> None:
        """Set the factor."""
        self.factor = 2.0

    def load_requests(self) -> None:
        """Set the unit."""
        self.unit = "kg"

    def preprocess(self, numbers: Numbers) -> dict[str, object]:
        """Return a row."""
        if not numbers.values:
            raise BadRequest("no numbers")
        if numbers.values[0] < 0:
            raise ArithmeticError
        return {"x": np.array(numbers.values, np.float32)}

    def predict(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the sums."""
        return {"y": batch["x"].sum(1, keepdims=True) * np.float32(self.factor)}

    async def postprocess(self, row: dict[str, np.ndarray]) -> str:
        """Return the sum in words."""
        return f"{row['y'][0]:g} {self.unit}, {self.factor:g}"


class Plain:
    """A model whose answers alone have their own shape."""

    inputs = {"x": ("FP32", [-1, 2])}
    outputs = {"y": ("FP32", [-1, 2])}

    def predict(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the rows."""
        return {"y": batch["x"]}

    def postprocess(self, row: dict[str, np.ndarray]) -> float:
        """Return the first number."""
        return float(row["y"][0])


class Quotes:
    """A handler that fails with the text that it was sent."""

    async def handle(self, text: str) -> str:
        """Refuse, or fail."""
        if text.startswith("refuse"):
            raise BadRequest(text)
        if text.startswith("broken"):
            raise Unprintable
        raise ValueError(text)


class Unprintable(BadRequest):
    """A refusal without a text."""

    def __str__(self) -> str:
        """Fail."""
        raise ZeroDivisionError


class Stubborn:
    """A stream that does not heed its cancellation."""

    async def handle(self, most: int) -> AsyncIterator[int]:
        """Count."""
        for number in range(most):
            try:
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                print("not heeded")
            yield number


class Strange:
    """A handler whose description no message holds."""

    async def handle(self, number: Annotated[int, msgspec.Meta(title="x" * 400_000)]) -> int:
        """Return it."""
        return number
