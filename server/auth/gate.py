"""ASGI middleware that authenticates every request before the application sees it.

The open paths are listed here; every other path, existing or future, needs a credential. The permission that
a route needs is declared with the route (`server.api.routing.guarded`).
"""

import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cobatch.server.auth.authenticator import Authenticator
from cobatch.server.auth.credentials import WELL_KNOWN
from cobatch.server.auth.principal import PRINCIPAL, Principal
from cobatch.server.auth.tenants import rate_limit_headers
from cobatch.server.http.asgi import send_reply
from cobatch.server.http.problem import Problem

# Health, the index, the meaning of problems, OAuth metadata, and the live page without its data.
OPEN = re.compile(
    r"/|/v2/health/(?:live|ready)|/v2/models/[^/]+(?:/versions/[^/]+)?/ready|/problems(?:/[^/]*)?"
    rf"|/dashboard(?:/static/[^/]*)?|{WELL_KNOWN}(?:/.*)?"
)


class Gate:
    """Puts the principal into the ASGI scope, or sends the refusal."""

    def __init__(self, app: ASGIApp, auth: Authenticator, *, open_metrics: bool = False) -> None:
        self._app = app
        self._auth = auth
        self._open = re.compile(rf"{OPEN.pattern}|/metrics") if open_metrics else OPEN

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_open(scope):
            address = (scope.get("client") or ("",))[0]
            try:
                principal = await self._auth.authenticate(scope["headers"], scope["query_string"], address)
            except Problem as problem:
                await send_reply(problem.reply(instance=scope["path"]), scope, send)
                return
            scope[PRINCIPAL] = principal
            if self._auth.settings.rate_limit_headers and principal.tenant.limited:
                send = _with_rate_limit_headers(send, principal)
        await self._app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        return scope["method"] in ("GET", "HEAD") and self._open.fullmatch(path) is not None


def _with_rate_limit_headers(send: Send, principal: Principal) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = rate_limit_headers(principal.tenant, time.monotonic())
            message = {**message, "headers": [*message["headers"], *headers]}
        await send(message)

    return send_with_headers
