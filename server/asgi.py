"""The infer routes as ASGI: for any server that is not ours, for TLS terminators and test clients.

Same handler core as `server.fastpath`, and for requests that the fast path hands on.
"""

from __future__ import annotations

import asyncio
from starlette.types import ASGIApp, Receive, Scope, Send

from server.core import Core
from server.limits import BodyError, read_body
from server.model import Model
from server.problems import Problem
from server.reply import Reply
from server.v2_decode import Body


class InferRoutes:
    """Answers POST /v2/models/NAME/infer itself and leaves everything else to `app`.

    Outermost, before the router and its middleware: they cost as much as the whole request.
    """

    def __init__(self, app: ASGIApp, core: Core) -> None:
        self.app = app
        self.core = core
        self._paths = {f"/v2/models/{name}/infer": model for name, model in core.models.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        model = None
        if scope["type"] == "http" and scope["method"] == "POST":
            model = self._paths.get(scope["path"].removeprefix(scope.get("root_path", "")))
        if model is None:
            await self.app(scope, receive, send)
            return
        reply = await self._answer(model, scope, receive)
        if reply is not None:
            await send_reply(reply, send)

    async def _answer(self, model: Model, scope: Scope, receive: Receive) -> Reply | None:
        """The reply, or None when the client has left."""
        core = self.core
        refusal = core.refusal(model)
        if refusal is not None:
            return refusal
        try:
            headers = dict(scope["headers"])
            json_length = _json_length(headers)
            body = await read_body(headers, receive, core.settings.server.max_body_bytes)
        except BodyError as error:
            return None if error.problem is None else error.problem.reply()
        except Problem as problem:
            return problem.reply()
        return await _Waiting(core).infer(model, body, json_length, receive)


class _Waiting:
    """A caller's task while its request is in the batcher.

    After the body, `receive` has one thing left to say: that the client has left. So the task waits
    in `receive`, and the reply takes it out of there by cancelling that wait. A second task to watch
    for the client, beside a future for the reply, costs a quarter of the whole request.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        # Naming the loop saves asking which one runs, which on Python 3.11 costs a system call.
        self._task = asyncio.current_task(core.loop)
        self._waits = False
        self._reply: Reply | None = None

    async def infer(
        self, model: Model, body: Body, json_length: int | None, receive: Receive
    ) -> Reply | None:
        """The reply, or None when the client left before there was one."""
        request = self._core.infer(model, body, json_length, self._on_reply)
        if request is None:
            return self._reply
        self._waits = True
        try:
            await receive()
        except asyncio.CancelledError:
            if self._reply is None:
                # Not the reply: the server cancels this task.
                self._core.cancel(request)
                raise
            assert self._task is not None
            self._task.uncancel()
        self._waits = False
        if self._reply is None:
            self._core.cancel(request)
        return self._reply

    def _on_reply(self, reply: Reply) -> None:
        self._reply = reply
        if self._waits:
            assert self._task is not None
            self._task.cancel()


def _json_length(headers: dict[bytes, bytes]) -> int | None:
    value = headers.get(b"inference-header-content-length")
    if value is None:
        return None
    if not value.isdigit() or len(value) > 18:
        raise Problem("bad-binary", "Inference-Header-Content-Length must be a whole number")
    return int(value)


async def send_reply(reply: Reply, send: Send) -> None:
    """Write a reply as ASGI messages."""
    await send({"type": "http.response.start", "status": reply.status, "headers": reply.header_list()})
    await send({"type": "http.response.body", "body": b"".join(reply.body)})
