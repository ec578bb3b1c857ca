"""A model whose batcher is in another process: its requests go there, and their rows come back."""

import asyncio
import time
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import Any, NoReturn, Protocol

import numpy as np

from cobatch.batcher.errors import AbandonedError, BatcherError, QueueFullError, TooManyRowsError
from cobatch.batcher.request import Batch, Request, State
from cobatch.batcher.tenant import Tenant
from cobatch.engines.base import Array, RowShapes, Signature
from cobatch.engines.errors import EngineError
from cobatch.engines.link.messages import BUNDLE_IDS, INLINE_BYTES, BatchInfo
from cobatch.server.http.problem import Problem
from cobatch.server.links.page import QueuePage
from cobatch.server.links.rows import is_plain

# Rows of a bundle if not all fit the next batch: a larger one would be most of a batch, and cannot be split.
_MOST_IN_QUEUE = 16
_SOURCES_KEPT = 4096


class RemoteBatch(Batch, eq=False):
    """A batch that ran in home, with the rows of this process. `lead`: the beginning of its requests' ids."""

    lead: bytes = b""

    @classmethod
    def of(cls, info: BatchInfo, lead: bytes = b"") -> "RemoteBatch":
        """Return the batch that home describes."""
        return cls(
            [], info.rows, (), info.reason, info.engine, info.number, info.slot,
            gathered_s=info.gathered_s,
            dispatched_s=info.dispatched_s,
            started_s=info.started_s,
            finished_s=info.finished_s,
            failed=info.failed,
            joined=[cls.of(one) for one in info.joined],
            lead=lead,
        )  # fmt: skip


class Uplink(Protocol):
    """The part of `server.links.uplink.Uplink` that a batcher uses."""

    def gather_from(self, batcher: "RemoteBatcher") -> None: ...
    def submit(self, batcher: "RemoteBatcher", requests: list[Request]) -> None: ...
    def cancel(self, request: Request) -> None: ...
    def requests_of(self, batcher: "RemoteBatcher") -> list[Request]: ...


class _Closed:
    """The queue of a model that cannot be reached."""

    rows = open_rows = 0
    full_rows = 1


