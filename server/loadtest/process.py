"""A generator's process: runs trials that are told through a pipe, and tells what came of them."""

from __future__ import annotations

import asyncio
import gc
import signal
import ssl
import sys
import threading
from multiprocessing.connection import Connection as Pipe
from typing import Any

from cobatch.server.loadtest.drivers import Driver
from cobatch.server.loadtest.generator import ClosedLoop, OpenLoop
from cobatch.server.loadtest.messages import Failed, Plan, Ready, Start, Stop, Trial
from cobatch.server.loadtest.target import reason


def main(pipe: Pipe, plan: Plan, number: int, processes: int) -> None:
    """Serve until the pipe is closed. `number`: which of the `processes` this is, from 0."""
    # Ctrl-C ends the trial, through the pipe, and not this process before it has told its last.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()
    loops: Any = asyncio
    if sys.platform != "win32":
        import uvloop as loops  # noqa: PLC0415 - there is none on Windows
    loops.run(_Process(pipe, plan, number, processes).serve())


class _Process:
    def __init__(self, pipe: Pipe, plan: Plan, number: int, processes: int) -> None:
        self._pipe = pipe
        self._plan = plan
        self._number = number
        self._processes = processes
        self._orders: asyncio.Queue[Trial | Start | None] = asyncio.Queue()
        self._driver: Driver | None = None

    async def serve(self) -> None:
        """Until the pipe is closed."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_exception)
        # A thread, since an event loop that waits for the pipe would make writing to it non-blocking too.
        threading.Thread(target=self._listen, args=(loop,), name="orders", daemon=True).start()
        while True:
            order = await self._orders.get()
            if order is None:
                return
            if isinstance(order, Trial):
                await self._run(order)

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        order: Trial | Start | Stop | None = Stop()
        while order is not None:
            try:
                order = self._pipe.recv()
            except (EOFError, OSError):
                order = None
            loop.call_soon_threadsafe(self._heard, order)

    def _heard(self, order: Trial | Start | Stop | None) -> None:
        if not isinstance(order, Stop):
            self._orders.put_nowait(order)
        if self._driver is not None and not isinstance(order, Start):
            self._driver.stop()

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A defect of ours: a trial that goes on without its callback would never end."""
        loop.default_exception_handler(context)
        self._tell(Failed(f"the generator failed: {context.get('exception') or context['message']}"))

    async def _run(self, trial: Trial) -> None:
        try:
            driver = self._drive(trial)
            await driver.prepare()
        except (OSError, ssl.SSLError) as error:
            self._tell(Failed(f"cannot connect: {reason(error)}"))
            return
        self._driver = driver
        self._tell(Ready())
        start = await self._orders.get()
        if isinstance(start, Start):
            await driver.run(start.at_s)
        else:
            self._orders.put_nowait(None)
        self._driver = None

    def _drive(self, trial: Trial) -> Driver:
        # Of what does not divide, the first processes get one more.
        share, more = divmod(trial.connections, self._processes)
        connections = share + (self._number < more)
        if trial.arrivals is None:
            return ClosedLoop(self._plan, trial, connections, self._tell, self._number)
        return OpenLoop(self._plan, trial, connections, self._tell, self._number, self._processes)

    def _tell(self, message: object) -> None:
        try:
            self._pipe.send(message)
        except OSError:  # nobody listens any more: the pipe's end is read as well, and ends this process
            if self._driver is not None:
                self._driver.stop()
