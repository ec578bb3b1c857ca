"""The server as ASGI, for requests that are not on the fast path and for any other ASGI server.

`ObservingMiddleware` is outermost, then authentication (`server.auth.gate`), then `InferRoutes`, which
answers infer requests itself: Starlette's router and middleware would cost as much as the whole request.
"""

import asyncio
import time
from collections.abc import Awaitable, Hashable, Mapping

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cobatch.server.auth.principal import PRINCIPAL, principal_in
from cobatch.server.edge.exchange import EXCHANGE, HEADERS_BY_NAME, Exchange, client_in
from cobatch.server.http.asgi import PROBLEM, Share, note_problem, read_body, send_body
from cobatch.server.http.body_memory import FREE_BYTES, client_of
from cobatch.server.http.compression import choose
from cobatch.server.http.problem import Problem
from cobatch.server.http.reply import LONG_BYTES, Reply
from cobatch.server.inference.served import ServedModel
from cobatch.server.inference.service import Inference
from cobatch.server.observability.record import INFER_ROUTE, MARKS, REQUEST_ID, RequestRecord
from cobatch.server.observability.traffic import LEFT, LEFT_SLUG

# A response that takes longer than once to twice this is worth a task that notices a disconnect.
_WATCH_AFTER_S = 0.05
_JSON_LENGTH = b"inference-header-content-length"
# Other methods are invented by a client and must not each become a time series.
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"))


