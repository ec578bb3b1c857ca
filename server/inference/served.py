"""A model as routes for inference see it: its codecs, and a batcher here or in another process."""

from typing import Any, Protocol

from cobatch.batcher.batcher import Batcher
from cobatch.batcher.errors import BatcherError
from cobatch.batcher.request import Request
from cobatch.batcher.tenant import Tenant
from cobatch.engines.errors import EngineError
from cobatch.server.http.problem import Problem
from cobatch.server.observability.traffic import Traffic
from cobatch.server.settings.schema import ModelSettings, PipelineSettings
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


class Target(Protocol):
    """What a request may be for: a model, or a pipeline. `batcher` is None until it is loaded."""

    name: str
    traffic: Traffic

    @property
    def batcher(self) -> RequestBatcher | None: ...
    @property
    def ready(self) -> bool: ...
    def unavailable(self) -> Problem: ...


class ServedPipeline(Target, Protocol):
    """A pipeline. `content`: of its requests and answers, None until it is loaded."""

    settings: PipelineSettings
    path: str
    load_error: EngineError | None

    @property
    def batcher(self) -> Batcher | None: ...
    @property
    def dead(self) -> bool: ...
    @property
    def traffics(self) -> "tuple[Traffic, ...]": ...
    @property
    def content(self) -> "Content | None": ...
    @property
    def loaded_batcher(self) -> Batcher: ...
    async def load(self) -> None: ...
    async def stop(self, drain_timeout_s: float) -> None: ...


class Content(Protocol):
    """Requests and answers of a pipeline: content types, and JSON schemas, None where they are no JSON."""

    @property
    def accepts(self) -> tuple[str, ...]: ...
    @property
    def returns(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def request_schema(self) -> dict[str, Any] | None: ...
    @property
    def answer_schema(self) -> dict[str, Any] | None: ...


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
    def traffics(self) -> tuple[Traffic, ...]:
        """Requests for this model on all routes."""
        return self.infer_traffic, self.traffic

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
