"""Outermost around the ASGI application: counts each request that does not come over the fast path, and
makes its record."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.auth.principal import principal_in
from server.core import Core
from server.observe import LEFT, LEFT_SLUG
from server.record import INFER_ROUTE, MARKS, RECORD, Record, reply_headers

# The standard ones; others are a client's invention, and must not become so many time series.
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"))
_FAILED = 500


class Observed:
    """The application, watched."""

    def __init__(self, app: ASGIApp, core: Core) -> None:
        self.app = app
        self._core = core

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]
        record = Record("", scope["method"], path, time.monotonic())
        record.scheme = scope.get("scheme", "http")
        for name, value in scope["headers"]:
            if name in MARKS:
                record.mark(name, value)
        scope[RECORD] = record
        observer = self._core.observer
        if observer.watched:
            observer.begin(record, observer.draw())

        async def send_observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *reply_headers(record)]
            await send(message)

        try:
            await self.app(scope, receive, send_observed)
        except Exception:
            # Whoever runs the application answers it, or has no more to answer to.
            record.status = record.status or _FAILED
            record.slug = record.slug or "internal"
            raise
        finally:
            self._done(scope, record)

    def _done(self, scope: Scope, record: Record) -> None:
        record.answered_s = time.monotonic()
        if not record.status:
            record.status, record.slug = LEFT, LEFT_SLUG
        self._note_route(scope, record)
        principal = principal_in(scope)
        if principal is not None:
            record.tenant = principal.tenant.name
        observer = self._core.observer
        method = record.method if record.method in _METHODS else "other"
        observer.http[record.route, method, record.status, record.slug] += 1
        observer.request_done(record)

    def _note_route(self, scope: Scope, record: Record) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        model = self._core.infer_paths.get(path) if record.method == "POST" else None
        if model is None:
            route = scope.get("route")
            # A route that the router did not come to (the gate refused it) has no name here.
            record.route = record.route or getattr(route, "path", "")
            return
        record.route = INFER_ROUTE
        record.model = model.name
        model.traffic.count(record.status, record.slug, record.answered_s - record.received_s)
