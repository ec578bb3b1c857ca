"""POST /batch: many requests in one call, each with an answer of its own.

Infer items go to the handler core as the fast path's requests do. All of them are submitted before
anything is awaited, so they stand in the queue together and ride in the same micro-batches. The other
items that are allowed go through the application, each in a task of its own and with a scope made for
it from the outer call's, so that its credentials hold for each. What is refused is the item, not the call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from msgspec import UNSET
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from cobatch.server.auth.principal import Principal, principal_in
from cobatch.server.batch.bulk import Member, submit_alike
from cobatch.server.batch.items import (
    AnyItem,
    InferItem,
    SubCall,
    body_of,
    check_headers,
    checked,
    decode_batch,
    decode_infer_batch,
    encode_batch,
    scope_of,
)
from cobatch.server.batch.spans import Items, ItemsSeen
from cobatch.server.edge.exchange import EXCHANGE, Exchange, record_in
from cobatch.server.http.body import BodyError, read_body
from cobatch.server.http.compression import compressed
from cobatch.server.http.problem import Problem, from_error, stopping
from cobatch.server.http.reply import JSON, PROBLEM, Reply, send_reply
from cobatch.server.http.request_id import new_id
from cobatch.server.inference.model import Model
from cobatch.server.inference.service import Inference, InferRequest, instance_of
from cobatch.server.observability.record import RequestRecord
from cobatch.server.observability.traffic import LEFT, LEFT_SLUG
from cobatch.server.settings.auth import INFER
from cobatch.server.v2.messages import InferMessage

log = logging.getLogger("cobatch.batch")

BATCH = "/batch"
# How long a call may take before it is worth a task that notices the client leave.
WATCH_AFTER_S = 0.05


def batch_routes() -> list[Route]:
    """The route, for Starlette's 405. `BatchRoute` serves it: the router would cost as much as some items."""

    async def batch(request: Request) -> Response:
        # Only with a line's end behind it, which Starlette's pattern lets through.
        path = request.url.path
        raise HTTPException(404, f"there is nothing at {path!r}")

    return [Route(BATCH, batch, methods=["POST"])]


class BatchRoute:
    """POST /batch as ASGI; `app` is the application for the items that are not infer requests."""

    def __init__(self, core: Inference, app: ASGIApp, seen: ItemsSeen) -> None:
        self._core = core
        self._app = app
        self._seen = seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            reply = await self._reply(scope, receive)
        except Problem as problem:
            reply = problem.reply(instance=scope["path"])
        if reply is not None:
            await send_reply(reply, scope, send)

    def _check(self, principal: Principal) -> None:
        """Raises Problem for a caller of whom no item would be taken, before the body is read."""
        if not principal.permissions:
            raise self._core.forbidden(INFER)
        tenant = principal.tenant
        if tenant.limited:
            refusal = tenant.refusal(1, 1, time.monotonic(), 0.0)
            if refusal is not None:
                raise from_error(refusal)

    async def _reply(self, scope: Scope, receive: Receive) -> Reply | None:
        """The answer, None when the client has left. Raises Problem."""
        settings = self._core.settings.server
        if self._core.draining:
            raise stopping()
        headers = dict(scope["headers"])
        principal = principal_in(scope)
        if principal is not None:
            self._check(principal)
        try:
            body = await read_body(headers, receive, settings.max_body_bytes)
        except BodyError as error:
            if error.problem is None:
                return None
            raise error.problem from None
        record = record_in(scope) or RequestRecord("", "POST", BATCH, time.monotonic())
        if principal is not None:
            record.tenant = principal.tenant.name
        call = _Call(self._core, self._app, scope, *_parse(self._core, body, settings.max_batch_items))
        try:
            replies = await call.answers(receive)
            if replies is None:
                return None
            record.request_id = record.request_id or new_id()
            await self._seen.all_done(record, call, replies, time.monotonic())
        finally:
            call.let_go()
        closing = any(reply.close for reply in replies)
        text = encode_batch(call.items, replies, record.request_id.encode())
        reply = Reply(200, JSON, (text,), close=closing)
        return await compressed(reply, headers.get(b"accept-encoding", b""), settings.compress_min_bytes)


# For each item the model that it is for, None where that takes a closer look.
_Models = Sequence[Model | None]


def _parse(core: Inference, body: bytes | bytearray, limit: int) -> tuple[Sequence[AnyItem], _Models]:
    """The items and their models. Raises Problem."""
    quick = decode_infer_batch(body, limit)
    if quick is not None:
        models = _models_of(core, quick)
        if all(model or item.message is UNSET for item, model in zip(quick, models, strict=True)):
            return quick, models
    items = decode_batch(body, limit)
    return items, _models_of(core, items)


def _models_of(core: Inference, items: Sequence[AnyItem]) -> _Models:
    paths = core.infer_paths
    return [paths.get(item.url) if item.method == "POST" and not item.headers else None for item in items]


