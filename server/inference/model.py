"""One served model: its engines' workers, its batcher and its codec, from loading to stopping."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import BatcherError, EngineGoneError, ExecutionTimeoutError
from cobatch.batcher.lane import BatchWorker
from cobatch.engines.base import Endable, Engine, Signature
from cobatch.engines.errors import EngineEndedError, EngineError, EngineLoadError
from cobatch.engines.loader import load_engine
from cobatch.engines.worker import Worker
from cobatch.server.inference.engines import Place, engine_options, places
from cobatch.server.inference.padding import make_padder
from cobatch.server.inference.reloading import Backoff, changes
from cobatch.server.inference.served import ServedModel
from cobatch.server.settings.schema import ModelSettings
from cobatch.server.v2.decode import Decoder
from cobatch.server.v2.encode import Encoder

log = logging.getLogger("cobatch.model")

_JOIN_S = 5.0


class Model(ServedModel):
    """A model whose engines run in this process. `batcher` is None until they are open."""

    batcher: Batcher | None

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__(settings)
        self._signature: Signature | None = None  # the first engine's
        self._workers: dict[Place, Worker] = {}  # the last one that was open at each place
        self._others: set[Worker] = set()  # that open an engine, or end since they were replaced
        self._hung: list[Worker] = []
        self._died: set[Place] = set()  # an engine has died there before
        self._rebuilding = 0
        self._backoff = Backoff()
        self._reopening: set[asyncio.Task[None]] = set()
        self._replacing = asyncio.Lock()  # a model that is loaded again, or starts its process again

    async def load(self) -> None:
        """Open the engines, warm them up and begin to accept requests. Raises EngineError."""
        loop = asyncio.get_running_loop()
        settings = self.settings
        try:
            for place in places(settings):
                self._workers[place] = await self._open(place)
            engine = self.engine_worker.engine
            padder = make_padder(self.name, settings.pad, engine.signature)
        except EngineError as error:
            self.load_error = error
            raise
        self.decoder = Decoder(engine.signature, settings.max_queue_rows, padder)
        self.encoder = Encoder(self.name, self.version, engine.signature)
        self.batcher = Batcher(
            self.name,
            list(self._workers.values()),
            max_queue_rows=settings.max_queue_rows,
            max_delay_ms=settings.max_delay_ms,
            latency_target_ms=settings.latency_target_ms,
            deadline_ms=settings.deadline_ms,
            execution_timeout_ms=settings.execution_timeout_ms,
            on_lost=self._on_lost,
            padder=padder,
            loop=loop,
        )
        self._tell_ready(engine)
        if settings.reload and settings.python is not None:
            self._start(self._load_again())

    def _tell_ready(self, engine: Engine) -> None:
        signature, most = engine.signature, self.settings.max_batch_size
        loud = signature.batching.verdict in ("unproven", "disproved") or signature.fixed_batch == 1
        log.log(
            logging.WARNING if loud else logging.INFO,
            "model %s: batching is %s%s",
            self.name,
            signature.batching_note,
            f" (max_batch_size = {most} is ignored)" if most and not signature.batching.on else "",
        )
        text = "model %s: ready (engines: %d, %s, batches of up to %d rows, full at %d)"
        sizes = engine.max_batch_size, self.loaded_batcher.queue.full_rows
        log.info(text, self.name, len(self._workers), engine.platform, *sizes)

    async def _open(self, place: Place) -> Worker:
        """Return a worker whose engine is open and warm. Raises EngineError."""
        opened: Future[None] = Future()
        settings = self.settings
        first = self._signature
        options = engine_options(settings, place, None if first is None else first.batching)
        engine = load_engine(settings.engine, settings.source, settings.max_batch_size, options)
        worker = Worker(engine, f"{self.name}{place.suffix}")
        if isinstance(engine, Endable):
            engine.on_end = partial(self._on_end, worker, asyncio.get_running_loop())
        self._others = {one for one in self._others if not one.join(0)} | {worker}
        worker.start(partial(_settle, opened))
        await asyncio.wrap_future(opened)
        first = self._signature = first or engine.signature
        if settings.python is not None and engine.signature != first:
            worker.stop()
            raise EngineLoadError("its inputs or outputs have changed; start the server again")
        self._others.discard(worker)
        return worker

    async def _replace(self, place: Place) -> None:
        """Open an engine in place of another, which serves until then if it can. Raises EngineError."""
        old = self._workers[place]
        self._workers[place] = worker = await self._open(place)
        self._others.add(old)
        self.loaded_batcher.use(worker, instead_of=old)
        old.stop()

    def _on_end(self, worker: Worker, loop: asyncio.AbstractEventLoop, error: EngineEndedError) -> None:
        """Note that an engine's process has ended, on another thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._ended, worker, error)

    def _ended(self, worker: Worker, error: EngineEndedError) -> None:
        if self.batcher is not None:
            self.batcher.ended(worker, error)

    def _on_lost(self, lost: BatchWorker, why: BatcherError) -> None:
        assert isinstance(lost, Worker)
        worker, place = lost, next((at for at, one in self._workers.items() if one is lost), None)
        worker.stop()  # ends with its last batch, if that ever ends
        hung = isinstance(why, ExecutionTimeoutError)
        if isinstance(worker.engine, Endable):
            worker.engine.kill(hung=hung)
        if place is None:  # another one serves in its place already
            return
        if isinstance(worker.engine, Endable):
            self._start(self._restart(worker, place))
        elif hung:
            # Its thread cannot be ended, but another engine can take its place.
            self._hung.append(worker)
            self._start(self._reopen(place, "a run that did not end"))
        elif place not in self._died:
            # Once per place: a cause that kills each engine would kill the next one too.
            self._died.add(place)
            self._start(self._rebuild(worker, place))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._reopening.add(task)
        task.add_done_callback(self._reopening.discard)

    async def _rebuild(self, worker: Worker, place: Place) -> None:
        async with self._rebuilds():
            # The next engine needs the memory that the thread frees.
            if await asyncio.to_thread(worker.join, _JOIN_S):
                await self._reopen(place, "its engine died")
            else:
                log.critical("model %s: the dead engine's thread does not end", self.name)

    async def _restart(self, worker: Worker, place: Place) -> None:
        """Open an engine in place of one whose process has ended: at once, or later if that goes on."""
        async with self._rebuilds(), self._replacing:
            await asyncio.to_thread(worker.join, _JOIN_S)
            batcher = self.loaded_batcher
            while self._workers[place] is worker:
                delay_s = self._backoff.delay_s(batcher.counters.batches)
                if delay_s:
                    batcher.restarting(delay_s)
                    await asyncio.sleep(delay_s)
                try:
                    await self._replace(place)
                except EngineError as error:
                    log.error("model %s: its engine cannot be started again: %s", self.name, error)  # noqa: TRY400
                else:
                    log.warning("model %s: opened again after its process ended", self.name)

    async def _load_again(self) -> None:
        """Load the model again each time that its files change."""
        try:
            async for _ in changes(self.settings.python_path):
                await self._load_changes()
        except Exception:
            log.exception("model %s: changed files are not loaded any more", self.name)

    async def _load_changes(self) -> None:
        try:
            for place in places(self.settings):
                async with self._replacing:
                    await self._replace(place)
        except EngineError as error:
            text = "model %s: the changed files cannot be loaded: %s"
            log.error(text, self.name, error)  # noqa: TRY400 - the text is for the operator
        else:
            log.info("model %s: loaded again", self.name)

    @contextlib.asynccontextmanager
    async def _rebuilds(self) -> AsyncIterator[None]:
        self._rebuilding += 1
        try:
            yield
        finally:
            self._rebuilding -= 1

    async def _reopen(self, place: Place, why: str) -> None:
        try:
            await self._replace(place)
        except EngineError as error:
            log.critical("model %s: no engine could be opened after %s: %s", self.name, why, error)
            self.loaded_batcher.gone(error)
        else:
            log.warning("model %s: opened again after %s", self.name, why)

    @property
    def engine_worker(self) -> Worker:
        """The first worker; only if `batcher` is not None."""
        return next(iter(self._workers.values()))

    @property
    def loaded_batcher(self) -> Batcher:
        """The batcher; only if it is not None."""
        assert self.batcher is not None
        return self.batcher

    @property
    def ready(self) -> bool:
        """A request would be accepted, unless the queue is full."""
        batcher = self.batcher
        return batcher is not None and batcher.admission.closed is None and bool(batcher.lanes)

    @property
    def dead(self) -> bool:
        """No engine is usable or can be opened again: only a new process helps."""
        gone = self.batcher is not None and isinstance(self.batcher.admission.closed, EngineGoneError)
        return gone and not self._rebuilding

    async def stop(self, drain_timeout_s: float) -> None:
        """Answer accepted requests, then end the workers."""
        if self.batcher is not None:
            await self.batcher.drain(drain_timeout_s)
            counted = self.batcher.counters
            log.info("model %s: ran %d rows in %d batches", self.name, counted.rows, counted.batches)
            padded = counted.padding_total
            if padded is not None and padded.elements:
                text = "model %s: %.1f %% of %d elements were padding"
                log.info(text, self.name, padded.waste * 100, padded.elements)
        for task in self._reopening:
            task.cancel()
        await asyncio.gather(*self._reopening, return_exceptions=True)
        workers = [one for one in (*self._workers.values(), *self._others) if one not in self._hung]
        for worker in workers:
            worker.stop()
            if worker in self._others and isinstance(worker.engine, Endable):
                worker.engine.kill()  # it may be loading the model
        # A thread ends with its last batch. A batch that outlived the draining has had its time.
        until_s = 0 if self.batcher is not None and self.batcher.running_batches else _JOIN_S
        for worker in workers:
            ended = await asyncio.to_thread(worker.join, until_s)
            if not ended and isinstance(worker.engine, Endable):
                worker.engine.kill()
                ended = await asyncio.to_thread(worker.join, _JOIN_S)
            if not ended:
                log.error("model %s: a worker is still busy and ends with the process", self.name)

    @property
    def worker_alive(self) -> bool:
        """A worker's thread is still running."""
        return any(not worker.join(0) for worker in [*self._hung, *self._workers.values(), *self._others])


def _settle(opened: Future[None], error: EngineError | None) -> None:
    """Settle the opening of an engine, on the worker's thread."""
    if opened.set_running_or_notify_cancel():
        if error is None:
            opened.set_result(None)
        else:
            opened.set_exception(error)
