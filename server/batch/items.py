"""The body of POST /batch as types, the requests that its items are, and its response as bytes.

Items' bodies are parsed with the call or passed on as text, and their responses are spliced as text into the
call's: nothing is decoded or encoded twice.
"""

import re
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Generic, TypeVar
from urllib.parse import unquote_to_bytes

import msgspec

from cobatch.server.auth.credentials import names_token
from cobatch.server.http.body import Body
from cobatch.server.http.problem import Problem
from cobatch.server.http.reply import Reply
from cobatch.server.v2.decode import LARGE_BYTES, decode_json, decode_message
from cobatch.server.v2.long_json import ENVELOPE_BYTES, LongValue, cut
from cobatch.server.v2.messages import InferMessage

_encode = msgspec.json.encode
_INFER = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/infer")
# Of an item beside its tensors' data, on average.
_ENVELOPE_BYTES = 1024
# Longer parts of the response are not joined.
_JOINED_BYTES = 1 << 16
# The headers that an item may have. They change nothing.
_ITEM_HEADERS = ("accept", "content-type")


# `limit` and `left`, the items a body may still have, are counted while it is parsed: it may have millions.
_tally = threading.local()


class _Head(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """A request without its body. An unknown field could change the meaning, so there must be none."""

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


class ParsedItem(_Head, gc=False, kw_only=True, forbid_unknown_fields=True):
    """One request whose body is an infer message, parsed together with the call."""

    body: InferMessage


AnyItem = Item | ParsedItem
_T = TypeVar("_T", Item, ParsedItem)


class _Batch(msgspec.Struct, Generic[_T], forbid_unknown_fields=True):
    requests: list[_T]


_decode = msgspec.json.Decoder(_Batch[Item]).decode
_decode_parsed = msgspec.json.Decoder(_Batch[ParsedItem]).decode


def decode_items(body: Body, limit: int) -> tuple[Sequence[AnyItem], Sequence[LongValue]]:
    """The items of a call, at most `limit`, each with an id of its own; and long values. Raises Problem."""
    most_bytes = ENVELOPE_BYTES + _ENVELOPE_BYTES * limit
    values: Sequence[LongValue] = ()
    items: Sequence[AnyItem] = _decode_together(body, limit) if len(body) <= most_bytes else ()
    if not items:
        _tally.limit = _tally.left = limit
        envelope, values = cut(body, most_bytes)
        items = decode_json(_decode, envelope, "a batch").requests
    if len({item.id for item in items}) != len(items):
        counts = Counter(item.id for item in items)
        id_ = next(id_ for id_, count in counts.items() if count > 1)
        raise Problem("duplicate-id", f"two items have the id {id_!r}", id=id_)
    return items, values


def _decode_together(body: Body, limit: int) -> Sequence[ParsedItem]:
    """The items with their bodies parsed; empty where that is not possible, or the bodies are long.

    Parsing a short body by itself costs as much again as parsing it with the others. Long bodies have a
    faster way of their own (see `server.v2.long_json`).
    """
    try:
        items = _decode_parsed(body).requests
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return ()
    return items if len(items) <= limit and len(body) < LARGE_BYTES * len(items) else ()


def message_of(item: AnyItem) -> InferMessage:
    """The body of an item. Raises Problem."""
    return item.body if isinstance(item, ParsedItem) else decode_message(item.body)


def infer_target(item: AnyItem) -> tuple[str, str | None]:
    """The model and version that an item names. Raises Problem unless it is a V2 infer request."""
    for name, value in (item.headers or {}).items():
        if name.lower() not in _ITEM_HEADERS:
            detail = f"an item cannot have the header {name!r}"
            raise Problem("not-batchable", detail, field="headers", allowed=list(_ITEM_HEADERS))
        if name.lower() == "content-type" and value.partition(";")[0].strip().lower() != "application/json":
            detail = f"an item's body is JSON, not {value!r}"
            raise Problem("not-batchable", detail, field="headers", allowed=["application/json"])
    target, _, query = item.url.partition("?")
    if names_token(query.encode()):
        raise Problem("not-batchable", "a token does not belong in an item's url", field="url")
    path = unquote_to_bytes(target).decode(errors="replace")
    named = _INFER.fullmatch(path)
    if named is None:
        detail = f"an item's url is that of a V2 infer request, got {item.url!r}"
        raise Problem("not-batchable", detail, field="url")
    if item.method != "POST":
        detail = f"{path} takes POST, got {item.method}"
        raise Problem("method-not-allowed", detail, allowed=["POST"])
    return named[1], named[2]


def encode_batch(
    items: Sequence[AnyItem], replies: Sequence[Reply], call_id: bytes
) -> list[bytes | memoryview]:
    """The response: one object for each item, in the items' order, with ids that follow from the call's.

    A long one comes in parts, since joining it would take longer.
    """
    parts: list[bytes | memoryview] = []
    length = 0
    pieces: list[bytes | memoryview] = []
    lead = b'{"responses":[{"id":'
    for n, (item, reply) in enumerate(zip(items, replies, strict=True)):
        if reply.timing is not None and not reply.headers:
            # Rows, spelled out: nothing in these headers needs escaping.
            pieces.append(
                b'%b%b,"status":%d,"headers":{"content-type":"application/json","x-request-id":"%b.%d",'
                b'"server-timing":"%b"},"body":'
                % (lead, _encode(item.id), reply.status, call_id, n, reply.timing)
            )
        else:
            headers = dict([(b"content-type", reply.content_type), *reply.headers])
            shown = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
            shown["x-request-id"] = f"{call_id.decode()}.{n}"
            pieces.append(b'%b%b,"status":%d,"headers":' % (lead, _encode(item.id), reply.status))
            pieces += (_encode(shown), b',"body":')
        lead = b'},{"id":'
        own = reply.length
        length += own
        if own <= _JOINED_BYTES:
            pieces.extend(reply.body)
        if length > _JOINED_BYTES:
            parts.append(b"".join(pieces))
            parts.extend(reply.body if own > _JOINED_BYTES else ())
            pieces, length = [], 0
    pieces.append(b"}]}" if items else b'{"responses":[]}')
    return [*parts, b"".join(pieces)]
