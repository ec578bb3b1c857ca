"""Parsed header blocks of infer requests, by their bytes.

Clients repeat their headers to the byte. A block that httptools has parsed and that led to the fast path is
kept with its meaning. The same bytes mean the same, so a match decides nothing that httptools has not.
"""

from collections.abc import Sequence

import msgspec
from httptools import HttpRequestParser

from cobatch.server.auth.authenticator import Authenticator
from cobatch.server.auth.principal import Principal
from cobatch.server.http.compression import choose
from cobatch.server.http.problem import Problem
from cobatch.server.inference.served import ServedModel
from cobatch.server.inference.service import Inference
from cobatch.server.observability.record import MARKS

_BLOCKS = 4096
_BLOCK_BYTES = 4096
# Requests with one of these go through ASGI.
_UNUSUAL = frozenset((b"content-encoding", b"upgrade", b"transfer-encoding", b"expect"))

Headers = Sequence[tuple[bytes, bytes]]
HeaderCache = dict[bytes, "CachedHeaders"]


class CachedHeaders(msgspec.Struct, eq=False):
    """The meaning of a header block on the fast path.

    `length`: of the body; `json_length`: of its JSON part if the rest is binary; `coding`: for the response.
    `refusal`: why the client may not proceed, else `principal`. `marks`: headers that identify one request.
    """

    model: ServedModel
    path: str
    length: int
    json_length: int | None
    keep_alive: bool
    coding: bytes | None
    marks: Headers
    principal: Principal | None = None
    refusal: Problem | None = None


def match(
    inference: Inference, parser: HttpRequestParser, url: bytes, headers: Headers
) -> CachedHeaders | None:
    """Return the meaning of a plain request to an infer route; None for any other request."""
    model = inference.infer_targets.get(url)
    if model is None or parser.get_method() != b"POST":
        return None
    length = -1
    json_length: int | None = None
    coding: bytes | None = None
    marks: list[tuple[bytes, bytes]] = []
    for name, value in headers:
        if name == b"content-length":
            length = int(value)
        elif name == b"inference-header-content-length":
            if json_length is not None or not value.isdigit() or len(value) > 18:
                return None
            json_length = int(value)
        elif name == b"accept-encoding":
            coding = choose(value)
        elif name in MARKS:
            marks.append((name, value))
        elif name in _UNUSUAL:
            return None
    if length < 0 or json_length == 0 or parser.get_http_version() != "1.1":
        return None
    keep_alive = parser.should_keep_alive()
    block = CachedHeaders(model, url.decode("ascii"), length, json_length, keep_alive, coding, marks)
    auth = inference.auth
    return block if auth is None or _authenticate(auth, headers, block) else None


def _authenticate(auth: Authenticator, headers: Headers, block: CachedHeaders) -> bool:
    """Set the principal or the refusal.

    Returns False if a signature has to be checked: that may wait for the issuer's keys, as ASGI can.
    """
    known = auth.lookup(headers)
    if isinstance(known, Principal):
        block.principal = known
    else:
        block.refusal = known
    return known is not None


def store(cache: HeaderCache, chunk: bytes, block: CachedHeaders) -> None:
    """Keep the header block at the chunk's beginning, if the rest is the request's whole body."""
    if not block.keep_alive or block.marks:
        return
    end = chunk.find(b"\r\n\r\n") + 4
    if end > _BLOCK_BYTES or len(chunk) - end != block.length:
        return
    if len(cache) >= _BLOCKS:
        del cache[next(iter(cache))]
    cache[chunk[:end]] = block
