"""What an item of POST /batch may ask for, and how it goes through the application."""

from __future__ import annotations

import asyncio
import re
from urllib.parse import unquote_to_bytes

from starlette.types import Message, Scope

from cobatch.server.auth.bearer import names_token
from cobatch.server.batch.messages import AnyItem, Item
from cobatch.server.http.problem import Problem
from cobatch.server.http.reply import JSON, Reply
from cobatch.server.observability.record import SEEN

_MODEL = r"/v2/models/[^/]+(?:/versions/[^/]+)?"
_PREDICTION = r"/v1/predictions/[^/]+"
# What an item may ask for. Nothing here answers without JSON, or leads to another batch.
_ALLOWED = (
    ("POST", re.compile(rf"{_MODEL}/infer|/v1/models/[^/]+/predictions")),
    ("GET", re.compile(rf"/v2(?:/health/(?:live|ready)|/models/stats)?|{_MODEL}(?:/ready|/config|/stats)?")),
    ("GET", re.compile(_PREDICTION)),
    ("DELETE", re.compile(_PREDICTION)),
)
_SUMMARY = "infer, predictions, metadata, health, /config and /stats"
# The item's own headers.
_ITEM_HEADERS = ("accept", "content-type", "idempotency-key", "prefer")
# The outer call's headers that hold for each item: who asks, and under which name it is traced.
_CARRIED = frozenset(
    (b"authorization", b"cookie", b"host", b"traceparent", b"tracestate", b"user-agent", b"x-api-key",
     b"x-request-id")
)  # fmt: skip
# What the router found out about the outer call, and the record of that.
_ROUTED = frozenset(("app", "app_root_path", "endpoint", "path_params", "route", "router", SEEN))


def scope_of(item: AnyItem, path: str, query: bytes, body: bytes, outer: Scope) -> Scope:
    """The scope for an item: the outer call's, with what is the item's own."""
    own = {b"content-type": JSON} if body else {}
    own |= {name.lower().encode(): value.encode() for name, value in (item.headers or {}).items()}
    own[b"content-length"] = b"%d" % len(body)
    carried = [header for header in outer["headers"] if header[0] in _CARRIED]
    scope = {key: value for key, value in outer.items() if key not in _ROUTED}
    path = scope.get("root_path", "") + path
    scope |= {"method": item.method, "path": path, "raw_path": path.encode(), "query_string": query}
    scope["headers"] = carried + list(own.items())
    return scope


class SubCall:
    """What stands for the connection of an item that goes through the application."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self._sent = False
        self._start: Message | None = None
        self._pieces: list[bytes] = []

    async def receive(self) -> Message:
        """The body; after that nothing, for when the client leaves the task is cancelled."""
        if self._sent:
            await asyncio.get_running_loop().create_future()
        self._sent = True
        return {"type": "http.request", "body": self.body, "more_body": False}

    async def send(self, message: Message) -> None:
        """Keep a piece of the answer."""
        if message["type"] == "http.response.start":
            self._start = message
        elif message["type"] == "http.response.body":
            self._pieces.append(message.get("body", b""))

    def reply(self) -> Reply:
        """The answer, once the application is done."""
        if self._start is None:
            return Problem("internal", "the server failed on this request; its log says why").reply()
        headers: dict[bytes, bytes] = dict(self._start["headers"])
        kind = headers.pop(b"content-type", JSON)
        return Reply(self._start["status"], kind, self._pieces, headers=tuple(headers.items()))


def body_of(item: AnyItem) -> bytes:
    """Its JSON text, empty where there is none or it is parsed already."""
    return bytes(item.body) if isinstance(item, Item) else b""


def checked(item: AnyItem) -> tuple[str, bytes]:
    """The item's path, unquoted, and its query, if it is one that a batch may ask for. Raises Problem."""
    target, _, query = item.url.partition("?")
    if names_token(query.encode()):
        raise Problem("not-batchable", "a token does not belong in an item's url", field="url")
    path = unquote_to_bytes(target).decode(errors="replace")
    methods = [method for method, pattern in _ALLOWED if pattern.fullmatch(path)]
    if not methods:
        detail = f"{item.url!r} cannot be asked for in a batch, only {_SUMMARY}"
        raise Problem("not-batchable", detail, field="url")
    if item.method not in methods:
        detail = f"in a batch, {path} takes {', '.join(methods)}, got {item.method}"
        raise Problem("method-not-allowed", detail, allowed=methods)
    return path, query.encode()


def check_headers(headers: dict[str, str]) -> None:
    """Raises Problem for a header that would be ignored, or not mean what it says."""
    for name, value in headers.items():
        if name.lower() not in _ITEM_HEADERS:
            detail = f"an item cannot have the header {name!r}"
            raise Problem("not-batchable", detail, field="headers", allowed=list(_ITEM_HEADERS))
        if name.lower() == "content-type" and value.partition(";")[0].strip().lower() != "application/json":
            detail = f"an item's body is JSON, not {value!r}"
            raise Problem("not-batchable", detail, field="headers", allowed=["application/json"])
