"""All models of a process, and the path of one infer request through them.

Both edges (`server.edge.fast_path` below ASGI, `server.edge.asgi`), POST /batch and predictions use it:
`admit` once the headers have arrived, `infer` with the body. The reply comes by callback.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Hashable, Sequence
from functools import partial

from cobatch.batcher.request import Request, State
from cobatch.batcher.tenant import Tenant
from cobatch.engines.errors import EngineError
from cobatch.server.auth.authenticator import Authenticator
from cobatch.server.auth.principal import Principal
from cobatch.server.auth.tenants import Total
from cobatch.server.http.body import Body
from cobatch.server.http.body_memory import BodyMemory
from cobatch.server.http.problem import Problem, from_error, stopping, too_large
from cobatch.server.http.reply import Reply
from cobatch.server.inference.model import Model
from cobatch.server.inference.served import ServedModel, ServedPipeline, Target
from cobatch.server.observability.observer import Observer
from cobatch.server.observability.output import LogStream
from cobatch.server.settings.auth import INFER
from cobatch.server.settings.schema import Settings
from cobatch.server.v2.decode import Decoded, WantedOutputs
from cobatch.server.v2.encode import LongAnswerError, encode_later
from cobatch.server.v2.pieces import in_pieces

log = logging.getLogger("cobatch.server")

# Of a request that is still being decoded.
_NOTHING = Decoded(0, (), (), None, ())


class InferRequest(Request):
    """A V2 infer request in the batcher; `done` encodes its reply while the outputs are valid."""

    __slots__ = ("id", "model", "outputs", "reply", "usage")

    def __init__(
        self, model: ServedModel, decoded: Decoded, reply: Callable[[Reply], None], tenant: Tenant | None
    ) -> None:
        # `super()` would cost a tenth of what this does.
        Request.__init__(self, decoded.rows, decoded.row_shapes, decoded.payloads)
        self.tenant = tenant
        self.priority, self.timeout_s, self.usage = decoded.options
        self.id: str | None = decoded.id
        self.outputs: WantedOutputs = decoded.outputs
        self.model = model
        self.reply = reply

    def cancel(self) -> None:
        """Drop the request: its client is gone."""
        self.model.loaded_batcher.cancel(self)

    def take(self, decoded: Decoded) -> None:
        """Set the content of a request that was made before it was decoded."""
        self.rows, self.row_shapes, self.payloads = decoded.rows, decoded.row_shapes, decoded.payloads
        self.priority, self.timeout_s, self.usage = decoded.options
        self.id, self.outputs = decoded.id, decoded.outputs

    @property
    def source(self) -> Hashable:
        # The reply is a method of an exchange or, for an item of POST /batch, a partial one of its call.
        owner = getattr(getattr(self.reply, "func", self.reply), "__self__", None)
        return self.tenant or getattr(owner, "client", None)

    def done(self) -> None:
        try:
            reply = reply_to(self, self.model, self.outputs, self.id, self.usage)
        except LongAnswerError:
            encode = partial(reply_to, model=self.model, outputs=self.outputs, id_=self.id, usage=self.usage)
            encode_later(self, [index for index, _ in self.outputs], encode, self.reply)
        else:
            self.reply(reply)


class LongRequest(InferRequest):
    """A request that is decoded in the thread, by `decoding`."""

    __slots__ = ("decoding",)

    def __init__(
        self,
        model: ServedModel,
        decoding: asyncio.Future[Decoded],
        reply: Callable[[Reply], None],
        tenant: Tenant | None,
    ) -> None:
        super().__init__(model, _NOTHING, reply, tenant)
        self.decoding = decoding
        decoding.add_done_callback(self._submit)

    def cancel(self) -> None:
        super().cancel()
        self.decoding.cancel()

    def _submit(self, decoded: asyncio.Future[Decoded]) -> None:
        if self.state is State.CANCELLED or decoded.cancelled():
            decoded.cancelled() or decoded.exception()  # it is of no interest
            return
        failure = decoded.exception()  # raised here, it would refer to this frame, a cycle
        if isinstance(failure, Exception):
            self.reply(refused(self.model, failure, self.tenant))
            return
        try:
            self.take(decoded.result())
            self.model.loaded_batcher.submit(self)
        except Exception as error:  # noqa: BLE001 - `refused` logs unexpected ones
            self.reply(refused(self.model, error, self.tenant))


def reply_to(
    request: Request, model: ServedModel, outputs: WantedOutputs, id_: str | None, usage: bool = False
) -> Reply:
    """Return the reply to a request that is done, while its outputs are valid. Raises LongAnswerError."""
    try:
        if request.error is not None:
            return from_error(request.error).reply(instance=model.infer_path)
        return model.encoder.encode(request, outputs, id_, usage)
    except LongAnswerError:
        raise
    except Problem as refusal:
        return refusal.reply(instance=model.infer_path)
    except Exception:
        log.exception("model %s: encoding an answer failed", model.name)
        problem = Problem("internal", "the server failed to encode the answer; its log says why")
        return problem.reply(instance=model.infer_path)


def refused(model: ServedModel, error: Exception, tenant: Tenant | None) -> Reply:
    """Return the reply to a request that was not accepted. Unexpected errors are logged."""
    problem = from_error(error)
    if problem.kind.slug == "internal":
        whose = "" if tenant is None else f" of tenant {tenant.name}"
        log.error("model %s: an infer request%s failed", model.name, whose, exc_info=error)
    return problem.reply(instance=model.infer_path)


class Inference:
    """All models of a process. Raises SettingsError for invalid key files.

    Without authentication `auth` is None, and so are principals. `served` are all models; `models` those
    whose engines run in this process: all of them, unless `remote` has others.
    """

    def __init__(
        self,
        settings: Settings,
        log_stream: LogStream | None = None,
        remote: Sequence[ServedModel] = (),
    ) -> None:
        self.settings = settings
        self.auth = None if settings.auth is None else Authenticator(settings.auth)
        self.rate_limit_headers = settings.auth is not None and settings.auth.rate_limit_headers
        self.models = {} if remote else {model.name: Model(model) for model in settings.models}
        self.served: dict[str, ServedModel] = {**self.models, **{model.name: model for model in remote}}
        self.hub: object = None  # of links to other processes, see `server.links.hub`
        self.close_links: Callable[[], None] = lambda: None
        self.pipelines: dict[str, ServedPipeline] = {}  # set by `server.app`, where they run
        self.observer = Observer(log_stream or LogStream(as_json=settings.server.logs_json))
        # By request target, for the fast path; and by path.
        self.infer_targets: dict[bytes, ServedModel] = {}
        self.infer_paths: dict[str, ServedModel] = {}
        for name, model in self.served.items():
            for base in (f"/v2/models/{name}", f"/v2/models/{name}/versions/{model.version}"):
                self.infer_targets[f"{base}/infer".encode()] = model
                self.infer_paths[f"{base}/infer"] = model
        self.bodies = BodyMemory(settings.server.body_memory_bytes)
        self.max_json_bytes = min(settings.server.max_json_bytes, settings.server.max_body_bytes)
        # About to stop: not ready; each response is the last of its connection; no new requests.
        self.leaving = self.closing = self.draining = False
        # Called when draining begins, to end streams that have no end of their own.
        self.on_draining: list[Callable[[], None]] = []
        self.loop: asyncio.AbstractEventLoop | None = None  # set when the application starts
        self._was_ready = False
        # Set by the process (`server.serve`, `server.fronts.home`).
        self.on_loaded: Callable[[Model], None] = lambda model: None
        self.on_ready: Callable[[], None] = lambda: None
        self.on_load_failed: Callable[[str, EngineError], None] = partial(
            log.critical, "model %s cannot be loaded: %s"
        )

    def tell_if_ready(self) -> None:
        """Call `on_ready` when everything is ready for the first time."""
        if self.ready and not self._was_ready:
            self._was_ready = True
            self.on_ready()

    @property
    def ready(self) -> bool:
        """All models accept requests, and credentials can be checked."""
        is_open = not self.leaving and (self.auth is None or self.auth.ready)
        targets = (*self.served.values(), *self.pipelines.values())
        return is_open and all(target.ready for target in targets)

    @property
    def targets(self) -> dict[str, Model | ServedPipeline]:
        """Models whose engines run here, and pipelines, by name.

        A pipeline around a model has its name and its traffic: the model stands for both.
        """
        return {**self.models, **self.pipelines, **self.models}

    def admit(self, model: Target, principal: Principal | None) -> Problem | None:
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
        if batcher.queue.rows < batcher.admission.open_rows and (tenant is None or not tenant.limited):
            return None
        refusal = batcher.refusal(tenant=tenant)
        if refusal is None:
            return None
        if tenant is not None:
            tenant.usage.refused += 1
        return from_error(refusal)

    def check(self, model: Target, principal: Principal | None) -> None:
        """Raise the problem of a request that may not enter now."""
        problem = self.admit(model, principal)
        if problem is not None:
            try:
                raise problem
            finally:
                del problem  # it refers to this frame

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
        """Return the problem of a principal without a permission; `infer` and `metadata` are for a model."""
        assert self.auth is not None
        detail = f"this needs the permission {permission}"
        members = {"permission": permission}
        if model is not None:
            detail += f" for the model {model!r}"
            members["model"] = model
        return self.auth.challenges.problem("forbidden", detail, **members)

    def infer(
        self,
        model: ServedModel,
        body: Body,
        json_length: int | None,
        reply: Callable[[Reply], None],
        principal: Principal | None,
    ) -> InferRequest | None:
        """Decode and submit a request. `json_length`: the value of Inference-Header-Content-Length.

        `reply` is called exactly once, now or later, unless the request is cancelled. Returns None if it was
        called already.
        """
        problem = self.admit(model, principal)
        if problem is not None:
            reply(problem.reply(instance=model.infer_path))
            return None
        tenant = None if principal is None else principal.tenant
        decoder = model.decoder
        if len(body) > decoder.short_bytes and not decoder.is_quick(json_length):
            return self._infer_long(model, body, json_length, reply, tenant)
        try:
            request = InferRequest(model, decoder.decode(body, json_length), reply, tenant)
            model.batcher.submit(request)  # type: ignore[union-attr]  # None is never admitted
            return request
        except Exception as error:  # noqa: BLE001 - `refused` logs unexpected ones
            # The problem needs no name here: its traceback refers to this frame, a cycle.
            reply(refused(model, error, tenant))
            return None

    def _infer_long(
        self,
        model: ServedModel,
        body: Body,
        json_length: int | None,
        reply: Callable[[Reply], None],
        tenant: Tenant | None,
    ) -> InferRequest | None:
        """Decode in the thread, then submit. The request may be cancelled meanwhile."""
        json_bytes = len(body) if json_length is None else min(json_length, len(body))
        if json_bytes > self.max_json_bytes:
            reply(too_large(json_bytes, self.max_json_bytes).reply(instance=model.infer_path))
            return None
        return LongRequest(model, in_pieces(model.decoder.decode, body, json_length), reply, tenant)