class _Call(Items):
    """One call's items on their way."""

    def __init__(
        self, core: Inference, app: ASGIApp, scope: Scope, items: Sequence[AnyItem], models: _Models
    ) -> None:
        super().__init__(items, models)
        self._core = core
        self._app = app
        self._scope = scope
        self._principal = principal_in(scope)
        self._replies: list[Reply | None] = [None] * len(items)
        self._open = len(items)
        self._bytes = 0  # of the answers that came through the application
        self._tasks: list[asyncio.Task[None]] = []
        self._watcher: asyncio.Task[None] | None = None
        self._done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def answers(self, receive: Receive) -> list[Reply] | None:
        """All items' replies in order; None when the client left before there were all."""
        models = self.models.copy()
        for index, model in enumerate(models):
            if model is None:
                self._start_unusual(index, self.items[index])
        # After the tasks are made: they run before the batcher, told by the first of these, decides.
        alike: dict[Model, list[Member]] = {}
        for index, (item, model) in enumerate(zip(self.items, models, strict=True)):
            if model is not None and type(item) is InferItem and item.message is not UNSET:
                alike.setdefault(model, []).append((item.message, index))
            elif model is not None:
                self._infer(index, item, model)
        for model, members in alike.items():
            self.together += submit_alike(self._core, model, members, self, self._principal)
        if self._open:
            # Most are answered before anybody could have left, and a task costs as much as an item or two.
            timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._watch_for_leaving, receive)
            try:
                if not await self._done:
                    self._count_left()
                    return None
            finally:
                timer.cancel()
                if self._watcher is not None:
                    self._watcher.cancel()
                if self._open:
                    self._leave()
        replies = [reply for reply in self._replies if reply is not None]
        self._count(replies, time.monotonic() - self.began_s)
        return replies

    def _count(self, replies: list[Reply], duration_s: float) -> None:
        """Each infer item is a request for its model. It took as long as the call: nobody has it sooner."""
        alike = set(self.models)
        if len(alike) == 1 and None not in alike and not any(reply.slug for reply in replies):
            (model,) = alike
            model.traffic.count_alike(len(replies), duration_s)  # type: ignore[union-attr]  # not None
            return
        for model, reply in zip(self.models, replies, strict=True):
            if model is not None:
                model.traffic.count(reply.status, reply.slug, duration_s)

    def _count_left(self) -> None:
        """The client will not read any of the answers."""
        for model in self.models:
            if model is not None:
                model.traffic.count(LEFT, LEFT_SLUG, 0.0)

    def _watch_for_leaving(self, receive: Receive) -> None:
        self._watcher = asyncio.create_task(self._watch(receive))

    async def _watch(self, receive: Receive) -> None:
        # After the body, the only thing that can be received is that the client has left.
        await receive()
        if not self._done.done():
            self._done.set_result(False)

    def _leave(self) -> None:
        for request in [*self.together, *self.alone.values()]:
            self._core.cancel(request)
        for task in self._tasks:
            task.cancel()

    def answer(self, index: int, reply: Reply) -> None:
        """An item's answer is there."""
        self._replies[index] = reply
        self._open -= 1
        if not self._open and not self._done.done():
            self._done.set_result(True)

    def _infer(self, index: int, item: AnyItem, model: Model) -> None:
        request = self._infer_as_known(model, body_of(item), partial(self.answer, index))
        self._keep(index, request, item.url)

    def by_itself(self, model: Model, member: Member) -> None:
        """Ask for a member as if it had come alone."""
        message, index = member
        request = self._infer_as_known(model, message, partial(self.answer, index))
        self._keep(index, request, instance_of(model))

    def _infer_as_known(
        self, model: Model, body: bytes | InferMessage, reply: Callable[[Reply], None]
    ) -> InferRequest | None:
        """As the caller of the batch, who may not use every model."""
        principal = self._principal
        if principal is not None and not principal.may_infer(model.name):
            reply(self._core.forbidden(INFER, model.name).reply(instance=instance_of(model)))
            return None
        return self._core.infer(model, body, None, reply, principal)

    def _keep(self, index: int, request: InferRequest | None, instance: str) -> None:
        if request is None:
            return
        if any(binary for _, binary in request.wants):
            self._core.cancel(request)
            detail = "a batch's answers are JSON and carry no binary tensors"
            self.answer(index, Problem("not-batchable", detail, field="body").reply(instance=instance))
            return
        self.runs(index, request)

    def _start_unusual(self, index: int, item: AnyItem) -> None:
        try:
            if item.headers:
                check_headers(item.headers)
            path, query = checked(item)
        except Problem as problem:
            self.answer(index, problem.reply(instance=item.url.partition("?")[0]))
            return
        model = self._core.infer_paths.get(path) if item.method == "POST" else None
        if model is not None:
            self.models[index] = model
            self._infer(index, item, model)
        else:
            through = self._through_app(index, item, path, query)
            self._tasks.append(asyncio.create_task(through))

    async def _through_app(self, index: int, item: AnyItem, path: str, query: bytes) -> None:
        sub_call = SubCall(body_of(item))
        scope = scope_of(item, path, query, sub_call.body, self._scope)
        record = self.records[index] = RequestRecord("", item.method, path, time.monotonic())
        headers = dict(scope["headers"])
        scope[EXCHANGE] = Exchange(scope, sub_call.send, record.received_s, headers, record=record)
        try:
            await self._app(scope, sub_call.receive, sub_call.send)
        except Exception:
            log.exception("an item of a batch failed: %s %r", item.method, path)
        del scope[EXCHANGE]  # or the two would keep each other until the next garbage collection
        record.answered_s, record.slug = time.monotonic(), scope.get(PROBLEM, "")
        record.route = getattr(scope.get("route"), "path", "")
        reply = sub_call.reply()
        self._bytes += reply.length
        limit = self._core.settings.server.max_body_bytes
        if self._bytes > limit:
            # One kept answer asked for again and again would make a call's answer as large as one likes.
            detail = "the answers of this batch are larger than a body may be"
            problem = Problem("result-too-large", detail, body_bytes=self._bytes, limit_bytes=limit)
            reply = problem.reply(instance=item.url)
        self.answer(index, reply)
