"""The generator processes: started, given trials and read through pipes."""

import asyncio
import gc
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic
from typing import Any

from cobatch.server.loadtest.driver import Driver
from cobatch.server.loadtest.generator import ClosedLoop, OpenLoop
from cobatch.server.loadtest.messages import Done, Failed, Plan, Ready, Start, Stop, Trial
from cobatch.server.loadtest.options import BenchError
from cobatch.server.loadtest.statistics import Tally
from cobatch.server.loadtest.target import reason

_PROGRESS_S = 0.2
_START_DELAY_S = 0.05  # until all processes have received the start time
_JOIN_S = 10.0


class Fleet(ExitStack):
    """Processes that run one trial after another; a context manager."""

    def __init__(self, plan: Plan, processes: int) -> None:
        super().__init__()
        self.callback(self._end)
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Pipe] = []
        self._processes = []
        for number in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_main, args=(theirs, plan, number, processes), name=f"generator-{number}", daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self.interrupted = False

    def _end(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(_JOIN_S)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()

    def run(self, trial: Trial, tally: Tally, on_progress: Callable[[], None]) -> None:
        """Run a trial, counting into `tally` and calling `on_progress` regularly. Raises BenchError.

        Ctrl-C ends it early.
        """
        self._send(trial)
        self._receive_until(Ready, tally, lambda: None)
        start_s, (idle, ticks) = monotonic() + _START_DELAY_S, _cpu_ticks()
        tally.begin(start_s)
        with self._interruptible(tally, start_s):
            self._send(Start(start_s))
            self._receive_until(Done, tally, on_progress)
        idle_now, ticks_now = _cpu_ticks()
        if ticks_now > ticks:
            tally.machine_busy = 1 - (idle_now - idle) / (ticks_now - ticks)

    @contextmanager
    def _interruptible(self, tally: Tally, start_s: float) -> Iterator[None]:
        """Let Ctrl-C stop the trial, and a second one raise KeyboardInterrupt.

        The first must not raise it: where half a message is read, the rest would be taken for the next one.
        """

        def stop(*_: object) -> None:
            signal.signal(signal.SIGINT, before)
            self.interrupted = True
            tally.stopped_s = monotonic() - start_s
            self._send(Stop())

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _send(self, message: object) -> None:
        for number, pipe in enumerate(self._pipes):
            try:
                pipe.send(message)
            except OSError:
                raise self._died(number) from None

    def _receive_until(self, kind: type[object], tally: Tally, on_progress: Callable[[], None]) -> None:
        """Receive messages until each process has sent one of this kind."""
        pending = set(self._pipes)
        progress_s = monotonic()
        while pending:
            for pipe in wait(pending, _PROGRESS_S):
                assert isinstance(pipe, Pipe)
                number = self._pipes.index(pipe)
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    raise self._died(number) from None
                if isinstance(message, Failed):
                    raise BenchError(message.reason)
                tally.take(number, message)
                if isinstance(message, kind):
                    pending.discard(pipe)
            if monotonic() >= progress_s:
                progress_s = monotonic() + _PROGRESS_S
                on_progress()

    def _died(self, number: int) -> BenchError:
        process = self._processes[number]
        process.join(_JOIN_S)
        return BenchError(f"{process.name} ended with status {process.exitcode}; its output is above")


def _cpu_ticks() -> tuple[int, int]:
    """Return idle and total CPU ticks of this machine since boot; zeros where /proc/stat is missing."""
    try:
        ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return 0, 0
    return ticks[3] + ticks[4], sum(ticks)


def _main(pipe: Pipe, plan: Plan, number: int, processes: int) -> None:
    """Run generator process `number`, counted from 0, until the pipe is closed."""
    # Ctrl-C ends the trial through the pipe; the process must still send its last samples.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()
    loops: Any = asyncio
    if sys.platform != "win32":
        import uvloop as loops  # noqa: PLC0415 - does not exist for Windows
    loops.run(_Process(pipe, plan, number, processes).serve())


class _Process:
    """Runs the trials that arrive through the pipe in this process."""

    def __init__(self, pipe: Pipe, plan: Plan, number: int, processes: int) -> None:
        self._pipe, self._plan, self._number, self._processes = pipe, plan, number, processes
        self._orders: asyncio.Queue[Trial | Start | None] = asyncio.Queue()
        self._driver: Driver | None = None

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_exception)
        # A thread, since an event loop that reads the pipe would make writing to it non-blocking too.
        threading.Thread(target=self._listen, args=(loop,), name="orders", daemon=True).start()
        while (order := await self._orders.get()) is not None:
            if isinstance(order, Trial):
                await self._run(order)

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        order: Trial | Start | Stop | None = Stop()
        while order is not None:
            try:
                order = self._pipe.recv()
            except (EOFError, OSError):
                order = None
            loop.call_soon_threadsafe(self._on_order, order)

    def _on_order(self, order: Trial | Start | Stop | None) -> None:
        if not isinstance(order, Stop):
            self._orders.put_nowait(order)
        if self._driver is not None and not isinstance(order, Start):
            self._driver.stop()

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Report a defect of the generator: without the failed callback the trial might never end."""
        loop.default_exception_handler(context)
        self._send(Failed(f"the generator failed: {context.get('exception') or context['message']}"))

    async def _run(self, trial: Trial) -> None:
        try:
            share, rest = divmod(trial.connections, self._processes)
            load = (self._plan, trial, share + (self._number < rest), self._send, self._number)
            driver = ClosedLoop(*load) if trial.arrivals is None else OpenLoop(*load, self._processes)
            await driver.prepare()
        except OSError as error:
            self._send(Failed(f"cannot connect: {reason(error)}"))
            return
        self._driver = driver
        self._send(Ready())
        start = await self._orders.get()
        if isinstance(start, Start):
            await driver.run(start.at_s)
        else:
            self._orders.put_nowait(None)
        self._driver = None

    def _send(self, message: object) -> None:
        try:
            self._pipe.send(message)
        except OSError:  # the main process is gone; the reading thread sees it too and ends this process
            if self._driver is not None:
                self._driver.stop()
