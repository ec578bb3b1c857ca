"""A thread for users' code that is no coroutine."""

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class CallThread:
    """Runs one function at a time, each in the context of its call."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "cobatch-handler")

    async def run(self, function: Callable[..., Any], *arguments: object) -> Any:
        """Run a function in the thread. If the call is cancelled meanwhile, its end is waited for."""
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._executor, context.run, _run, function, *arguments)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            raise


def _run(function: Callable[..., Any], *arguments: object) -> Any:
    try:
        return function(*arguments)
    except StopIteration as error:  # with which a future would never be done
        raise RuntimeError("the handler raised StopIteration") from error
