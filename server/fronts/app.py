"""A front's application: infer requests that are not on the fast path."""

import asyncio
import contextlib

from starlette.types import ASGIApp, Receive, Scope, Send

from cobatch.server.auth.gate import Gate
from cobatch.server.edge.asgi import InferRoutes, ObservingMiddleware
from cobatch.server.http.problem import Problem
from cobatch.server.http.reply import send_reply
from cobatch.server.inference.service import Inference


class FrontApp:
    """Answers infer requests; all others are relayed to home before they get here."""

    def __init__(self, inference: Inference) -> None:
        self._inference = inference

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            problem = Problem("not-found", f"there is nothing at {scope['path']}")
            await send_reply(problem.reply(instance=scope["path"]), scope, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        """Run what a front runs beside its requests, from its start to its end."""
        inference = self._inference
        inference.loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as stack:
            inference.observer.lag.start(inference.loop)
            stack.callback(inference.observer.lag.stop)
            if inference.observer.log_stream.start():
                stack.push_async_callback(asyncio.to_thread, inference.observer.log_stream.stop)
            if inference.auth is not None:
                await inference.auth.start(inference.tell_if_ready)
                stack.push_async_callback(inference.auth.stop)
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})


def front_app(inference: Inference) -> ASGIApp:
    """Return the application of a front."""
    settings = inference.settings.server
    app: ASGIApp = InferRoutes(FrontApp(inference), inference, {})
    if inference.auth is not None:
        app = Gate(app, inference.auth, open_metrics=settings.metrics_open)
    return ObservingMiddleware(app, inference)
