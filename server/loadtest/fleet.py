"""The generator's processes, and the machine that they run on."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Self

from cobatch.server.loadtest.errors import BenchError
from cobatch.server.loadtest.messages import Done, Failed, Plan, Ready, Start, Stop, Trial
from cobatch.server.loadtest.process import main
from cobatch.server.loadtest.tally import Tally

_LOOK_S = 0.2
_SOON_S = 0.05  # until all have heard when to begin
_END_S = 10.0


class Fleet:
    """Processes that run one trial after another; a context manager."""

    def __init__(self, plan: Plan, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Pipe] = []
        self._processes = []
        for number in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=main, args=(theirs, plan, number, processes), name=f"generator-{number}", daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self.interrupted = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(_END_S)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()

    def run(self, trial: Trial, tally: Tally, look: Callable[[], None]) -> None:
        """Run it, count into `tally`, call `look` now and then. Ctrl-C ends it early. Raises BenchError."""
        self._tell(trial)
        self._until(Ready, tally, lambda: None)
        began, busy = monotonic() + _SOON_S, Busy()
        tally.begin(began)
        self._tell(Start(began))
        try:
            self._until(Done, tally, look)
        except KeyboardInterrupt:
            self.interrupted = True
            tally.stopped_s = monotonic() - began
            self._tell(Stop())
            self._until(Done, tally, look)
        tally.machine_busy = busy.share()

    def _tell(self, message: object) -> None:
        for number, pipe in enumerate(self._pipes):
            try:
                pipe.send(message)
            except OSError:
                raise self._ended(number) from None

    def _until(self, kind: type[object], tally: Tally, look: Callable[[], None]) -> None:
        """Take what all tell until each has told one of this kind."""
        left = set(self._pipes)
        look_s = monotonic()
        while left:
            for pipe in wait(left, _LOOK_S):
                assert isinstance(pipe, Pipe)
                number = self._pipes.index(pipe)
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    raise self._ended(number) from None
                if isinstance(message, Failed):
                    raise BenchError(message.why)
                tally.take(number, message)
                if isinstance(message, kind):
                    left.discard(pipe)
            if monotonic() >= look_s:
                look_s = monotonic() + _LOOK_S
                look()

    def _ended(self, number: int) -> BenchError:
        process = self._processes[number]
        process.join(_END_S)
        return BenchError(f"{process.name} ended with status {process.exitcode}; its words are above")


class Busy:
    """How busy this machine's cores are, whoever uses them; Linux says it."""

    def __init__(self) -> None:
        self._before = _ticks()

    def share(self) -> float | None:
        """Of all cores' time since then, 0 to 1; None where it is not known."""
        after = _ticks()
        if self._before is None or after is None or after[1] <= self._before[1]:
            return None
        idle, total = (now - then for now, then in zip(after, self._before, strict=True))
        return 1 - idle / total


def _ticks() -> tuple[int, int] | None:
    """Idle and all, since boot."""
    try:
        numbers = [int(one) for one in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    return numbers[3] + numbers[4], sum(numbers)
