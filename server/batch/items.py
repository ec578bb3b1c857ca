"""The body of POST /batch as types, and its answer as bytes.

Items' bodies are passed on as the text that came and spliced into the answer as the text that was made:
neither is decoded and encoded again on the way.

What an item of POST /batch may ask for, and how it goes through the application.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Sequence
from typing import Annotated
from urllib.parse import unquote_to_bytes

import msgspec
from starlette.types import Message, Scope

from cobatch.server.auth.credentials import names_token
from cobatch.server.edge.exchange import EXCHANGE
from cobatch.server.http.problem import Problem
from cobatch.server.http.reply import JSON, PROBLEM, Reply
from cobatch.server.v2.messages import LARGE_BYTES, InferMessage

_encode = msgspec.json.encode
# Of an answer's headers, those that an item repeats; the rest are the connection's.
_OF_CONNECTION = frozenset((b"content-length", b"connection", b"date", b"server"))


class _Tally(threading.local):
    """How many more items a body may have: counted while it is parsed, as it may have millions."""

    limit = 0
    left = 0


_tally = _Tally()


class _Head(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """What a request has beside its body. Fields that nobody knows could change what is meant."""

    id: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    url: str
    method: str
    headers: dict[str, str] | None = None


class Item(_Head, gc=False, forbid_unknown_fields=True):
    """One request. `body` is JSON text, empty where there is none."""

    body: msgspec.Raw = msgspec.Raw(b"")

    def __post_init__(self) -> None:
        if not _tally.left:
            detail = f"the batch has more than {_tally.limit} items"
            raise Problem("too-many-items", detail, limit=_tally.limit)
        _tally.left -= 1


class InferItem(_Head, gc=False, forbid_unknown_fields=True):
    """One request whose body, if it has one, is an infer message, parsed together with the batch."""

    message: InferMessage | msgspec.UnsetType = msgspec.field(default=msgspec.UNSET, name="body")


AnyItem = Item | InferItem


class _Batch(msgspec.Struct, forbid_unknown_fields=True):
    requests: list[Item]


class _InferBatch(msgspec.Struct, forbid_unknown_fields=True):
    requests: list[InferItem]


_decode = msgspec.json.Decoder(_Batch).decode
_decode_infer = msgspec.json.Decoder(_InferBatch).decode


def decode_infer_batch(body: bytes | bytearray, limit: int) -> Sequence[InferItem] | None:
    """The items, if all bodies are infer messages, and short. None: `decode_batch` has to have a look.

    To parse a short body by itself costs as much again as to parse it with the rest. Long ones have a
    faster parser of their own (see `server.v2.messages`). Here the items are counted only afterwards.
    """
    if len(body) >= LARGE_BYTES * limit:
        return None
    try:
        items = _decode_infer(body).requests
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    count = len(items)
    if len(body) >= LARGE_BYTES * count or count > limit or len({item.id for item in items}) != count:
        return None
    return items


def decode_batch(body: bytes | bytearray, limit: int) -> Sequence[Item]:
    """The items, at most `limit`, each with an id of its own. Raises Problem."""
    _tally.limit = _tally.left = limit
    try:
        items = _decode(body).requests
    except msgspec.ValidationError as error:
        raise Problem("bad-request", f"not a batch: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem("not-json", f"the body is not JSON: {error}") from None
    if len({item.id for item in items}) != len(items):
        seen: set[str] = set()
        for item in items:
            if item.id in seen:
                raise Problem("duplicate-id", f"two items have the id {item.id!r}", id=item.id)
            seen.add(item.id)
    return items


def encode_batch(items: Sequence[AnyItem], replies: Sequence[Reply], call_id: bytes) -> bytes:
    """The answer: one object for each item, in the items' order, with ids that follow from the call's."""
    pieces: list[bytes | memoryview] = []
    lead = b'{"responses":[{"id":'
    for n, (item, reply) in enumerate(zip(items, replies, strict=True)):
        if reply.timing is not None and reply.content_type is JSON and not reply.headers:
            # A good answer, spelled out: nothing in it needs escaping.
            pieces.append(
                b'%b%b,"status":%d,"headers":{"content-type":"application/json","x-request-id":"%b.%d",'
                b'"server-timing":"%b"},"body":'
                % (lead, _encode(item.id), reply.status, call_id, n, reply.timing)
            )
            pieces.extend(reply.body)
        else:
            pieces.append(b'%b%b,"status":%d,"headers":' % (lead, _encode(item.id), reply.status))
            pieces.append(_encode(_headers_of(reply) | {"x-request-id": f"{call_id.decode()}.{n}"}))
            if reply.length:
                pieces.append(b',"body":')
                pieces.extend(reply.body if b"json" in reply.content_type else (_text(reply),))
        lead = b'},{"id":'
    pieces.append(b"}]}" if items else b'{"responses":[]}')
    return b"".join(pieces)


def _headers_of(reply: Reply) -> dict[str, str]:
    return {
        name.decode("latin-1"): value.decode("latin-1")
        for name, value in reply.header_list()
        if name not in _OF_CONNECTION
    }


def _text(reply: Reply) -> bytes:
    """A body that is not JSON, as a JSON string."""
    return _encode(b"".join(reply.body).decode(errors="replace"))


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
_ROUTED = frozenset(("app", "app_root_path", "endpoint", "path_params", "route", "router", EXCHANGE, PROBLEM))


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
