"""A model as routes for inference see it: its codecs, and a batcher here or in another process."""

from typing import Protocol

from cobatch.batcher.errors import BatcherError
from cobatch.batcher.request import Request
from cobatch.batcher.tenant import Tenant
from cobatch.engines.errors import EngineError
from cobatch.server.http.problem import Problem
from cobatch.server.observability.traffic import Traffic
from cobatch.server.settings.schema import ModelSettings
from cobatch.server.v2.decode import Decoder
from cobatch.server.v2.encode import Encoder


class Queue(Protocol):
    """The queued rows, and those of a full batch."""

    @property
    def rows(self) -> int: ...
    @property
    def full_rows(self) -> int: ...


class Admission(Protocol):
    """The size at which the queue is full; 0 if nothing is accepted."""

    @property
    def open_rows(self) -> int: ...


class RequestBatcher(Protocol):
    """The part of `batcher.batcher.Batcher` that requests for inference use."""

    @property
    def queue(self) -> Queue: ...
    @property
    def admission(self) -> Admission: ...
    def refusal(
        self, rows: int = 1, tenant: Tenant | None = None, callers: int = 1
    ) -> BatcherError | Problem | None: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, request: Request) -> None: ...
    async def drain(self, timeout_s: float, waited_s: float = 0.0) -> bool: ...


class ServedModel:
    """A model. `batcher` is None until it can be run; `decoder` and `encoder` exist when it is not None.

    `traffic` counts requests on all routes but infer, which has `infer_traffic`.
    """

    decoder: Decoder
    encoder: Encoder
    batcher: RequestBatcher | None

    def __init__(self, settings: ModelSettings) -> None:
        self.name = settings.name
        self.version = settings.model_version
        self.infer_path = f"/v2/models/{settings.name}/infer"  # without a version: `instance` in problems
        self.settings = settings
        self.batcher = None
        self.load_error: EngineError | None = None
        self.traffic = Traffic()
        self.infer_traffic = Traffic()

    @property
    def all_traffic(self) -> Traffic:
        """Requests for this model on all routes."""
        return self.infer_traffic.plus(self.traffic)

    @property
    def loaded_batcher(self) -> RequestBatcher:
        """The batcher; only if it is not None."""
        assert self.batcher is not None
        return self.batcher

    @property
    def ready(self) -> bool:
        """A request would be accepted, unless the queue is full."""
        raise NotImplementedError

    def unavailable(self) -> Problem:
        """Return the problem of a request for a model that is not loaded."""
        if self.load_error is not None:
            return Problem("load-failed", f"model {self.name!r} could not be loaded", model=self.name)
        return Problem("starting", f"model {self.name!r} is being loaded", model=self.name, retry_after_s=1)
