"""All models of a process, and the path of one infer request through them.

Both edges (`server.edge.fast_path` below ASGI, `server.edge.asgi`), POST /batch and predictions use it:
`admit` once the headers have arrived, `infer` with the body, `cancel` if the client disconnects. The reply
comes by callback.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from cobatch.batcher.request import Request
from cobatch.batcher.tenant import Tenant
from cobatch.engines.errors import EngineError
from cobatch.server.auth.authenticator import Authenticator
from cobatch.server.auth.principal import Principal
from cobatch.server.auth.tenants import Total
from cobatch.server.http.problem import Problem, from_error, stopping
from cobatch.server.http.reply import Reply
from cobatch.server.inference.model import Model
from cobatch.server.observability.observer import Observer
from cobatch.server.observability.record import RequestRecord
from cobatch.server.settings.auth import INFER
from cobatch.server.settings.schema import Settings
from cobatch.server.v2.decode import Decoded, WantedOutputs
from cobatch.server.v2.messages import Body

log = logging.getLogger("cobatch.server")


class ModelRequest(Request):
    """A request that knows its model, and how those who watch the server know it: None where nobody does."""

    __slots__ = ("model", "record")
    model: Model
    record: RequestRecord | None


class InferRequest(ModelRequest):
    """A V2 infer request in the batcher; `done` encodes its answer while the outputs are valid."""

    __slots__ = ("id", "reply", "usage", "wants")

    def __init__(
        self, model: Model, decoded: Decoded, reply: Callable[[Reply], None], tenant: Tenant | None
    ) -> None:
        # Not by `super()`, which would cost each request a tenth of what this does.
        Request.__init__(self, decoded.rows, decoded.row_shapes, decoded.payloads)
        self.tenant = tenant
        self.priority, self.timeout_s, self.usage = decoded.options
        self.id: str | None = decoded.id
        self.wants: WantedOutputs = decoded.outputs
        self.model = model
        self.reply = reply
        self.record = None

    def done(self) -> None:
        if self.record is not None:
            self.record.ran(self)
        try:
            if self.error is None:
                reply = self.model.encoder.encode(self, self.wants, self.id, self.usage)
            else:
                reply = from_error(self.error).reply(instance=self.model.infer_path)
        except Exception as error:  # noqa: BLE001 - logged there
            reply = encoding_failed(self.model, error)
        self.reply(reply)


def encoding_failed(model: Model, error: Exception) -> Reply:
    """What the caller is told when its answer could not be written; the log says why."""
    log.error("model %s: encoding an answer failed", model.name, exc_info=error)
    problem = Problem("internal", "the server failed to encode the answer; its log says why")
    return problem.reply(instance=model.infer_path)


def instance_of(model: Model) -> str:
    """Return the `instance` of problems on the infer routes: the same for both edges and all versions."""
    return model.infer_path


def _log_load_failure(name: str, error: EngineError) -> None:
    log.critical("model %s cannot be loaded: %s", name, error)


class Inference:
    """All models of a process, and what both edges do with them. Raises SettingsError for bad key files.

    `auth` is None where everybody is anonymous; principals are None then, too.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.auth = None if settings.auth is None else Authenticator(settings.auth)
        self.rate_limit_headers = settings.auth is not None and settings.auth.rate_limit_headers
        self.models = {model.name: Model(model) for model in settings.models}
        self.observer = Observer()
        # What the fast path compares the request target with, byte for byte.
        self.infer_targets: dict[bytes, Model] = {}
        self.infer_paths: dict[str, Model] = {}  # the same as text
        for name, model in self.models.items():
            for base in (f"/v2/models/{name}", f"/v2/models/{name}/versions/{model.version}"):
                self.infer_targets[f"{base}/infer".encode()] = model
                self.infer_paths[f"{base}/infer"] = model
        self.draining = False
        # Called when draining begins: what would go on for good has to end then.
        self.on_draining: list[Callable[[], None]] = []
        self.loop: asyncio.AbstractEventLoop | None = None  # set when the application starts
        self._told = False
        # For whoever runs the process; until then there is nobody to tell.
        self.on_ready: Callable[[], None] = lambda: None
        self.on_load_failed: Callable[[str, EngineError], None] = _log_load_failure

    def tell_if_ready(self) -> None:
        """Call `on_ready` the first time that everything is ready; asked when a part of it has become so."""
        if self.ready and not self._told:
            self._told = True
            self.on_ready()

    @property
    def ready(self) -> bool:
        """Whether every model takes requests, and anybody's credentials can be checked."""
        open_ = not self.draining and (self.auth is None or self.auth.ready)
        return open_ and all(model.ready for model in self.models.values())

    def admit(self, model: Model, principal: Principal | None) -> Problem | None:
        """Decide whether a request may enter now; return the problem if it may not.

        Nothing else decides this. It is asked before the body is read, and again before it is decoded.
        """
        batcher = model.batcher
        tenant = None
        if principal is not None:
            if not principal.may_infer(model.name):
                return self.forbidden(INFER, model.name)
            tenant = principal.tenant
        if self.draining:
            return stopping()
        if batcher is None:
            return model.unavailable()
        if not batcher.full and (tenant is None or not tenant.limited):
            return None
        refusal = batcher.refusal(tenant=tenant)
        if refusal is None:
            return None
        if tenant is not None:
            tenant.usage.refused += 1
        return from_error(refusal)

    def admit_call(self, principal: Principal | None) -> Problem | None:
        """Decide whether a call with requests for several models may enter; each is admitted by itself later.

        The problem is one that every request of the call would have.
        """
        if self.draining:
            return stopping()
        if principal is None:
            return None
        if not principal.permissions:
            return self.forbidden(INFER)
        tenant = principal.tenant
        refusal = tenant.refusal(1, 1, time.monotonic(), 0.0) if tenant.limited else None
        return None if refusal is None else from_error(refusal)

    def tenant_totals(self) -> list[tuple[str, Total]]:
        """Return the totals of the busiest tenants, by name, and of all others together."""
        return [] if self.auth is None else self.auth.tenants.totals()

    def forbidden(self, permission: str, model: str | None = None) -> Problem:
        """A known caller lacks a permission; for `infer` and `metadata` of one model, with its name."""
        assert self.auth is not None
        detail = f"this needs the permission {permission}"
        if model is not None:
            detail = f"this needs the permission {permission} for the model {model!r}"
        return self.auth.challenges.insufficient_scope(permission, detail, model)

    def infer(
        self,
        model: Model,
        body: Body,
        json_length: int | None,
        reply: Callable[[Reply], None],
        principal: Principal | None,
        record: RequestRecord | None = None,
    ) -> InferRequest | None:
        """Decode and submit. `reply` is called exactly once, at once or later, unless cancelled.

        None when it was called already. `json_length` is Inference-Header-Content-Length's value. `record`
        gets what there is to say of it.
        """
        tenant = None if principal is None else principal.tenant
        problem = self.admit(model, principal)
        if problem is not None:
            reply(problem.reply(instance=model.infer_path))
            return None
        try:
            decoded = model.decoder.decode(body, json_length)
            request = InferRequest(model, decoded, reply, tenant)
            if record is not None:
                request.record = record
                record.rows = request.rows
            model.batcher.submit(request)  # type: ignore[union-attr]  # None is never admitted
            return request
        except Exception as error:  # noqa: BLE001 - `refused` logs what is not expected
            # No name for the problem here: its traceback holds this frame, and the frame would hold it.
            reply(refused(model, error, tenant))
            return None

    def cancel(self, request: ModelRequest) -> None:
        """The caller has left."""
        batcher = request.model.batcher
        assert batcher is not None
        batcher.cancel(request)


def refused(model: Model, error: Exception, tenant: Tenant | None) -> Reply:
    """The reply to a request that was not accepted. The log says why where that is unexpected."""
    problem = from_error(error)
    if problem.kind.slug == "internal":
        whose = "" if tenant is None else f" of tenant {tenant.name}"
        log.error("model %s: an infer request%s failed", model.name, whose, exc_info=error)
    return problem.reply(instance=model.infer_path)
