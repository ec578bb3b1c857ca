"""A pipeline: its pool of processes, and a batcher that gives them calls."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import BatcherError, ExecutionTimeoutError
from cobatch.batcher.lane import BatchWorker
from cobatch.engines.base import Signature, available_cores
from cobatch.engines.errors import EngineError, EngineLoadError
from cobatch.server.http.problem import Problem
from cobatch.server.inference.reloading import Backoff, changes
from cobatch.server.links.hub import Hub
from cobatch.server.links.step_end import LinkedModel
from cobatch.server.observability.traffic import Traffic
from cobatch.server.pipelines.call import Described, Start
from cobatch.server.pipelines.process import PoolProcess
from cobatch.server.pipelines.request import PipelineRequest
from cobatch.server.pipelines.seat import Seat
from cobatch.server.settings.schema import PipelineSettings

log = logging.getLogger("cobatch.model")


class Pipeline:
    """A pipeline of this process. `batcher` and `content` are None until a process is loaded.

    `on_ready` is called when a process was started again. `around`: the signature of the model in Python of
    the same name, if it is the code before and after that.
    """

    def __init__(
        self,
        settings: PipelineSettings,
        models: tuple[LinkedModel, ...],
        hub: Hub,
        around: Signature | None = None,
    ) -> None:
        self.name = settings.name
        self.settings = settings
        self.path = f"/v1/models/{settings.name}/infer"
        self.traffic = Traffic()
        self.batcher: Batcher | None = None
        self.content: Described | None = None
        self.load_error: EngineError | None = None
        self._start = Start(settings.python, settings.python_path, models)
        if around is not None:
            batched = all(spec.batched for spec in around.inputs)
            datatypes = {spec.name: spec.datatype for spec in around.inputs}
            self._start = msgspec.structs.replace(
                self._start, around=self.name, datatypes=datatypes, batched=batched
            )
        self.on_ready: Callable[[], None] = lambda: None
        self._hub = hub
        self._processes: list[PoolProcess] = []
        self._backoff = Backoff()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def load(self) -> None:
        """Start the processes, and begin to accept calls. Raises EngineError."""
        count = self.settings.processes or available_cores()
        try:
            for _ in range(count):
                self._processes.append(self._open())
            described = await asyncio.gather(
                *[process.described() for process in self._processes], return_exceptions=True
            )
            for one in described:
                if isinstance(one, BaseException):
                    raise one
                self.content = one
        except EngineError as error:
            self.load_error = error
            await asyncio.gather(*[process.stop() for process in self._processes])
            raise
        limit_ms = self.settings.execution_timeout_ms
        self.batcher = Batcher(
            self.name,
            [seat for process in self._processes for seat in self._seats_of(process)],
            max_queue_rows=self.settings.max_queue,
            execution_timeout_ms=limit_ms,
            on_lost=self._on_lost,
            loop=asyncio.get_running_loop(),
        )
        if self._start.around:
            self.batcher.name = f"{self.name}, its requests"  # for observers: the model has that name
        for process in self._processes:
            self._look_after(process)
        log.info("pipeline %s: ready (%d processes of %d calls)", self.name, count, self._concurrency)
        if self.settings.reload:
            self._start_task(self._load_again())

    @property
    def _concurrency(self) -> int:
        assert self.content is not None
        return self.settings.concurrency if self.content.concurrent else 1

    def _open(self) -> PoolProcess:
        return PoolProcess(self.name, self._start, self._hub, self._on_end)

    def _seats_of(self, process: PoolProcess) -> list[Seat]:
        process.on_seat = self._use
        return process.make_seats(self._concurrency)

    def _use(self, seat: Seat) -> None:
        self.loaded_batcher.use(seat)

    def submit(self, request: PipelineRequest) -> None:
        """Queue a call, or raise why it is refused. It fails at the end of its timeout, also if it runs."""
        timeout_s = request.timeout_s
        if timeout_s is None and self.settings.deadline_ms is not None:
            timeout_s = self.settings.deadline_ms / 1000
        # The batcher would refuse calls by the run times of others, which say little about this one.
        request.timeout_s = None
        self.loaded_batcher.submit(request)
        if timeout_s is not None:
            request.timeout_s = timeout_s
            loop = asyncio.get_running_loop()
            request.expiry = loop.call_later(timeout_s, self.loaded_batcher.end_late, request)

    def cancel(self, request: PipelineRequest) -> None:
        """Drop a call whose client left."""
        self.loaded_batcher.cancel(request)
        request.let_go()
        request.withdraw()

    # Processes that end

    def _on_lost(self, lost: BatchWorker, why: BatcherError) -> None:
        assert isinstance(lost, Seat)
        process = next((one for one in self._processes if lost in one.seats), None)
        if process is not None and isinstance(why, ExecutionTimeoutError):
            assert self.content is not None
            for seat in process.seats:  # until it is known whether the process still runs
                self.loaded_batcher.retire(seat)
            process.give_up(lost, concurrent=self.content.concurrent)

    def _look_after(self, process: PoolProcess) -> None:
        """Start another process in place of one that has ended before it was in the pool."""
        if process.ended:
            self._on_end(process, process.ended)

    def _on_end(self, process: PoolProcess, why: str) -> None:
        if self.batcher is None or self._stopping or process not in self._processes:
            return
        log.error("pipeline %s: a process has ended %s", self.name, why)
        for seat in process.seats:
            self.batcher.retire(seat)
        self._start_task(self._restart(process))

    async def _restart(self, process: PoolProcess) -> None:
        """Start a process in place of one that has ended: at once, or later if that goes on."""
        batcher = self.loaded_batcher
        while process in self._processes:
            delay_s = self._backoff.delay_s(batcher.counters.batches)
            if delay_s:
                batcher.restarting(delay_s)
                await asyncio.sleep(delay_s)
            try:
                await self._replace(process)
            except EngineError as error:
                log.error("pipeline %s: a process cannot be started again: %s", self.name, error)  # noqa: TRY400
            else:
                log.warning("pipeline %s: a process was started again", self.name)
                self.on_ready()

    async def _replace(self, old: PoolProcess) -> bool:
        """Start a process in place of another; False: there is one already. Raises EngineError."""
        new = self._open()
        try:
            described = await new.described()
            if described != self.content:
                raise EngineLoadError("its request or answer has changed; start the server again")
        except (EngineError, asyncio.CancelledError):
            await new.stop()
            raise
        if old not in self._processes:  # it has ended while its files changed
            await new.stop()
            return False
        self._processes[self._processes.index(old)] = new
        for seat in self._seats_of(new):
            self._use(seat)
        self._look_after(new)
        return True

    async def _load_again(self) -> None:
        """Start the processes again each time that files change."""
        try:
            async for _ in changes(self.settings.python_path):
                await self._load_changes()
        except Exception:
            log.exception("pipeline %s: changed files are not loaded any more", self.name)

    async def _load_changes(self) -> None:
        try:
            for place in range(len(self._processes)):
                while not await self._replace(old := self._processes[place]):
                    pass
                self._start_task(self._end(old))
        except EngineError as error:
            text = "pipeline %s: the changed files cannot be loaded: %s"
            log.error(text, self.name, error)  # noqa: TRY400 - the text is for the operator
        else:
            log.info("pipeline %s: loaded again", self.name)

    async def _end(self, old: PoolProcess) -> None:
        """End a process that gets no more calls, after those that it has."""
        for seat in old.seats:
            self.loaded_batcher.retire(seat)
        try:
            await old.idle()
        finally:
            await old.stop()

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # State

    @property
    def traffics(self) -> tuple[Traffic, ...]:
        """All of its calls."""
        return (self.traffic,)

    @property
    def loaded_batcher(self) -> Batcher:
        """The batcher; only if it is not None."""
        assert self.batcher is not None
        return self.batcher

    @property
    def ready(self) -> bool:
        """A call would be accepted, unless the queue is full."""
        batcher = self.batcher
        return batcher is not None and batcher.admission.closed is None and bool(batcher.lanes)

    @property
    def dead(self) -> bool:
        """Never: its processes are started again for ever."""
        return False

    def unavailable(self) -> Problem:
        """Return the problem of a call before it is loaded."""
        if self.load_error is not None:
            return Problem("load-failed", f"pipeline {self.name!r} could not be loaded", model=self.name)
        return Problem(
            "starting", f"pipeline {self.name!r} is being loaded", model=self.name, retry_after_s=1
        )

    async def stop(self, drain_timeout_s: float) -> None:
        """Answer accepted calls, then end the processes."""
        if self.batcher is not None:
            await self.batcher.drain(drain_timeout_s)
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*[process.stop() for process in self._processes])
