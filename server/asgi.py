"""The infer routes as ASGI: for any server that is not ours, for TLS terminators and test clients.

Same handler core as `server.fastpath`, and for requests that the fast path hands on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from server.auth.principal import principal_in
from server.compression import compressed
from server.core import Core, InferRequest, instance_of
from server.limits import BodyError, read_body
from server.problems import Problem
from server.record import note, record_in
from server.reply import Reply

# An answer that takes longer than once to twice this is worth a task that notices the client leave.
_WATCH_AFTER_S = 0.05
_JSON_LENGTH = b"inference-header-content-length"


class InferRoutes:
    """Answers POST /v2/models/NAME/infer itself and leaves everything else to `app`.

    Outermost, before the router and its middleware: they cost as much as the whole request. For the
    same reason POST requests to the paths in `direct` go to their applications from here.
    """

    def __init__(self, app: ASGIApp, core: Core, direct: Mapping[str, ASGIApp]) -> None:
        self.app = app
        self._direct = direct
        self.core = core
        self._paths = core.infer_paths
        self._waiting = _Waiting(core)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        model = None
        app = self.app
        if scope["type"] == "http" and scope["method"] == "POST":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            model = self._paths.get(path)
            if model is None:
                app = self._other(scope, path)
        if model is None:
            await app(scope, receive, send)
            return
        core = self.core
        headers = dict(scope["headers"])
        reply = None
        principal = principal_in(scope)
        if principal is not None or core.draining or model.batcher is None or model.batcher.full:
            reply = core.refusal(model, principal)
        if reply is None:
            try:
                json_length = None
                if _JSON_LENGTH in headers:
                    json_length = _json_length(headers, scope["headers"])
                body = await read_body(headers, receive, core.settings.server.max_body_bytes)
            except BodyError as error:
                if error.problem is None:
                    return  # the client has left
                reply = error.problem.reply(instance=instance_of(model))
            else:
                caller = _Caller(self._waiting, receive)
                caller.request = core.infer(
                    model, body, json_length, caller.on_reply, principal, record_in(scope)
                )
                reply = await caller.wait()
                if reply is None:
                    return
        if b"accept-encoding" in headers:
            least_bytes = core.settings.server.compress_min_bytes
            reply = await compressed(reply, headers[b"accept-encoding"], least_bytes)
        note(scope, reply.slug, reply.request_id)
        body = b"".join(reply.body)
        head = reply.header_list(len(body))
        await send({"type": "http.response.start", "status": reply.status, "headers": head})
        await send({"type": "http.response.body", "body": body})

    def _other(self, scope: Scope, path: str) -> ASGIApp:
        direct = self._direct.get(path)
        record = record_in(scope)
        if direct is not None and record is not None:
            record.route = path
        return direct or self.app


class _Caller:
    """A caller's task while its request is in the batcher."""

    __slots__ = ("_answer", "_receive", "_waiting", "old", "request")

    def __init__(self, waiting: _Waiting, receive: Receive) -> None:
        self._waiting = waiting
        self._receive = receive
        self._answer = waiting.new_future()
        self.request: InferRequest | None = None
        self.old = False

    def on_reply(self, reply: Reply) -> None:
        """What the core calls, once."""
        if not self._answer.done():
            self._answer.set_result(reply)

    async def wait(self) -> Reply | None:
        """The reply, or None when the client left before there was one."""
        callers = self._waiting.callers
        callers[self] = None
        try:
            return await self._answer
        except asyncio.CancelledError:
            # The server cancels this task.
            self._leave()
            raise
        finally:
            callers.pop(self, None)
            self.request = None  # or the two would keep each other until the next garbage collection

    async def watch(self) -> None:
        """Wait for the client to leave: after the body, that is all `receive` has to say."""
        await self._receive()
        if not self._answer.done():
            self._leave()
            self._answer.set_result(None)

    def _leave(self) -> None:
        if self.request is not None:
            self._waiting.core.cancel(self.request)


class _Waiting:
    """All callers that wait, and the tasks that watch for those leaving which wait long.

    To watch costs a task for each caller, a tenth of a small request. Most are answered long before
    anybody could have left, so a sweep gives the task only to those that it meets a second time.
    """

    def __init__(self, core: Core) -> None:
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
