"""The body of a prediction's request in its parts, by content type.

A multipart body is cut with python-multipart's parser rather than with Starlette's form, which decodes
parts without a file name as text, drops their content types, and writes large parts to disk.
"""

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from cobatch.server.http.body import Body
from cobatch.server.http.problem import Problem, too_large
from cobatch.server.predictions.npy import MAGIC
from cobatch.server.v2.long_json import PIECE_BYTES, LongValue
from cobatch.server.v2.pieces import release

JSON = "application/json"
OCTETS = "application/octet-stream"
NPY = "application/x-npy"
MULTIPART = "multipart/form-data"
_FORM = "application/x-www-form-urlencoded"
_TENSORS = [JSON, OCTETS, NPY]
_SUPPORTED = [JSON, MULTIPART, OCTETS, NPY]
# The part of a form with the options.
OPTIONS_PART = "request"

_MAX_PARTS = 256
# Longer bodies are hashed in a thread: SHA-256 takes about 1 ms for each MiB.
_HASH_IN_THREAD_BYTES = 1 << 20


class Field(NamedTuple):
    """A tensor or the options as they came. `media` is one of JSON, OCTETS and NPY.

    `values` are the long values whose marks are in JSON data.
    """

    name: str
    media: str
    data: Body
    values: Sequence[LongValue] = ()


class Content(NamedTuple):
    """A whole request: one field without a name, or the parts of a form; and the query's items."""

    media: str
    fields: Sequence[Field]
    query: Sequence[tuple[str, str]]


def is_binary(request: Request) -> bool:
    """Return whether the body is not JSON as a whole."""
    media, _ = parse_options_header(request.headers.get("content-type", ""))
    return media.decode("latin-1") in (MULTIPART, OCTETS, NPY)


def read_content(request: Request, body: Body) -> Content:
    """Take the body apart. Raises Problem."""
    given = request.headers.get("content-type", "")
    media, parameters = parse_options_header(given)
    query = request.query_params.multi_items()
    name = media.decode("latin-1")
    if name == MULTIPART:
        return Content(MULTIPART, _read_form(body, parameters.get(b"boundary", b"")), query)
    if name == OCTETS and body[: len(MAGIC)] == MAGIC:
        name = NPY
    # The type that `curl -d` sends; no form begins so.
    if name == _FORM and bytes(body[:64]).lstrip()[:1] == b"{":
        name = JSON
    if name not in _TENSORS:
        detail = f"the body's Content-Type is {given!r}, it must be one of {', '.join(_SUPPORTED)}"
        raise Problem("unsupported-media-type", detail, supported=_SUPPORTED)
    return Content(name, [Field("", name, body)], query)


def check_json(content: Content, limit: int) -> None:
    """Raise Problem if the parts in JSON have more bytes together."""
    json_bytes = sum(len(field.data) for field in content.fields if field.media == JSON)
    if json_bytes > limit:
        raise too_large(json_bytes, limit)


async def fingerprint(path: str, content: Content) -> bytes:
    """A digest of the whole request, without a form's boundary, which is another one each time."""
    head = [path, content.media, *(text for item in content.query for text in item)]
    pieces: list[Body] = [text.encode() for text in head]
    for field in content.fields:
        pieces += (field.name.encode(), field.media.encode(), field.data)
    if sum(map(len, pieces)) > _HASH_IN_THREAD_BYTES:
        return await asyncio.to_thread(_digest, pieces)
    return _digest(pieces)


def _digest(pieces: list[Body]) -> bytes:
    machine = hashlib.sha256()
    for piece in pieces:
        # Without the lengths, bytes could move from one piece to the next unnoticed.
        machine.update(len(piece).to_bytes(8, "little"))
        machine.update(piece)
    return machine.digest()


class _Form:
    """The parts that the parser finds; the methods are its callbacks.

    The parser gets the body in pieces, so headers may come in two parts; empty values do not come.
    """

    def __init__(self) -> None:
        self.fields: list[Field] = []
        self.complete = False
        self._header = self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._data = bytearray()

    def on_part_begin(self) -> None:
        if len(self.fields) >= _MAX_PARTS:
            raise _bad_form(f"it has more than {_MAX_PARTS} parts")
        self._headers = {}
        self._data = bytearray()

    def on_header_begin(self) -> None:
        self._header = self._value = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def on_header_end(self) -> None:
        self._headers[self._header.lower()] = self._value

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += memoryview(data)[start:end]

    def on_part_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        try:
            name = options[b"name"].decode()
        except (KeyError, UnicodeDecodeError):
            raise _bad_form("a part has no name") from None
        given, _ = parse_options_header(self._headers.get(b"content-type", b"text/plain"))
        # Text, a part's default, is JSON here: `curl -F 'x=[[1,2]]'` sends that.
        media = given.decode("latin-1").replace("text/plain", JSON)
        if self._data.startswith(MAGIC):
            media = NPY
        if media not in _TENSORS:
            detail = f"part {name!r} is {media!r}, it must be one of {', '.join(_TENSORS)}"
            raise Problem("unsupported-media-type", detail, supported=_TENSORS)
        self.fields.append(Field(name, media, self._data))

    def on_end(self) -> None:
        self.complete = True


def _read_form(body: Body, boundary: bytes) -> list[Field]:
    if not boundary:
        raise _bad_form("its Content-Type names no boundary")
    form = _Form()
    try:
        callbacks: Any = {name: getattr(form, name) for name in dir(form) if name.startswith("on_")}
        parser = MultipartParser(boundary, callbacks)
        for at in range(0, len(body), PIECE_BYTES):
            parser.write(bytes(body[at : at + PIECE_BYTES]))
            release()
        parser.finalize()
    except FormParserError as error:
        raise _bad_form(str(error)[:200]) from None
    if not form.complete:
        raise _bad_form("it ends before its last boundary")
    return form.fields


def _bad_form(why: str) -> Problem:
    return Problem("bad-request", f"the multipart body cannot be read: {why}")