class AsgiExchange(Exchange, kw_only=True):
    """A request through ASGI. `headers`: the last of each name; `route`: its path with parameters' names.

    `model` is set when an infer request is answered; the head of the response has the id then.
    `answer`: resolved with the reply of an infer request, or None if the client disconnected.
    """

    scope: Scope
    send_on: Send
    receive: Receive
    headers: dict[bytes, bytes]
    answer: asyncio.Future[Reply | None] | None = None
    model: ServedModel | None = None
    route: str = ""
    status: int = 0
    watcher: asyncio.Task[None] | None = None
    share: Share | None = None

    def make_record(self) -> RequestRecord:
        scope = self.scope
        record = self.record = RequestRecord("", scope["method"], scope["path"], self.received_s)
        record.scheme = scope.get("scheme", "http")
        for name, value in scope["headers"]:
            if name in MARKS:
                record.mark(name, value)
        return record

    def send(self, message: Message) -> Awaitable[None]:
        """Pass a message on, the head of the response with its id. Not a coroutine, which would cost more."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.model is None:
                record = self.record or self.make_record()
                message["headers"] = [*message.get("headers", ()), *record.reply_headers()]
        return self.send_on(message)

    @property
    def client(self) -> Hashable:
        return client_in(self.scope)

    def deliver(self, reply: Reply | None) -> None:
        answer = self.answer
        if answer is not None and not answer.done():
            answer.set_result(reply)

    async def take_memory(self, size: int, held: int) -> None:
        """Take memory for the decompressed body. Raises Problem, ClientDisconnect."""
        inference = self.inference
        self.share = Share(inference.bodies, client_of(self.scope.get("client")))
        timeout_s = inference.settings.server.receive_timeout_s
        await self.share.take(size, self.receive, timeout_s, waits=held <= FREE_BYTES)

    async def watch(self) -> None:
        """Wait for the client to disconnect: after the body, `receive` returns nothing else."""
        await self.receive()
        if self.answer is not None and not self.answer.done():
            self.cancel()
            self.deliver(None)


class ObservingMiddleware:
    """Counts each request through ASGI and completes its record."""

    def __init__(self, app: ASGIApp, inference: Inference) -> None:
        self.app = app
        self._inference = inference

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        inference = self._inference
        headers = scope.get(HEADERS_BY_NAME) or dict(scope["headers"])
        exchange = AsgiExchange(
            inference, time.monotonic(), scope=scope, send_on=send, receive=receive, headers=headers
        )
        scope[EXCHANGE] = exchange
        marked = not MARKS.isdisjoint(headers)
        if marked or inference.observer.watched:
            exchange.begin(marked)
        try:
            await self.app(scope, receive, exchange.send)
        except Exception:
            exchange.status = exchange.status or 500
            scope.setdefault(PROBLEM, "internal")
            raise
        finally:
            del scope[EXCHANGE]  # they refer to each other
            if exchange.share is not None:
                exchange.share.give_back()
            if exchange.model is not None and exchange.record is None:
                exchange.finish(exchange.model, 200, "", time.monotonic())
            else:
                self._done(scope, exchange, exchange.record or exchange.make_record())

    def _done(self, scope: Scope, exchange: AsgiExchange, record: RequestRecord) -> None:
        now_s = time.monotonic()
        status, slug = exchange.status, scope.get(PROBLEM, "")
        if not status:
            status, slug = LEFT, LEFT_SLUG
        principal = principal_in(scope)
        if principal is not None:
            record.tenant = principal.tenant.name
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        model = self._inference.infer_paths.get(path) if record.method == "POST" else None
        if model is not None:
            record.route = INFER_ROUTE
            record.model = model.name
            exchange.finish(model, status, slug, now_s)
            return
        # Empty for a request that was refused before the router.
        record.route = exchange.route or getattr(scope.get("route"), "path", "")
        record.status, record.slug, record.answered_s = status, slug, now_s
        observer = self._inference.observer
        method = record.method if record.method in _METHODS else "other"
        observer.http[record.route, method, status, slug] += 1
        observer.request_done(record)


class InferRoutes:
    """Answers POST /v2/models/NAME/infer and passes everything else to `app`.

    POST requests to the paths in `direct` go to their own applications, past the router as well.
    """

    def __init__(self, app: ASGIApp, inference: Inference, direct: Mapping[str, ASGIApp]) -> None:
        self.app = app
        self._direct = direct
        self._inference = inference
        self._watch = _DisconnectWatch()

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Find the application for the request, without a coroutine."""
        if scope["type"] == "http" and scope["method"] == "POST":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            model = self._inference.infer_paths.get(path)
            if model is not None:
                return self._infer(model, scope, receive, send)
            direct = self._direct.get(path)
            if direct is not None:
                scope[EXCHANGE].route = path
                return direct(scope, receive, send)
        return self.app(scope, receive, send)

    async def _infer(self, model: ServedModel, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: AsgiExchange = scope[EXCHANGE]
        headers = exchange.headers
        inference = self._inference
        principal = scope.get(PRINCIPAL)
        problem = inference.admit(model, principal)
        reply = None if problem is None else problem.reply(instance=model.infer_path)
        if reply is None:
            try:
                json_length = _json_length(headers, scope["headers"]) if _JSON_LENGTH in headers else None
                settings = inference.settings.server
                limit = inference.max_json_bytes if json_length is None else settings.max_body_bytes
                body = await read_body(headers, receive, limit, exchange)
            except ClientDisconnect:
                return
            except Problem as error:
                reply = error.reply(instance=model.infer_path)
        if reply is None:
            if b"accept-encoding" in headers:
                exchange.coding = choose(headers[b"accept-encoding"])
            answer = exchange.answer = asyncio.get_running_loop().create_future()
            exchange.request = inference.infer(model, body, json_length, exchange.on_reply, principal)
            del body  # it is gone when it is decoded
            self._watch.add(exchange)
            try:
                reply = await answer
            finally:
                self._watch.discard(exchange)
                if exchange.request is not None:
                    exchange.cancel()  # the server cancels this task
            if reply is None:
                return
        assert reply is not None
        exchange.model = model
        if reply.request_id is None or exchange.record is not None:
            exchange.add_id(reply)
        note_problem(scope, reply.slug)
        length = sum(map(len, reply.body))
        head = reply.header_list(length)
        if reply.request_id is not None:
            head.append((REQUEST_ID, reply.request_id))
        await send({"type": "http.response.start", "status": reply.status, "headers": head})
        if length < LONG_BYTES:
            await send({"type": "http.response.body", "body": b"".join(reply.body)})
        else:
            await send_body(reply, send)


class _DisconnectWatch:
    """Exchanges that wait for their answer, and a task for each that waits long.

    A task costs a tenth of a small request, and most requests are answered before a client could disconnect;
    so a periodic sweep starts a task only for an exchange that it meets a second time.
    """

    def __init__(self) -> None:
        self._waiting: dict[AsgiExchange, bool] = {}  # True: met by a sweep
        self._sweeping = False

    def add(self, exchange: AsgiExchange) -> None:
        """Watch an exchange."""
        self._waiting[exchange] = False
        if not self._sweeping:
            self._sweeping = True
            asyncio.get_running_loop().call_later(_WATCH_AFTER_S, self._sweep)

    def discard(self, exchange: AsgiExchange) -> None:
        """Watch an exchange no more."""
        self._waiting.pop(exchange, None)
        watcher, exchange.watcher = exchange.watcher, None  # its frames refer to the exchange
        if watcher is not None:
            watcher.cancel()

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        for exchange, met in self._waiting.items():
            self._waiting[exchange] = True
            if met and exchange.watcher is None:
                exchange.watcher = loop.create_task(exchange.watch())
        self._sweeping = bool(self._waiting)
        if self._sweeping:
            loop.call_later(_WATCH_AFTER_S, self._sweep)


def _json_length(headers: dict[bytes, bytes], raw_headers: list[tuple[bytes, bytes]]) -> int:
    value = headers[_JSON_LENGTH]
    repeated = len(raw_headers) != len(headers) and [name for name, _ in raw_headers].count(_JSON_LENGTH) > 1
    if repeated or not value.isdigit() or len(value) > 18:
        raise Problem("bad-binary", "Inference-Header-Content-Length must be one whole number")
    return int(value)
