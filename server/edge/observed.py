"""Outermost around the ASGI application: counts each request that does not come over the fast path, and
makes its record."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Receive, Scope, Send

from cobatch.server.auth.principal import principal_in
from cobatch.server.edge.exchange import EXCHANGE, Exchange
from cobatch.server.http.reply import PROBLEM
from cobatch.server.inference.service import Inference
from cobatch.server.observability.record import INFER_ROUTE, MARKS, RequestRecord
from cobatch.server.observability.traffic import LEFT, LEFT_SLUG

# The standard ones; others are a client's invention, and must not become so many time series.
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"))
_FAILED = 500


class ObservingMiddleware:
    """The application, watched."""

    def __init__(self, app: ASGIApp, core: Inference) -> None:
        self.app = app
        self._core = core

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        seen = scope[EXCHANGE] = Exchange(scope, send, time.monotonic(), headers)
        observer = self._core.observer
        if observer.watched or not MARKS.isdisjoint(headers):
            record = seen.make_record()
            if observer.watched:
                observer.begin(record, observer.draw())
        try:
            await self.app(scope, receive, seen.send)
        except Exception:
            # Whoever runs the application answers it, or has no more to answer to.
            seen.status = seen.status or _FAILED
            scope.setdefault(PROBLEM, "internal")
            raise
        finally:
            del scope[EXCHANGE]  # or the two would keep each other until the next garbage collection
            model = seen.model
            if model is None:
                self._done(scope, seen, seen.record or seen.make_record())
            else:
                # It rode in a batch; that it is counted in is seen to once for each batch.
                model.infer_traffic.durations.values.append(time.monotonic() - seen.received_s)

    def _done(self, scope: Scope, seen: Exchange, record: RequestRecord) -> None:
        record.answered_s = time.monotonic()
        record.status, record.slug = seen.status, scope.get(PROBLEM, "")
        if not seen.status:
            record.status, record.slug = LEFT, LEFT_SLUG
        principal = principal_in(scope)
        if principal is not None:
            record.tenant = principal.tenant.name
        observer = self._core.observer
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        model = self._core.infer_paths.get(path) if record.method == "POST" else None
        if model is None:
            # A route that the router did not come to (the gate refused it) has no name here.
            record.route = seen.route or getattr(scope.get("route"), "path", "")
            method = record.method if record.method in _METHODS else "other"
            observer.http[record.route, method, record.status, record.slug] += 1
        else:
            record.route = INFER_ROUTE
            record.model = model.name
            model.infer_traffic.count(record.status, record.slug, record.answered_s - record.received_s)
        observer.request_done(record)
