"""The runner: the batcher and the workers of one function on one event loop.

A runner belongs to its loop: it is an attribute of it, so that both go together. It ends in the loop's
`shutdown_asyncgens`, which `asyncio.run`, `asyncio.Runner` and servers call before they close the loop; else
when the loop is garbage.
"""

from __future__ import annotations

import asyncio
import weakref
from asyncio import Future
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import BatcherError
from cobatch.batcher.lane import BatchWorker
from cobatch.batcher.library.call import Call, Gathered, Pending
from cobatch.batcher.library.statistics import Ledger
from cobatch.batcher.library.workers import TaskWorker, ThreadWorker
from cobatch.batcher.request import State
from cobatch.batcher.tenant import Tenant
from cobatch.engines.function import FunctionEngine
from cobatch.engines.python.pickled import PickledEngine, Reference

_ATTRIBUTE = "_cobatch_runners"
# Tenants known by name before idle ones are forgotten.
_TENANTS_KEPT = 1024
# A thread ends in microseconds; a process has two seconds for its end.
_JOIN_S = 10.0


@dataclass(frozen=True)
class Plan:
    """The options of a batched function; see `cobatch.batched`.

    `coroutine`: it is a coroutine function. `reference`: of one that runs in a process.
    """

    name: str
    coroutine: bool
    reference: Reference | None
    stack: bool
    max_batch_size: int
    max_queue: int
    max_delay_ms: float
    latency_target_ms: float | None
    timeout: float | None
    execution_timeout_ms: float | None
    concurrency: int


