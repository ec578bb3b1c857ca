"""Handlers that use the model `gate`: requests say how."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import msgspec
import numpy as np

from cobatch import StepError, model
from cobatch.engines.link.messages import Release
from cobatch.server.links.steps import CALLER


class Ask(msgspec.Struct):
    """What to do, with how many steps, each with one row of this value and width."""

    do: str = "steps"
    count: int = 1
    value: int = 1
    width: int = 1


class Told(msgspec.Struct):
    """The first number of each step's output, and the kinds of problems that were caught."""

    numbers: list[int]
    kinds: list[str] = []


class Steps:
    """An asynchronous handler."""

    gate = model("gate")

    async def handle(self, ask: Ask) -> Told:
        """Run steps, or fail at it."""
        x = np.full((1, ask.width), ask.value, np.int64)
        if ask.do == "float":
            await self.gate(x=x.astype(np.float32))
        if ask.do == "shape":
            await self.gate(x=x[None])
        if ask.do == "unknown":
            await model("gote")(x=x)
        if ask.do == "garble":
            caller: Any = CALLER.get()
            caller.link._uplink.send(Release((12_345,)))  # a block that there is not
            await asyncio.Event().wait()
        steps = [asyncio.ensure_future(self.gate(x=x + n)) for n in range(ask.count)]
        if ask.do == "exit":
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_later(0.05, os._exit, 3)  # with the steps in home
        answers = await asyncio.gather(*steps, return_exceptions=ask.do == "catch")
        kinds = [one.kind for one in answers if isinstance(one, StepError)]
        return Told([int(one["y"].flat[0]) for one in answers if isinstance(one, dict)], kinds)


class Blocking:
    """A handler in a thread."""

    gate = model("gate")

    def handle(self, ask: Ask) -> Told:
        """Run steps one after another."""
        x = np.full((1, ask.width), ask.value, np.int64)
        return Told([int(self.gate.run(x=x + n)["y"].flat[0]) for n in range(ask.count)])
