"""POST /batch: many requests in one call, each with an answer of its own.

Infer items go to the handler core as the fast path's requests do. All of them are submitted before
anything is awaited, so they stand in the queue together and ride in the same micro-batches. The other
items that are allowed go through the application, each in a task of its own and with a scope made for
it from the outer call's, so that its credentials hold for each. What is refused is the item, not the call.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Sequence
from functools import partial
from typing import Any
from urllib.parse import unquote_to_bytes

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope

from server.batch_messages import (
    AnyItem,
    InferItem,
    Item,
    decode_batch,
    decode_infer_batch,
    encode_batch,
)
from server.compression import choose, compress
from server.core import Core, InferRequest
from server.limits import BodyError, read_body
from server.model import Model
from server.problems import Problem
from server.reply import JSON, Reply
from server.routing import as_response, problems_answered

log = logging.getLogger("cobatch.batch")

_MODEL = r"/v2/models/[^/]+(?:/versions/[^/]+)?"
_PREDICTION = r"/v1/predictions/[^/]+"
# What an item may ask for. Nothing here answers without JSON, or leads to another batch.
_ALLOWED = (
    ("POST", re.compile(rf"{_MODEL}/infer|/v1/models/[^/]+/predictions")),
    ("GET", re.compile(rf"/v2(?:/health/(?:live|ready)|/models/stats)?|{_MODEL}(?:/ready|/config|/stats)?")),
    ("GET", re.compile(_PREDICTION)),
    ("DELETE", re.compile(_PREDICTION)),
)
_SUMMARY = "infer, predictions, metadata, health, /config and /stats"
# The item's own headers.
_ITEM_HEADERS = ("accept", "content-type", "idempotency-key", "prefer")
# The outer call's headers that hold for each item: who asks, and under which name it is traced.
_CARRIED = frozenset(
    (b"authorization", b"cookie", b"host", b"traceparent", b"tracestate", b"user-agent", b"x-api-key",
     b"x-request-id")
)  # fmt: skip
# What the router found out about the outer call.
_ROUTED = frozenset(("app", "app_root_path", "endpoint", "path_params", "route", "router"))


def batch_routes(core: Core) -> list[Route]:
    """The route, for Starlette."""
    limit = core.settings.server.max_batch_items

    async def batch(request: Request) -> Response:
        if core.draining:
            raise Problem("draining", "the server is about to stop", close=True, retry_after_s=1)
        headers = dict(request.scope["headers"])
        try:
            body = await read_body(headers, request.receive, core.settings.server.max_body_bytes)
        except BodyError as error:
            if error.problem is None:
                return Response(status_code=499)  # nobody is there to read it
            raise error.problem from None
        call = _Call(core, request.app, request.scope, *_parse(core, body, limit))
        replies = await call.answers(request.receive)
        if replies is None:
            return Response(status_code=499)
        closing = any(reply.close for reply in replies)
        reply = Reply(200, JSON, (encode_batch(call.items, replies),), close=closing)
        coding = choose(headers.get(b"accept-encoding", b""))
        if coding is not None and reply.length >= core.settings.server.compress_min_bytes:
            reply = await asyncio.to_thread(compress, reply, coding)
        return as_response(reply)

    return [Route("/batch", problems_answered(batch), methods=["POST"])]


# For each item the model that it is for, None where that takes a closer look.
_Models = Sequence[Model | None]


def _parse(core: Core, body: bytes | bytearray, limit: int) -> tuple[Sequence[AnyItem], _Models]:
    """The items and their models. Raises Problem."""
    quick = decode_infer_batch(body, limit)
    if quick is not None:
        models = _models_of(core, quick)
        if all(model or item.message is UNSET for item, model in zip(quick, models, strict=True)):
            return quick, models
    items = decode_batch(body, limit)
    return items, _models_of(core, items)


def _models_of(core: Core, items: Sequence[AnyItem]) -> _Models:
    targets = core.infer_targets
    return [
        targets.get(item.url.encode()) if item.method == "POST" and not item.headers else None
        for item in items
    ]


class _Call:
    """One call's items on their way."""

    def __init__(
        self, core: Core, app: ASGIApp, scope: Scope, items: Sequence[AnyItem], models: _Models
    ) -> None:
        self.items = items
        self._models = models
        self._core = core
        self._app = app
        self._scope = scope
        self._replies: list[Reply | None] = [None] * len(items)
        self._open = len(items)
        self._requests: list[InferRequest] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def answers(self, receive: Receive) -> list[Reply] | None:
        """All items' replies in order; None when the client left before there were all."""
        for index, model in enumerate(self._models):
            if model is None:
                self._start_unusual(index, self.items[index])
        # After the tasks are made: they run before the batcher, told by the first of these, decides.
        for index, model in enumerate(self._models):
            if model is not None:
                self._infer(index, self.items[index], model)
        if self._open:
            # After the body, the only thing that can be received is that the client has left.
            watcher = asyncio.create_task(self._watch(receive))
            try:
                if not await self._done:
                    return None
            finally:
                watcher.cancel()
                if self._open:
                    self._leave()
                # They and this object keep each other, until the next garbage collection.
                self._requests.clear()
        return [reply for reply in self._replies if reply is not None]

    async def _watch(self, receive: Receive) -> None:
        await receive()
        if not self._done.done():
            self._done.set_result(False)

    def _leave(self) -> None:
        for request in self._requests:
            self._core.cancel(request)
        for task in self._tasks:
            task.cancel()

    def _answer(self, index: int, reply: Reply) -> None:
        self._replies[index] = reply
        self._open -= 1
        if not self._open and not self._done.done():
            self._done.set_result(True)

    def _infer(self, index: int, item: AnyItem, model: Model) -> None:
        reply = partial(self._answer, index)
        if type(item) is InferItem and item.message is not UNSET:
            request = self._core.infer_message(model, item.message, reply)
        else:
            request = self._core.infer(model, _body_of(item), None, reply)
        if request is None:
            return
        for _, binary in request.wants:
            if binary:
                self._core.cancel(request)
                detail = "a batch's answers are JSON and carry no binary tensors"
                self._answer(index, Problem("not-batchable", detail, field="body").reply(instance=item.url))
                return
        self._requests.append(request)

    def _start_unusual(self, index: int, item: AnyItem) -> None:
        try:
            if item.headers:
                _check_headers(item.headers)
            path, query = _checked(item)
        except Problem as problem:
            self._answer(index, problem.reply(instance=item.url))
            return
        model = self._core.infer_targets.get(path.encode()) if item.method == "POST" else None
        if model is not None:
            self._infer(index, item, model)
        else:
            through = self._through_app(index, item, path, query)
            self._tasks.append(asyncio.create_task(through))

    async def _through_app(self, index: int, item: AnyItem, path: str, query: bytes) -> None:
        sub_call = _SubCall(_body_of(item))
        own = {b"content-type": JSON} if sub_call.body else {}
        own |= {name.lower().encode(): value.encode() for name, value in (item.headers or {}).items()}
        own[b"content-length"] = b"%d" % len(sub_call.body)
        carried = [header for header in self._scope["headers"] if header[0] in _CARRIED]
        scope = {key: value for key, value in self._scope.items() if key not in _ROUTED}
        path = scope.get("root_path", "") + path
        scope |= {"method": item.method, "path": path, "raw_path": path.encode(), "query_string": query}
        scope["headers"] = carried + list(own.items())
        try:
            await self._app(scope, sub_call.receive, sub_call.send)
        except Exception:
            log.exception("an item of a batch failed: %s %s", item.method, path)
        self._answer(index, sub_call.reply())


