"""The infer routes as ASGI: for any server that is not ours, for TLS terminators and test clients.

Same handler core as `server.fastpath`, and for requests that the fast path hands on.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from server.core import Core, InferRequest
from server.limits import BodyError, read_body
from server.model import Model
from server.problems import Problem
from server.reply import Reply


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
            json_length = _json_length(scope)
            body = await read_body(scope, receive, core.settings.server.max_body_bytes)
        except BodyError as error:
            return None if error.problem is None else error.problem.reply()
        except Problem as problem:
            return problem.reply()
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        request = core.infer(model, body, json_length, answer.set_result)
        if request is None:
            return answer.result()
        return await self._wait(request, answer, receive)

    async def _wait(
        self, request: InferRequest, answer: asyncio.Future[Reply], receive: Receive
    ) -> Reply | None:
        def left(_: asyncio.Future[Any]) -> None:
            if not answer.done():
                answer.cancel()

        # After the body, the only message there can be says that the client has left.
        watch = asyncio.ensure_future(receive())
        watch.add_done_callback(left)
        try:
            return await answer
        except asyncio.CancelledError:
            self.core.cancel(request)
            if not watch.done():
                raise  # not the client: the server cancelled this task
            return None
        finally:
            watch.cancel()


def _json_length(scope: Scope) -> int | None:
    found: int | None = None
    for name, value in scope["headers"]:
        if name == b"inference-header-content-length":
            if found is not None or not value.isdigit() or len(value) > 18:
                raise Problem("bad-binary", "Inference-Header-Content-Length must be one whole number")
            found = int(value)
    return found


async def send_reply(reply: Reply, send: Send) -> None:
    """Write a reply as ASGI messages."""
    await send({"type": "http.response.start", "status": reply.status, "headers": reply.header_list()})
    await send({"type": "http.response.body", "body": b"".join(reply.body)})
