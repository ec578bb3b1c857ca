"""The body of a prediction's request, taken apart by its content type: what came, not yet what it means.

A multipart body is cut with python-multipart's parser rather than with Starlette's form: that one decodes
parts without a file name as text, drops their content types, and writes large parts to disk.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from cobatch.server.http.problem import Problem
from cobatch.server.predictions.npy import MAGIC

JSON = "application/json"
OCTETS = "application/octet-stream"
NPY = "application/x-npy"
MULTIPART = "multipart/form-data"
SUPPORTED = [JSON, MULTIPART, OCTETS, NPY]
# The part that carries what is not a tensor.
OPTIONS_PART = "request"

_MOST_PARTS = 256
# Longer bodies are hashed in a thread: SHA-256 takes a millisecond or so for each.
_HASH_IN_THREAD_BYTES = 1 << 20


class Field(NamedTuple):
    """A tensor or the options as they came. `media` is one of JSON, OCTETS and NPY."""

    name: str
    media: str
    data: bytes | bytearray


class Content(NamedTuple):
    """A whole request: one field without a name, or the parts of a form; and the query's items."""

    media: str
    fields: Sequence[Field]
    query: Sequence[tuple[str, str]]


def read_content(request: Request, body: bytes | bytearray) -> Content:
    """Take the body apart. Raises Problem."""
    given = request.headers.get("content-type", "")
    media, parameters = parse_options_header(given)
    query = request.query_params.multi_items()
    name = media.decode("latin-1")
    if name == MULTIPART:
        return Content(MULTIPART, _parts(bytes(body), parameters.get(b"boundary", b"")), query)
    if name == OCTETS and body.startswith(MAGIC):
        name = NPY
    if name not in (JSON, OCTETS, NPY):
        detail = f"the body's Content-Type is {given!r}, it must be one of {', '.join(SUPPORTED)}"
        raise Problem("unsupported-media-type", detail, supported=SUPPORTED)
    return Content(name, [Field("", name, body)], query)


async def fingerprint(path: str, content: Content) -> bytes:
    """A digest of all that was asked for; a form's boundary, which is another each time, is not in it."""
    head = [path, content.media, *(text for item in content.query for text in item)]
    pieces: list[bytes | bytearray] = [text.encode() for text in head]
    for field in content.fields:
        pieces += (field.name.encode(), field.media.encode(), field.data)
    if sum(map(len, pieces)) > _HASH_IN_THREAD_BYTES:
        return await asyncio.to_thread(_digest, pieces)
    return _digest(pieces)


def _digest(pieces: list[bytes | bytearray]) -> bytes:
    machine = hashlib.sha256()
    for piece in pieces:
        # Lengths go in too, or bytes could move from one piece to the next unseen.
        machine.update(len(piece).to_bytes(8, "little"))
        machine.update(piece)
    return machine.digest()


class _Form:
    """Collects the parts that the parser finds."""

    def __init__(self) -> None:
        self.fields: list[Field] = []
        self.ended = False
        self._header = bytearray()
        self._value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._data = bytearray()

    def begin(self) -> None:
        if len(self.fields) >= _MOST_PARTS:
            raise _bad_form(f"it has more than {_MOST_PARTS} parts")
        self._headers = {}
        self._data = bytearray()

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def data(self, data: bytes, start: int, end: int) -> None:
        self._data += memoryview(data)[start:end]

    def part_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        try:
            name = options[b"name"].decode()
        except (KeyError, UnicodeDecodeError):
            raise _bad_form("a part has no name") from None
        media, _ = parse_options_header(self._headers.get(b"content-type", b"text/plain"))
        self.fields.append(Field(name, _media_of_part(name, media, self._data), self._data))

    def end(self) -> None:
        self.ended = True


def _parts(body: bytes, boundary: bytes) -> list[Field]:
    if not boundary:
        raise _bad_form("its Content-Type names no boundary")
    form = _Form()
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": form.begin,
                "on_header_field": form.header_field,
                "on_header_value": form.header_value,
                "on_header_end": form.header_end,
                "on_part_data": form.data,
                "on_part_end": form.part_end,
                "on_end": form.end,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise _bad_form(str(error)[:200]) from None
    if not form.ended:
        raise _bad_form("it ends before its last boundary")
    return form.fields


def _media_of_part(name: str, media: bytes, data: bytearray) -> str:
    """Text, which is what a part without a type is, is JSON here: `curl -F 'x=[[1,2]]'` sends that."""
    if data.startswith(MAGIC):
        return NPY
    text = media.decode("latin-1")
    if text in (JSON, "text/plain"):
        return JSON
    if text in (OCTETS, NPY):
        return text
    supported = [JSON, OCTETS, NPY]
    detail = f"part {name!r} is {text!r}, it must be one of {', '.join(supported)}"
    raise Problem("unsupported-media-type", detail, supported=supported)


def _bad_form(why: str) -> Problem:
    return Problem("bad-request", f"the multipart body cannot be read: {why}")
