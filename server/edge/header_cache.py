"""What a request's header block said, and the blocks whose bytes need not be parsed again.

Clients repeat their headers to the byte. A header block that httptools has parsed and that led to the fast
path is remembered with what it said; the same bytes mean the same thing, so to know them again decides
nothing that httptools has not decided before.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from httptools import HttpRequestParser

from cobatch.server.auth.authenticator import Authenticator
from cobatch.server.auth.credentials import credential_in
from cobatch.server.auth.principal import Principal
from cobatch.server.http.compression import choose
from cobatch.server.http.problem import Problem
from cobatch.server.inference.model import Model
from cobatch.server.inference.service import Inference
from cobatch.server.observability.record import MARKS

_MOST_BLOCKS = 4096
_MOST_BYTES = 4096
# Headers that make a request take the long way.
_UNUSUAL = frozenset((b"content-encoding", b"upgrade", b"transfer-encoding", b"expect"))

Headers = Sequence[tuple[bytes, bytes]]


class Known(msgspec.Struct, eq=False):
    """What a header block said: all that the fast path needs to know of it.

    `length` of the body, `json_length` of its JSON part where the rest is binary; `coding`: for the answer.
    `principal` is who calls, `refusal` why he may not. `marks` are headers that another request does not
    have: under which name the caller knows this one.
    """

    model: Model
    path: str
    length: int
    json_length: int | None
    keep_alive: bool
    coding: bytes | None
    marks: Headers
    principal: Principal | None = None
    refusal: Problem | None = None


def recognise(core: Inference, parser: HttpRequestParser, url: bytes, headers: Headers) -> Known | None:
    """What a plain request to an infer route says in its headers; None for any other request."""
    model = core.infer_targets.get(url)
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
    known = Known(model, url.decode("ascii"), length, json_length, keep_alive, coding, marks)
    return known if core.auth is None or _recall_caller(core.auth, headers, known) else None


def _recall_caller(auth: Authenticator, headers: Headers, known: Known) -> bool:
    """Note who calls, or why he may not. False where a signature has to be checked: that can wait for the
    issuer's keys, which the long way does."""
    recalled: Principal | Problem | None
    try:
        recalled = auth.lookup(credential_in(headers, b"", auth.challenges))
    except Problem as problem:
        recalled = problem
    if isinstance(recalled, Principal):
        known.principal = recalled
    else:
        known.refusal = recalled
    return recalled is not None


def remember(blocks: dict[bytes, Known], chunk: bytes, known: Known) -> None:
    """Keep the header block that a chunk begins with, if the rest of it is one request's whole body."""
    if not known.keep_alive or known.marks:
        return
    end = chunk.find(b"\r\n\r\n") + 4
    if end > _MOST_BYTES or len(chunk) - end != known.length:
        return
    if len(blocks) >= _MOST_BLOCKS:
        del blocks[next(iter(blocks))]
    blocks[chunk[:end]] = known