class RemoteBatcher:
    """Sends requests to the batcher in home. `index`: of the model in the settings; `row_shapes`: the
    signature's.

    Its queue and admission are home's, as far as its page tells: they refuse early, and home decides.
    `entry` of a request is its place in the link, and then the row of its batch where it began.
    """

    def __init__(self, model: "RemoteModel", index: int, processes: int) -> None:
        self.index = index
        self.queue: QueuePage | _Closed = _Closed()
        self.admission: QueuePage | _Closed = self.queue
        self._model = model
        self._processes = processes
        self._uplink: Uplink | None = None
        self._page: QueuePage | None = None
        self._pending: list[Request] = []  # of this iteration
        self._most = 1  # rows of a bundle
        self.row_shapes: RowShapes = ()
        self._alone: dict[Hashable, None] = {}  # sources of rows that the model refused
        self._open = 0
        self._drained: asyncio.Event | None = None

    # The link

    def open(self, uplink: Uplink, page: QueuePage, signature: Signature) -> None:
        """Send requests over this link."""
        self._uplink, self._page = uplink, page
        self.row_shapes = tuple(spec.shape for spec in signature.inputs)
        self._most = most_bundled(signature)
        self.resume()

    def close(self) -> None:
        """Refuse requests: the link has ended, and requests on it are lost."""
        self.pause()
        self._uplink = self._page = None
        pending, self._pending = self._pending, []
        for request in pending:
            if request.state is State.QUEUED:
                self.fail(request, self.gone())

    def pause(self) -> None:
        """Refuse requests while home does not run."""
        self.queue = self.admission = _Closed()

    def resume(self) -> None:
        """Accept requests."""
        if self._page is not None:
            self.queue = self.admission = self._page

    @property
    def usable(self) -> bool:
        """Home accepts requests."""
        return self.admission.open_rows > 0

    def gone(self) -> Problem:
        """Return the problem of a request while there is no home."""
        name = self._model.name
        detail = f"the process with the engine of model {name!r} is being started"
        return Problem("starting", detail, model=name, retry_after_s=1)

    def fullness(self) -> tuple[int, int, float]:
        """Return the queued rows, their limit, and the seconds until the queue is empty."""
        page, limit = self._page, self._model.max_queue_rows
        return (0, limit, 1.0) if page is None else (page.rows, limit, page.drain_s)

    # Requests

    def refusal(
        self, rows: int = 1, tenant: Tenant | None = None, callers: int = 1
    ) -> BatcherError | Problem | None:
        """Return why a request would be refused now, as far as this process knows, or None."""
        page, limit = self._page, self._model.max_queue_rows
        if page is None or self.queue is not page:
            return self.gone()
        if rows > limit:
            return TooManyRowsError(rows, limit)
        if page.open_rows and page.rows + rows > limit:
            return QueueFullError(*self.fullness())
        if tenant is None or not tenant.limited:
            return None
        return tenant.refusal(callers, rows, time.monotonic(), page.drain_s)

    def submit(self, request: Request) -> None:
        """Send a request to home at the end of the iteration. Raises Problem if that is not possible now."""
        uplink = self._uplink
        if uplink is None or self.queue is not self._page:
            self._raise_gone()
        request.enqueued_s = time.monotonic()
        request.state = State.QUEUED
        self._open += 1
        self._pending.append(request)
        if len(self._pending) == 1:
            uplink.gather_from(self)

    def _raise_gone(self) -> NoReturn:
        raise self.gone()

    def cancel(self, request: Request) -> None:
        """Drop a request whose caller left. Harmless if it is already done."""
        if request.state is State.QUEUED:
            self.ended()
            if request.entry is not None and self._uplink is not None:
                self._uplink.cancel(request)
        if request.state in (State.NEW, State.QUEUED):
            request.state = State.CANCELLED
            request.payloads, request.entry = (), None

    @property
    def waiting(self) -> int:
        """The requests that are not sent yet."""
        return len(self._pending)

    def flush(self, uplink: Uplink) -> None:
        """Send the requests of this iteration, single rows in bundles."""
        pending, self._pending = self._pending, []
        most, page = self._most, self.queue
        if page.rows + len(pending) > page.full_rows:
            most = min(most, _MOST_IN_QUEUE, page.full_rows // (2 * self._processes))
        bundle: list[Request] = []
        for request in pending:
            if request.state is not State.QUEUED:
                continue
            if most <= 1 or not self._may_bundle(request):
                uplink.submit(self, [request])
                continue
            if len(bundle) == most or (bundle and request.tenant is not bundle[0].tenant):
                uplink.submit(self, bundle)
                bundle = []
            bundle.append(request)
        if bundle:
            uplink.submit(self, bundle)

    def _may_bundle(self, request: Request) -> bool:
        """Return whether a request is one row without wishes, of a source whose rows have not failed."""
        plain = request.rows == 1 and request.timeout_s is None and not request.priority
        return plain and (not self._alone or request.source not in self._alone)

    # Answers

    def ended(self) -> None:
        """Count a request that is answered, failed or cancelled."""
        self._open -= 1
        if self._drained is not None and not self._open:
            self._drained.set()

    def fail(self, request: Request, error: Exception) -> None:
        """Answer a request with an error."""
        request.state = State.DONE
        request.error = error
        request.payloads, request.entry = (), None
        self.ended()
        request.done()

    def keep_alone(self, source: Hashable) -> None:
        """Send requests of this source by themselves from now on, so that home knows them by it."""
        self._alone[source] = None
        if len(self._alone) > _SOURCES_KEPT:
            del self._alone[next(iter(self._alone))]

    async def drain(self, timeout_s: float, waited_s: float = 0.0) -> bool:
        """Wait until all requests are answered; after `timeout_s` they fail with AbandonedError: False."""
        self._drained = asyncio.Event()
        if not self._open:
            return True
        try:
            await asyncio.wait_for(self._drained.wait(), timeout_s)
        except TimeoutError:
            error = AbandonedError(f"model {self._model.name!r} stopped before the request was done")
            in_flight = [] if self._uplink is None else self._uplink.requests_of(self)
            for request in [*self._pending, *in_flight]:
                if request.state is State.QUEUED:
                    self.fail(request, error)
            return False
        return True


def most_bundled(signature: Signature) -> int:
    """Return how many rows a bundle may have, 1 if rows are sent by themselves: for long ones a message each
    costs little."""
    if not is_plain(signature):
        return 1
    row_bytes = sum([spec.row_elements * spec.dtype.itemsize for spec in signature.inputs])
    return max(1, min(BUNDLE_IDS - 1, INLINE_BYTES // max(1, row_bytes)))


class RemoteModel:
    """A model in home. `batcher` is None until home has loaded it for the first time.

    `max_queue_rows`: the limit of its queue; `processes`: how many have a link to home.
    """

    batcher: RemoteBatcher | None = None
    load_error: EngineError | None = None
    signature: Signature | None = None

    def __init__(self, name: str, index: int, max_queue_rows: int, processes: int) -> None:
        self.name = name
        self.max_queue_rows = max_queue_rows
        self.output_dtypes: list[np.dtype[Any]] = []
        self._remote = RemoteBatcher(self, index, processes)

    def loaded(self, uplink: Uplink, page: QueuePage, signature: Signature) -> None:
        """Use the model that home has loaded. Raises EngineLoadError."""
        if signature != self.signature:
            self.use(signature)
            self.signature = signature
            self.output_dtypes = [spec.dtype for spec in signature.outputs]
        self._remote.open(uplink, page, signature)
        self.batcher = self._remote

    @abstractmethod
    def use(self, signature: Signature) -> None:
        """Make what depends on the signature, which is new. Raises EngineLoadError."""

    def new_batch(self, info: BatchInfo, lead: bytes, outputs: Sequence[Array]) -> RemoteBatch:
        """Return a batch with the rows of this process, in which answers are read."""
        batch = RemoteBatch.of(info, lead)
        batch.outputs = outputs
        return batch

    def delivered(self) -> None:
        """Note that the requests of a batch are answered."""
