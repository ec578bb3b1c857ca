"""One served model: its worker, its batcher, its codec, and how far along it is."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from batcher.batcher import Batcher
from batcher.errors import BatcherError, EngineGoneError
from batcher.tenant import Tenant
from engines.errors import EngineError
from engines.loader import load_engine
from engines.worker import Worker
from server.engine_options import engine_options
from server.padding import make_padder
from server.problems import Problem, from_error
from server.settings import ModelSettings
from server.v2_decode import Decoder
from server.v2_encode import Encoder

log = logging.getLogger("cobatch.model")

_JOIN_S = 5.0


class Model:
    """A model from its settings on. `batcher` is None until the engine is open.

    `decoder` and `encoder` exist when `batcher` does.
    """

    decoder: Decoder
    encoder: Encoder

    def __init__(self, settings: ModelSettings) -> None:
        self.name = settings.name
        self.version = settings.model_version
        self.settings = settings
        self.batcher: Batcher | None = None
        self.load_error: EngineError | None = None
        self._worker: Worker | None = None
        self._hung: list[Worker] = []
        self._reopening: asyncio.Task[None] | None = None
        self._died = False
        self._rebuilding = False

    async def load(self) -> None:
        """Open the engine on its thread, warm it up, begin to accept. Raises EngineError."""
        loop = asyncio.get_running_loop()
        settings = self.settings
        try:
            worker = await self._open()
            engine = worker.engine
            padder = make_padder(self.name, settings.pad, engine.signature)
        except EngineError as error:
            self.load_error = error
            raise
        self.decoder = Decoder(engine.signature, settings.max_queue_rows, padder)
        self.encoder = Encoder(self.name, self.version, engine.signature)
        self.batcher = Batcher(
            self.name,
            worker,
            max_queue_rows=settings.max_queue_rows,
            max_delay_ms=settings.max_delay_ms,
            latency_target_ms=settings.latency_target_ms,
            deadline_ms=settings.deadline_ms,
            execution_timeout_ms=settings.execution_timeout_ms,
            on_hung=self._on_hung,
            on_died=self._on_died,
            padder=padder,
            loop=loop,
        )
        log.info(
            "model %s: ready (%s, batches of up to %d rows, full at %d)",
            self.name,
            engine.platform,
            engine.max_batch_size,
            self.batcher.full_rows,
        )

    async def _open(self) -> Worker:
        """A worker with an engine that is open and warm. Raises EngineError."""
        loop = asyncio.get_running_loop()
        opened: asyncio.Future[None] = loop.create_future()
        settings = self.settings
        engine = load_engine(
            settings.engine, settings.path, settings.max_batch_size, engine_options(settings)
        )
        self._worker = worker = Worker(engine, self.name)
        worker.start(_resolver(loop, opened))
        await opened
        return worker

    def _on_hung(self) -> None:
        """The engine does not come back. Its thread cannot be ended, but another engine can be opened."""
        hung = self.engine_worker
        hung.stop()  # it ends by itself should it ever come back
        self._hung.append(hung)
        self._reopening = asyncio.create_task(self._reopen())

    def _on_died(self) -> None:
        """The engine cannot run anything any more. One that is opened anew may; but only once, since what
        kills engine after engine is not helped by more of them."""
        if self._died:
            return
        self._died = self._rebuilding = True
        self.engine_worker.stop()
        self._reopening = asyncio.create_task(self._rebuild())

    async def _rebuild(self) -> None:
        try:
            # Its thread frees what the next engine needs, and has answered all its batches by then.
            if await asyncio.to_thread(self.engine_worker.join, _JOIN_S):
                await self._reopen()
            else:
                log.critical("model %s: the dead engine does not let go", self.name)
        finally:
            self._rebuilding = False

    async def _reopen(self) -> None:
        try:
            worker = await self._open()
        except EngineError as error:
            self.loaded_batcher.gone(error)
        else:
            why = "its engine died" if self._rebuilding else "a run that did not end"
            log.warning("model %s: opened again after %s", self.name, why)
            self.loaded_batcher.reopened(worker)

    @property
    def engine_worker(self) -> Worker:
        """The worker; only when `batcher` is not None."""
        assert self._worker is not None
        return self._worker

    @property
    def loaded_batcher(self) -> Batcher:
        """The batcher; only when `batcher` is not None."""
        assert self.batcher is not None
        return self.batcher

    @property
    def ready(self) -> bool:
        """Whether a request would be accepted, but for a full queue."""
        return self.batcher is not None and self.batcher.closed is None and not self.batcher.hung

    @property
    def dead(self) -> bool:
        """Whether the engine is unusable, and opening it anew did not help: only a new process does."""
        gone = self.batcher is not None and isinstance(self.batcher.closed, EngineGoneError)
        return gone and not self._rebuilding

    def refusal(self, tenant: Tenant | None = None) -> Problem | None:
        """Why a request would be refused before anybody reads its body, or None."""
        batcher = self.batcher
        if batcher is not None:
            refusal: BatcherError | None = batcher.refusal(tenant=tenant)
            return None if refusal is None else from_error(refusal)
        if self.load_error is not None:
            return Problem("load-failed", f"model {self.name!r} could not be loaded", model=self.name)
        return Problem("starting", f"model {self.name!r} is being loaded", model=self.name, retry_after_s=1)

    async def stop(self, drain_timeout_s: float) -> None:
        """Answer what was accepted, then end the worker."""
        if self.batcher is not None:
            await self.batcher.drain(drain_timeout_s)
            counted = self.batcher.counters
            log.info("model %s: ran %d rows in %d batches", self.name, counted.rows, counted.batches)
            padded = counted.padding_total
            if padded is not None:
                log.info(
                    "model %s: %.1f %% of %d elements were padding",
                    self.name,
                    padded.waste * 100,
                    padded.elements,
                )
        if self._reopening is not None:
            self._reopening.cancel()
        if self._worker is not None:
            self._worker.stop()
            # The thread is asked for, not slept for: it ends as soon as its last batch has. The time for
            # a batch that outlived the draining is already over.
            stuck = self.batcher is not None and self.batcher.running_batches
            if not await asyncio.to_thread(self._worker.join, 0 if stuck else _JOIN_S):
                log.error("model %s: the worker is still busy; it ends with the process", self.name)

    @property
    def worker_alive(self) -> bool:
        """Whether a worker's thread runs."""
        workers = [*self._hung, *([] if self._worker is None else [self._worker])]
        return any(not worker.join(0) for worker in workers)


def _resolver(
    loop: asyncio.AbstractEventLoop, opened: asyncio.Future[None]
) -> Callable[[EngineError | None], None]:
    """What a worker calls on its thread once its engine is open or has failed to."""

    def settle(error: EngineError | None) -> None:
        if opened.cancelled():
            return
        if error is None:
            opened.set_result(None)
        else:
            opened.set_exception(error)

    def on_open(error: EngineError | None) -> None:
        try:
            loop.call_soon_threadsafe(settle, error)
        except RuntimeError:
            log.warning("the event loop was closed while a model was being loaded")

    return on_open
