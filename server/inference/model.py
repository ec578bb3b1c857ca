"""One served model: its engines' workers, its batcher and its codec, from loading to stopping."""

import asyncio
import logging
from collections.abc import Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import BatcherError, EngineGoneError, ExecutionTimeoutError
from cobatch.batcher.lane import BatchWorker
from cobatch.engines.base import Batching, Engine
from cobatch.engines.errors import EngineError
from cobatch.engines.loader import load_engine
from cobatch.engines.worker import Worker
from cobatch.server.inference.engines import Place, engine_options, places
from cobatch.server.inference.padding import make_padder
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
        self._batching: Batching | None = None  # as the first engine decided it
        self._workers: list[Worker] = []
        self._places: dict[Worker, Place] = {}
        self._hung: list[Worker] = []
        self._died: set[Place] = set()  # an engine has died there before
        self._rebuilding = 0
        self._reopening: set[asyncio.Task[None]] = set()

    async def load(self) -> None:
        """Open the engines, warm them up and begin to accept requests. Raises EngineError."""
        loop = asyncio.get_running_loop()
        settings = self.settings
        try:
            for place in places(settings):
                await self._open(place)
            engine = self._workers[0].engine
            padder = make_padder(self.name, settings.pad, engine.signature)
        except EngineError as error:
            self.load_error = error
            raise
        self.decoder = Decoder(engine.signature, settings.max_queue_rows, padder)
        self.encoder = Encoder(self.name, self.version, engine.signature)
        self.batcher = Batcher(
            self.name,
            self._workers,
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
        options = engine_options(settings, place, self._batching)
        engine = load_engine(settings.engine, settings.path, settings.max_batch_size, options)
        worker = Worker(engine, f"{self.name}{place.suffix}")
        self._workers = [one for one in self._workers if self._places.get(one) != place] + [worker]
        self._places[worker] = place
        worker.start(partial(_settle, opened))
        await asyncio.wrap_future(opened)
        self._batching = engine.signature.batching
        return worker

    def _on_lost(self, lost: BatchWorker, why: BatcherError) -> None:
        worker = next(one for one in self._workers if one is lost)
        place = self._places[worker]
        worker.stop()  # ends with its last batch, if that ever ends
        if isinstance(why, ExecutionTimeoutError):
            # Its thread cannot be ended, but another engine can take its place.
            self._hung.append(worker)
            self._start(self._reopen(place, "a run that did not end"))
        elif place not in self._died:
            # Once per place: a cause that kills each engine would kill the next one too.
            self._died.add(place)
            self._rebuilding += 1
            self._start(self._rebuild(worker, place))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._reopening.add(task)
        task.add_done_callback(self._reopening.discard)

    async def _rebuild(self, worker: Worker, place: Place) -> None:
        try:
            # The next engine needs the memory that the thread frees.
            if await asyncio.to_thread(worker.join, _JOIN_S):
                await self._reopen(place, "its engine died")
            else:
                log.critical("model %s: the dead engine's thread does not end", self.name)
        finally:
            self._rebuilding -= 1

    async def _reopen(self, place: Place, why: str) -> None:
        try:
            worker = await self._open(place)
        except EngineError as error:
            log.critical("model %s: no engine could be opened after %s: %s", self.name, why, error)
            self.loaded_batcher.gone(error)
        else:
            log.warning("model %s: opened again after %s", self.name, why)
            self.loaded_batcher.use(worker)

    @property
    def engine_worker(self) -> Worker:
        """The first worker; only if `batcher` is not None."""
        return self._workers[0]

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
        for worker in self._workers:
            worker.stop()
        # A thread ends with its last batch. A batch that outlived the draining has had its time.
        until_s = 0 if self.batcher is not None and self.batcher.running_batches else _JOIN_S
        for worker in self._workers:
            if not await asyncio.to_thread(worker.join, until_s):
                log.error("model %s: a worker is still busy and ends with the process", self.name)

    @property
    def worker_alive(self) -> bool:
        """A worker's thread is still running."""
        return any(not worker.join(0) for worker in [*self._hung, *self._workers])


def _settle(opened: Future[None], error: EngineError | None) -> None:
    """Settle the opening of an engine, on the worker's thread."""
    if opened.set_running_or_notify_cancel():
        if error is None:
            opened.set_result(None)
        else:
            opened.set_exception(error)
