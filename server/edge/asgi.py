"""The infer routes as ASGI: for any server that is not ours, for TLS terminators and test clients.

Same handler core as `server.edge.fast_path`, and for requests that the fast path hands on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from cobatch.server.auth.principal import PRINCIPAL
from cobatch.server.edge.exchange import EXCHANGE, Exchange
from cobatch.server.http.body import BodyError, read_body
from cobatch.server.http.compression import compressed
from cobatch.server.http.problem import Problem
from cobatch.server.http.reply import Reply
from cobatch.server.inference.model import Model
from cobatch.server.inference.service import Inference, InferRequest

# An answer that takes longer than once to twice this is worth a task that notices the client leave.
_WATCH_AFTER_S = 0.05
_JSON_LENGTH = b"inference-header-content-length"


class InferRoutes:
    """Answers POST /v2/models/NAME/infer itself and leaves everything else to `app`.

    Behind nothing but `server.edge.observed` and the gate, before the router and its middleware: they cost as
    much as the whole request. For the same reason POST requests to the paths in `direct` go to their
    applications from here.
    """

    def __init__(self, app: ASGIApp, core: Inference, direct: Mapping[str, ASGIApp]) -> None:
        self.app = app
        self._direct = direct
        self.core = core
        self._paths = core.infer_paths
        self._waiting = _Waiting(core)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Whoever it is for answers it; to find him takes no coroutine."""
        if scope["type"] == "http" and scope["method"] == "POST":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            model = self._paths.get(path)
            if model is not None:
                return self._infer(model, scope, receive, send)
            direct = self._direct.get(path)
            if direct is not None:
                scope[EXCHANGE].route = path
                return direct(scope, receive, send)
        return self.app(scope, receive, send)

    async def _infer(self, model: Model, scope: Scope, receive: Receive, send: Send) -> None:
        core = self.core
        seen: Exchange = scope[EXCHANGE]
        headers = seen.headers
        reply = None
        principal = scope.get(PRINCIPAL)
        problem = core.admit(model, principal)
        if problem is not None:
            reply = problem.reply(instance=model.infer_path)
        else:
            try:
                json_length = _json_length(headers, scope["headers"]) if _JSON_LENGTH in headers else None
                body = await read_body(headers, receive, core.settings.server.max_body_bytes)
            except BodyError as error:
                if error.problem is None:
                    return  # the client has left
                reply = error.problem.reply(instance=model.infer_path)
            else:
                caller = _Caller(self._waiting, receive, self._waiting.new_future(), seen)
                caller.request = core.infer(model, body, json_length, caller.on_reply, principal, seen.record)
                waiting = self._waiting.callers
                waiting[caller] = None
                try:
                    reply = await caller.answer
                except asyncio.CancelledError:
                    # The server cancels this task.
                    caller.leave()
                    raise
                finally:
                    waiting.pop(caller, None)
                    caller.request = None  # or the two would keep each other until the next collection
                if reply is None:
                    return
        if b"accept-encoding" in headers:
            least_bytes = core.settings.server.compress_min_bytes
            reply = await compressed(reply, headers[b"accept-encoding"], least_bytes)
        body = b"".join(reply.body)
        head = reply.header_list(len(body))
        seen.note_infer(model, reply.slug, reply.request_id, head)
        await send({"type": "http.response.start", "status": reply.status, "headers": head})
        await send({"type": "http.response.body", "body": body})


class _Caller(msgspec.Struct, eq=False):
    """A caller's task while its request is in the batcher. `answer`: None if he left before there was one."""

    waiting: _Waiting
    receive: Receive
    answer: asyncio.Future[Reply | None]
    seen: Exchange
    request: InferRequest | None = None
    old: bool = False

    def on_reply(self, reply: Reply) -> None:
        """What the core calls, once."""
        if reply.request_id is None and self.request is not None and self.seen.record is None:
            # Not an answer that says by its id where it rode.
            self.seen.make_record().ran(self.request)
        if not self.answer.done():
            self.answer.set_result(reply)

    async def watch(self) -> None:
        """Wait for the client to leave: after the body, that is all `receive` has to say."""
        await self.receive()
        if not self.answer.done():
            self.leave()
            self.answer.set_result(None)

    def leave(self) -> None:
        """Nobody waits for the answer any more."""
        if self.request is not None:
            self.waiting.core.cancel(self.request)


class _Waiting:
    """All callers that wait, and the tasks that watch for those leaving which wait long.

    To watch costs a task for each caller, a tenth of a small request. Most are answered long before
    anybody could have left, so a sweep gives the task only to those that it meets a second time.
    """

    def __init__(self, core: Inference) -> None:
        self.core = core
        self.callers: dict[_Caller, None] = {}
        self._tasks: dict[_Caller, asyncio.Task[None]] = {}
        self._sweeping = False

    def new_future(self) -> asyncio.Future[Reply | None]:
        """A future on the running loop; sees to it that there is a sweep."""
        loop = self.core.loop
        if loop is None:
            loop = self.core.loop = asyncio.get_running_loop()
        if not self._sweeping:
            self._sweeping = True
            loop.call_later(_WATCH_AFTER_S, self._sweep, loop)
        return loop.create_future()

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        for caller in [caller for caller in self._tasks if caller not in self.callers]:
            self._tasks.pop(caller).cancel()
        for caller in self.callers:
            if not caller.old:
                caller.old = True
            elif caller not in self._tasks:
                self._tasks[caller] = loop.create_task(caller.watch())
        self._sweeping = bool(self.callers or self._tasks)
        if self._sweeping:
            loop.call_later(_WATCH_AFTER_S, self._sweep, loop)


def _json_length(headers: dict[bytes, bytes], raw_headers: list[tuple[bytes, bytes]]) -> int:
    value = headers[_JSON_LENGTH]
    twice = len(raw_headers) != len(headers) and [name for name, _ in raw_headers].count(_JSON_LENGTH) > 1
    if twice or not value.isdigit() or len(value) > 18:
        raise BodyError(Problem("bad-binary", "Inference-Header-Content-Length must be one whole number"))
    return int(value)
