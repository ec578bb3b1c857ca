"""POST /v1/models/NAME/infer: a request as people send it, to a pipeline; its answer, whole or in parts."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from cobatch.batcher.errors import BatcherError
from cobatch.engines.base import Signature
from cobatch.server.api.routing import compressed_response, guarded
from cobatch.server.auth.principal import principal_in
from cobatch.server.edge.exchange import EXCHANGE, client_in, record_in
from cobatch.server.http.asgi import note_problem, read_body
from cobatch.server.http.problem import Problem, from_error
from cobatch.server.http.reply import Reply
from cobatch.server.http.request_id import new_id
from cobatch.server.inference.model import Model
from cobatch.server.inference.service import Inference
from cobatch.server.links.hub import hub_of
from cobatch.server.links.step_end import linked_models
from cobatch.server.observability.record import server_timing
from cobatch.server.observability.traffic import LEFT, LEFT_SLUG
from cobatch.server.pipelines import sse
from cobatch.server.pipelines.call import NOTHING
from cobatch.server.pipelines.content import check_type
from cobatch.server.pipelines.pipeline import Pipeline
from cobatch.server.pipelines.request import PipelineRequest
from cobatch.server.pipelines.wire import in_memory
from cobatch.server.settings.schema import PipelineSettings

# A longer body is copied in a thread.
_SHORT_BYTES = 1 << 20
_LONGEST_MS = 86_400_000
_LARGEST_PRIORITY = 2**63 - 1  # as V2's


def make_around(inference: Inference, model: Model) -> Pipeline | None:
    """Return the pipeline of a loaded model in Python with `preprocess` or `postprocess`, which is new."""
    engine = model.engine_worker.engine
    if not getattr(engine, "own_requests", False):
        return None
    of_model = model.settings
    assert of_model.python is not None
    settings = PipelineSettings(
        python=of_model.python,
        python_path=of_model.python_path,
        name=model.name,
        deadline_ms=of_model.deadline_ms,
        reload=of_model.reload,
    )
    inference.pipelines[model.name] = pipeline = _made(inference, settings, engine.signature)
    pipeline.traffic = model.traffic
    return pipeline


def _made(inference: Inference, settings: PipelineSettings, around: Signature | None = None) -> Pipeline:
    pipeline = Pipeline(settings, linked_models(inference.settings.models), hub_of(inference), around)
    pipeline.on_ready = inference.tell_if_ready  # for the first time, if a process ended while it was loaded
    return pipeline


def pipeline_routes(inference: Inference) -> list[Route]:
    """Make the pipelines of the settings; return the route, for Starlette."""
    inference.pipelines.update({one.name: _made(inference, one) for one in inference.settings.pipelines})

    async def post(request: Request) -> Response:
        pipeline = _find(inference, request)
        if "idempotency-key" in request.headers:
            detail = "a pipeline keeps no answers, so Idempotency-Key has no use here"
            raise Problem("bad-parameter", detail, parameter="Idempotency-Key")
        call = await _accept(inference, pipeline, request)
        return await _Answering(inference, pipeline, request, call).response()

    return [Route("/v1/models/{name}/infer", guarded(inference, "infer", post), methods=["POST"])]


def _find(inference: Inference, request: Request) -> Pipeline:
    """Return the pipeline in the path. Raises Problem."""
    name, principal = request.path_params["name"], principal_in(request.scope)
    pipeline = inference.pipelines.get(name)
    if pipeline is None:
        known = [one for one in inference.pipelines if principal is None or principal.may_read(one)]
        detail = f"there is no pipeline {name!r}"
        if name in inference.models and (principal is None or principal.may_infer(name)):
            detail = f"{name!r} is a model: POST /v1/models/{name}/predictions"
        raise Problem("unknown-model", detail, model=name, models=known)
    assert isinstance(pipeline, Pipeline)
    return pipeline


async def _accept(inference: Inference, pipeline: Pipeline, request: Request) -> PipelineRequest:
    """Read a request and queue it. Raises Problem, ClientDisconnect."""
    scope = request.scope
    principal = principal_in(scope)
    inference.check(pipeline, principal)
    assert pipeline.content is not None
    priority, timeout_s = _options(request)
    content_type = request.headers.get("content-type", "")
    check_type(pipeline.content.accepts, content_type)
    as_json = pipeline.content.request_schema is not None
    limit = inference.max_json_bytes if as_json else inference.settings.server.max_body_bytes
    body = await read_body(dict(request.headers.raw), request.receive, limit, scope[EXCHANGE])
    inference.check(pipeline, principal)  # other requests came while the body did
    record = record_in(scope)
    if record is not None:
        record.model = pipeline.name
        record.request_id = record.request_id or new_id()
    call = PipelineRequest(
        content_type,
        memoryview(body),
        tenant=None if principal is None else principal.tenant,
        client=client_in(scope),
        request_id="" if record is None else record.request_id,
    )
    call.priority, call.timeout_s = priority, timeout_s
    if len(body) > _SHORT_BYTES:
        call.descriptor = await asyncio.to_thread(in_memory, body)
        call.data = NOTHING
    try:
        pipeline.submit(call)
    except BatcherError as error:
        call.let_go()
        raise from_error(error) from None
    return call


def _options(request: Request) -> tuple[int, float | None]:
    """Return priority and timeout, which the query may have. Raises Problem."""
    values: dict[str, int] = {}
    for name, least, most in (("priority", 0, _LARGEST_PRIORITY), ("deadline_ms", 1, _LONGEST_MS)):
        text = request.query_params.get(name)
        if text is None:
            continue
        if not text.isascii() or not text.isdigit() or len(text) > 20 or not least <= int(text) <= most:
            detail = f"{name} must be a whole number from {least} to {most}, got {text[:40]!r}"
            raise Problem("bad-parameter", detail, parameter=name)
        values[name] = int(text)
    deadline_ms = values.get("deadline_ms")
    return values.get("priority", 0), None if deadline_ms is None else deadline_ms / 1000


class _Answering:
    """A call that was accepted, until its client has the answer."""

    def __init__(
        self, inference: Inference, pipeline: Pipeline, request: Request, call: PipelineRequest
    ) -> None:
        self._inference = inference
        self._pipeline = pipeline
        self._request = request
        self.call = call
        self._received_s = time.monotonic()

    async def response(self) -> Response:
        """Return the response once the answer has begun, or is whole. Raises Problem, ClientDisconnect."""
        call, content = self.call, self._pipeline.content
        assert content is not None
        silence_s = sse.SILENCE_S if content.streamed else None
        async with self._dropped_if_left():
            begun = await self._while_connected(
                lambda: call.head is None or not call.head.streamed, silence_s
            )
            if not begun or (call.head is not None and call.head.streamed):
                return _Events(self)
        self.note()
        if call.error is not None:
            raise from_error(call.error)
        assert call.head is not None
        self._pipeline.traffic.count(200, "", time.monotonic() - self._received_s)
        content_type = call.head.content_type.encode("latin-1", "replace")
        reply = Reply(200, content_type, tuple(call.items), timing=timing(call))
        return await compressed_response(self._inference, self._request, reply)

    async def events(self) -> AsyncIterator[bytes]:
        """Yield the events of a stream, the last of which says how it ended."""
        call = self.call
        while True:
            if not await self._while_connected(lambda: not call.items, sse.SILENCE_S):
                yield sse.COMMENT
            while call.items:
                yield sse.event(bytes(call.items.popleft()))
                call.taken()
            if call.ended and not call.items:
                break
        if call.error is None:
            yield sse.completed()
            return
        problem = from_error(call.error).reply(instance=self._pipeline.path)
        note_problem(self._request.scope, problem.slug)
        yield sse.failed(b"".join(problem.body))

    async def _while_connected(self, waits: Callable[[], bool], timeout_s: float | None) -> bool:
        """Wait while `waits()` and the call has not ended, at most `timeout_s` without a change.

        Return false if that passed. Raises ClientDisconnect.
        """
        call = self.call
        if not waits() or call.ended:
            return True
        left = asyncio.ensure_future(_disconnected(self._request.receive))
        try:
            while waits() and not call.ended:
                call.changed.clear()
                changed = asyncio.ensure_future(call.changed.wait())
                done, _ = await asyncio.wait(
                    (changed, left), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
                )
                changed.cancel()
                if left in done:
                    raise ClientDisconnect
                if not done:
                    return False
            return True
        finally:
            left.cancel()

    @contextlib.asynccontextmanager
    async def _dropped_if_left(self) -> AsyncIterator[None]:
        """Cancel the call if its client leaves, or the server ends this request."""
        try:
            yield
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Cancel the call, whose answer is not taken."""
        self._pipeline.cancel(self.call)
        self._pipeline.traffic.count(LEFT, LEFT_SLUG, 0.0)

    def note(self) -> None:
        """Note in the record where the call ran."""
        record = record_in(self._request.scope)
        if record is not None:
            record.ran(self.call)
            record.steps = self.call.steps

    def end(self) -> None:
        """Count a stream that ended while its client was there."""
        self.note()
        problem = None if self.call.error is None else from_error(self.call.error)
        status, slug = (200, "") if problem is None else (problem.kind.status, problem.kind.slug)
        self._pipeline.traffic.count(status, slug, time.monotonic() - self._received_s)


class _Events(Response):
    """A stream of events."""

    def __init__(self, answering: _Answering) -> None:
        super().__init__()
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = self._answering
        headers = [(b"content-type", sse.CONTENT_TYPE), *sse.HEADERS]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            async for part in answering.events():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except (ClientDisconnect, OSError):
            answering.drop()
        except BaseException:
            answering.drop()
            raise
        else:
            answering.end()


async def _disconnected(receive: Receive) -> None:
    """Wait for the client to disconnect: the only message after the body."""
    while (await receive())["type"] != "http.disconnect":
        pass


def timing(call: PipelineRequest) -> bytes:
    """Return Server-Timing: the call's time in the queue and in its process, and those of its steps."""
    batch = call.batch
    assert batch is not None
    queue_s, compute_s = batch.dispatched_s - call.enqueued_s, batch.finished_s - batch.started_s
    own = b"queue;dur=%.3f, compute;dur=%.3f" % (queue_s * 1e3, compute_s * 1e3)
    return b"%b, %b" % (own, server_timing(call.steps)) if call.steps else own
