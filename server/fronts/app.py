"""A front's application: infer requests that are not on the fast path."""

import contextlib
from collections.abc import AsyncIterator

from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from cobatch.server.app import make_sinks, observing
from cobatch.server.auth.gate import Gate
from cobatch.server.edge.asgi import InferRoutes, ObservingMiddleware
from cobatch.server.fronts.relay import unavailable
from cobatch.server.http.asgi import send_reply
from cobatch.server.http.reply import JSON, Reply
from cobatch.server.inference.service import Inference

_LIVE = "/v2/health/live"


async def _without_home(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request that would be relayed if there were a home. The server is alive: one is started."""
    lives = scope["path"] == _LIVE and scope["method"] in ("GET", "HEAD")
    reply = Reply(200, JSON, (b'{"live":true}',)) if lives else unavailable().reply(instance=scope["path"])
    await send_reply(reply, scope, send)


def front_app(inference: Inference) -> ASGIApp:
    """Return the application of a front. Raises SettingsError if a library is missing."""
    settings = inference.settings.server
    sinks = make_sinks(inference)

    @contextlib.asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        async with observing(inference, sinks):
            yield

    router = Router(redirect_slashes=False, default=_without_home, lifespan=lifespan)
    app: ASGIApp = InferRoutes(router, inference, {})
    if inference.auth is not None:
        app = Gate(app, inference.auth, open_metrics=settings.metrics_open)
    return ObservingMiddleware(app, inference)