class Runner:
    """Runs a function on one event loop. `clock` is the batcher's."""

    def __init__(self, plan: Plan, function: Callable[[Any], Any], loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._plan = plan
        self._function = function
        self._workers: list[ThreadWorker | TaskWorker] = []
        self.batcher = Batcher(
            plan.name,
            [self._make() for _ in range(plan.concurrency)],
            max_queue_rows=plan.max_queue,
            max_delay_ms=plan.max_delay_ms,
            latency_target_ms=plan.latency_target_ms,
            execution_timeout_ms=plan.execution_timeout_ms,
            on_lost=self._replace,
            opened=plan.reference is None,
            loop=loop,
        )
        for worker in self._workers:
            self._start(worker)
        self.pending = Pending(loop, self.leave)
        self.closed = False
        self._tenants: dict[str, Tenant] = {}
        self._most_tenants = _TENANTS_KEPT

    def _make(self) -> ThreadWorker | TaskWorker:
        plan, function = self._plan, self._function
        most = plan.max_batch_size
        if plan.reference is None:
            engine = FunctionEngine(function, plan.name, max_batch_size=most, stack=plan.stack)
        else:
            engine = PickledEngine(plan.reference, most)
        worker: ThreadWorker | TaskWorker
        if plan.coroutine:
            worker = TaskWorker(engine, plan.name, function, self.loop)
        else:
            worker = ThreadWorker(engine, plan.name)
        self._workers.append(worker)
        return worker

    def _start(self, worker: ThreadWorker | TaskWorker) -> None:
        """Start a worker. One with a process is used when that has started, which takes a while."""
        if isinstance(worker, ThreadWorker) and self._plan.reference is not None:
            worker.ready = partial(self.loop.call_soon_threadsafe, self.batcher.use, worker)
        worker.start()

    def _replace(self, lost: BatchWorker, _error: BatcherError) -> None:
        """Open another worker in place of one whose run does not end, or whose process has ended. A thread
        ends after its run."""
        for worker in [worker for worker in self._workers if worker is lost]:
            self._workers.remove(worker)
            worker.stop()
            worker.engine.kill()
        worker = self._make()
        if self._plan.reference is None:
            self.batcher.use(worker)
        self._start(worker)

    def flush(self) -> None:
        """Queue the pending calls, in requests that fill batches."""
        pending, self.pending = self.pending, Pending(self.loop, self.leave)
        items, futures = pending.take()
        queue, at = self.batcher.queue, 0
        while at < len(items):
            end = at + queue.full_rows - queue.rows % queue.full_rows
            self._enter(items[at:end], futures[at:end], pending)
            at = end

    def _enter(self, items: list[Any], futures: list[Future[Any]], pending: Pending) -> None:
        if len(items) > 1:
            gathered = Gathered(items, futures, pending)
            pending.requests.append(gathered)
            gathered.enter(self.batcher.submit)
            return
        call = Call(items[0], futures[0])
        pending.requests.append(call)
        try:
            self.batcher.submit(call)
        except BatcherError as error:
            call.error = error
            call.done()

    def leave(self, pending: Pending) -> None:
        """Note that the caller of a plain call was cancelled; drop requests that are for none any more."""
        counters = self.batcher.counters
        counters.cancelled += 1
        pending.left += 1
        for request in list(pending.requests):
            if request.state in (State.QUEUED, State.RUNNING) and all(
                future.done() for future in request.futures
            ):
                counters.cancelled -= request.callers  # they are counted together
                self.batcher.cancel(request)
                if isinstance(request, Gathered):
                    request.drop()

    def tenant(self, name: str) -> Tenant:
        """Return the account of the tenant of this name."""
        tenant = self._tenants.get(name)
        if tenant is None:
            if len(self._tenants) >= self._most_tenants:
                now_s = self.loop.time()
                self._tenants = {name: one for name, one in self._tenants.items() if not one.idle(now_s)}
                self._most_tenants = max(_TENANTS_KEPT, 2 * len(self._tenants))
            tenant = self._tenants[name] = Tenant(name)
        return tenant

    def stop(self) -> None:
        """End the workers; one whose batch runs ends after it."""
        for worker in self._workers:
            worker.stop()

    async def close(self) -> None:
        """Fail the calls that are left, and end the workers: a process at once, a thread after its run."""
        self.closed = True
        idle = self.batcher.lanes and not self.batcher.running_batches
        self.flush()
        await self.batcher.drain(0.0)
        self.stop()
        if self._plan.reference is not None:
            for worker in [] if idle else self._workers:
                worker.deliver = None  # its calls have failed
                worker.engine.kill()
            await asyncio.to_thread(self._join)
        elif idle:
            self._join()

    def _join(self) -> None:
        for worker in self._workers:
            worker.join(_JOIN_S)


class Core:
    """A function, or the method of one object, on any number of event loops.

    `pending`: the newest plain calls, until they are queued. `always_alone`: each call is a request of its
    own.
    """

    def __init__(self, plan: Plan, function: Callable[[Any], Any], *ledgers: Ledger) -> None:
        self.plan = plan
        self.always_alone = plan.stack or plan.timeout is not None
        self.pending: Pending | None = None
        self._function = function
        self._ledgers = ledgers

    def runner(self) -> Runner:
        """Return the runner on the running event loop; the first call starts it."""
        loop = asyncio.get_running_loop()
        runners = _LoopRunners.of(loop)
        runner = runners.get(self)
        if runner is None:
            runner = Runner(self.plan, self._function, loop)
            runners.add(self, runner)
            for ledger in self._ledgers:
                ledger.open(runner.batcher.counters, weakref.ref(runner))
        return runner

    def gather(self) -> Pending:
        """Return the plain calls of this iteration of the running event loop, which are queued at its end.

        Event loops of several threads may take turns in `pending`.
        """
        runner = self.runner()
        self.pending = pending = runner.pending
        if not pending.items:
            runner.loop.call_soon(self._flush, runner)
        return pending

    def _flush(self, runner: Runner) -> None:
        self.pending = None  # it refers to the loop
        runner.flush()


class _LoopRunners:
    """The runners of one event loop, by the number (`id`) of the core; they end with core or loop."""

    def __init__(self) -> None:
        self._runners: dict[int, tuple[weakref.ref[Core], Runner]] = {}
        self._end = self._until_shutdown()
        with suppress(StopIteration):
            self._end.__anext__().send(None)  # to its `yield`, so that the loop knows it

    @staticmethod
    def of(loop: asyncio.AbstractEventLoop) -> _LoopRunners:
        """Return the runners of the running event loop."""
        attributes = vars(loop)
        runners = attributes.get(_ATTRIBUTE)
        if runners is None:
            runners = attributes[_ATTRIBUTE] = _LoopRunners()
        assert isinstance(runners, _LoopRunners)
        return runners

    def get(self, core: Core) -> Runner | None:
        """Return a core's runner, None if it has none here."""
        known = self._runners.get(id(core))
        return known[1] if known is not None else None

    def add(self, core: Core, runner: Runner) -> None:
        """Add a core's runner."""
        runners, number = self._runners, id(core)

        def end(_: weakref.ref[Core]) -> None:
            _, runner = runners.pop(number)  # without its core it has no calls
            with suppress(RuntimeError):  # the loop is closed
                runner.loop.call_soon_threadsafe(runner.stop)  # any thread may drop it

        runners[number] = weakref.ref(core, end), runner

    async def _until_shutdown(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            closing = [runner for _, runner in list(self._runners.values())]
            self._runners.clear()
            vars(asyncio.get_running_loop()).pop(_ATTRIBUTE, None)
            for runner in closing:
                await runner.close()