class _SubCall:
    """What stands for the connection of an item that goes through the application."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self._sent = False
        self._start: Message | None = None
        self._pieces: list[bytes] = []

    async def receive(self) -> Message:
        """The body; after that nothing, for when the client leaves the task is cancelled."""
        if self._sent:
            await asyncio.get_running_loop().create_future()
        self._sent = True
        return {"type": "http.request", "body": self.body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Keep a piece of the answer."""
        if message["type"] == "http.response.start":
            self._start = message
        elif message["type"] == "http.response.body":
            self._pieces.append(message.get("body", b""))

    def reply(self) -> Reply:
        """The answer, once the application is done."""
        if self._start is None:
            return Problem("internal", "the server failed on this request; its log says why").reply()
        headers: dict[bytes, bytes] = dict(self._start["headers"])
        kind = headers.pop(b"content-type", JSON)
        return Reply(self._start["status"], kind, self._pieces, headers=tuple(headers.items()))


def _body_of(item: AnyItem) -> bytes:
    return bytes(item.body) if isinstance(item, Item) else b""


def _checked(item: AnyItem) -> tuple[str, bytes]:
    """The item's path, unquoted, and its query, if it is one that a batch may ask for. Raises Problem."""
    target, _, query = item.url.partition("?")
    path = unquote_to_bytes(target).decode(errors="replace")
    methods = [method for method, pattern in _ALLOWED if pattern.fullmatch(path)]
    if not methods:
        detail = f"{item.url!r} cannot be asked for in a batch, only {_SUMMARY}"
        raise Problem("not-batchable", detail, field="url")
    if item.method not in methods:
        detail = f"in a batch, {path} takes {', '.join(methods)}, got {item.method}"
        raise Problem("method-not-allowed", detail, allowed=methods)
    return path, query.encode()


def _check_headers(headers: dict[str, Any]) -> None:
    """Raises Problem for a header that would be ignored, or not mean what it says."""
    for name, value in headers.items():
        if name.lower() not in _ITEM_HEADERS:
            detail = f"an item cannot have the header {name!r}"
            raise Problem("not-batchable", detail, field="headers", allowed=list(_ITEM_HEADERS))
        if name.lower() == "content-type" and value.partition(";")[0].strip().lower() != "application/json":
            detail = f"an item's body is JSON, not {value!r}"
            raise Problem("not-batchable", detail, field="headers", allowed=["application/json"])
