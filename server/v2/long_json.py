"""Long JSON text, cut and read in pieces.

The parsers hold the interpreter lock from the first byte to the last, in any thread: for 16 MiB that is 15 to
180 ms, 780 ms for a map of parameters. So `cut` replaces each long array of scalars by a mark; the rest, the
envelope, must be short, which bounds every list and map of a message. `server.v2.json_data` reads the values
piece by piece, and checks their brackets apart from their numbers.
"""

import re
import secrets
from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import msgspec
import numpy as np

from cobatch.server.http.body import Body
from cobatch.server.http.problem import Problem
from cobatch.server.v2.pieces import release

PIECE_BYTES = 1 << 16
# Strings take five times as long as numbers.
STRINGS_BYTES = 1 << 14
ENVELOPE_BYTES = 1 << 16
# Shorter values stay in the envelope.
LONG_BYTES = 1 << 10
_MAX_AXES = 64
# Clients cannot know it, so no value of theirs is taken for a mark.
_MARK = b'"%b:' % secrets.token_hex(8).encode()
_MARKED = re.compile(_MARK + rb'(\d+)"')
_BLANKS = b" \t\r\n"
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_INSIDE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_CHARACTERS = re.compile(rb"(?:[^\\]++|\\u[0-9a-fA-F]{4}|\\[^u])*+", re.DOTALL)
_SECOND_HALF = re.compile(rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}")
# Strings of one row; strings and brackets.
_ROW = re.compile(rb'(?:[ \t\r\n,]*+"(?:[^"\\]++|\\.)*+")*+[ \t\r\n,]*+', re.DOTALL)
_ROWS = re.compile(rb'(?:[ \t\r\n,\[\]]*+"(?:[^"\\]++|\\.)*+")++', re.DOTALL)
_MOST_BRACKETS = 1 << 16
# Replaces brackets.
_UNNESTED = bytes(ord(" ") if byte in b"[]" else byte for byte in range(256))

Text = bytes | bytearray


class MalformedError(ValueError):
    """The text is not JSON."""


class LongValue(NamedTuple):
    """An array of numbers, or of strings, or a string: its text is `text[start:end]`."""

    text: Text
    start: int
    end: int

    @property
    def holds_strings(self) -> bool:
        """True for strings. `cut` puts no strings among numbers."""
        return self.text.find(b'"', self.start, self.end) >= 0


def cut(text: Body, limit: int, *, strings: bool = False) -> tuple[bytes, list[LongValue]]:
    """Return the envelope, and the long values in the order of their marks.

    With `strings` long strings are cut out too. Raises Problem if the envelope has more than `limit` bytes.
    """
    text = _without_blanks(as_text(text))
    kept: list[bytes] = []
    values: list[LongValue] = []
    at = done = cut_bytes = 0
    while at < len(text) and at - cut_bytes <= limit:
        quote = text.find(b'"', at)
        stop = len(text) if quote < 0 else quote
        start, end = _array(text, at, stop)
        if end < 0 <= start:
            # An array of more than strings. Long ones are not searched again for each array in them.
            if -end - start > LONG_BYTES:
                break
            at = stop
            continue
        if start < 0 and quote >= 0:
            start, end = (quote if strings else -1), _string_end(text, quote)
            if end < 0:
                break
        if start >= 0 and end - start >= LONG_BYTES:
            kept += (bytes(text[done:start]), b'%b%d"' % (_MARK, len(values)))
            values.append(LongValue(text, start, end))
            cut_bytes += end - start
            done = end
        at = end if end >= 0 else stop
        if quote < 0:
            break
    if len(text) - cut_bytes > limit:
        kept_bytes = len(text) - cut_bytes
        detail = f"beside arrays of numbers or strings the JSON has {kept_bytes} bytes, the limit is {limit}"
        raise Problem("body-too-large", detail, body_bytes=kept_bytes, limit_bytes=limit)
    return b"".join([*kept, text[done:]]), values


def as_text(body: Body) -> Text:
    """Return a body that can be searched: a view is copied, in pieces."""
    if not isinstance(body, memoryview):
        return body
    text = bytearray()
    for at in range(0, len(body), PIECE_BYTES):
        text += body[at : at + PIECE_BYTES]
        release()
    return text


def _without_blanks(text: Text) -> Text:
    """A text without blanks at its end."""
    end = len(text)
    while end and text[end - 1] in _BLANKS:
        end = max(0, end - PIECE_BYTES) + len(text[max(0, end - PIECE_BYTES) : end].rstrip(_BLANKS))
    return text if end == len(text) else text[:end]


def marked(raw: msgspec.Raw | Text, values: Sequence[LongValue]) -> LongValue | None:
    """Return the long value in whose place `raw` is, if it is a mark."""
    found = _MARKED.fullmatch(raw) if values else None
    return None if found is None else values[int(found[1])]


def _array(text: Text, at: int, stop: int) -> tuple[int, int]:
    """Return the ends of the array that begins before `stop`, the next quote; -1 for none (see below).

    No quote is in an array of numbers, and a key's before and after it, or a brace.
    """
    if stop - at >= LONG_BYTES:
        start = text.find(b"[", at, stop)
        brace = text.find(b"}", max(at, start), stop)
        end = text.rfind(b"]", max(at, start), stop if brace < 0 else brace)
        return (start, end + 1) if 0 <= start < end else (-1, -1)
    head = text[at:stop].rstrip(_BLANKS + b"[")
    start = text.find(b"[", at + len(head), stop)
    return (start, _strings_end(text, start)) if start >= 0 else (-1, -1)


def _string_end(text: Text, quote: int) -> int:
    """Return the end of the string that begins at a quote, -1 if it has none."""
    at = quote + 1
    while True:
        found = text.find(b'"', at)
        if found < 0 or text[found - 1] != ord("\\"):
            return found + 1 or -1
        # Escapes: follow them, window by window.
        while at <= found:
            end = _INSIDE.match(text, at, at + STRINGS_BYTES).end()  # type: ignore[union-attr]  # always a match
            if end < len(text) and text[end] == ord('"'):
                return end + 1
            if end == at:
                return -1
            at = end
            release()


def _strings_end(text: Text, start: int) -> int:
    """Return the end of an array of strings, nested or not; minus where something else is in it."""
    at, depth = start + 1, 1
    for _ in range(_MOST_BRACKETS):
        end = _ROW.match(text, at, at + STRINGS_BYTES).end()  # type: ignore[union-attr]  # always a match
        if end - at > STRINGS_BYTES // 2:
            release()
        byte = text[end : end + 1]
        if byte == b'"':
            end = _string_end(text, end)
            if end < 0:
                return -at
        elif byte in (b"[", b"]"):
            end += 1
            depth += 1 if byte == b"[" else -1
            if not depth:
                return end
        elif end == at:
            return -at
        at = end
    return -at


def is_flat(value: LongValue) -> bool:
    """Return whether an array of numbers is not nested."""
    text, start, end = value
    return text.find(b"[", start + 1, end) < 0 and text.find(b"]", start, end - 1) < 0


def number_arrays(value: LongValue) -> Iterator[bytes]:
    """An array of numbers as flat JSON arrays of a piece each."""
    text, start, end = value
    if is_flat(value):
        for piece in _number_pieces(LongValue(text, start + 1, end - 1)):
            yield b"[%b]" % piece
    else:
        for piece in _number_pieces(value):
            yield b"[%b]" % piece.translate(_UNNESTED)


def _number_pieces(value: LongValue) -> Iterator[bytes]:
    """The text of an array of numbers in pieces, cut at commas."""
    text, at, last = value
    while last - at > PIECE_BYTES:
        end = text.rfind(b",", at, at + PIECE_BYTES)
        if end < 0:
            raise MalformedError("a number is too long")
        yield bytes(text[at:end])
        release()
        at = end + 1
    yield bytes(text[at:last])


def string_pieces(value: LongValue) -> Iterator[tuple[bytes, list[bytes]]]:
    """An array of strings in pieces: each with 0 in place of its strings, and the strings."""
    text, at, last = value
    while (quote := text.find(b'"', at, last)) >= 0:
        found = _ROWS.match(text, at, min(at + STRINGS_BYTES, last))
        end = _string_end(text, quote) if found is None else found.end()
        if quote - at > STRINGS_BYTES or not 0 <= end <= last:
            raise MalformedError("the strings cannot be read")
        if found is None:
            yield bytes(text[at:quote]).translate(None, _BLANKS) + b"0", [bytes(text[quote:end])]
        else:
            piece = found[0]
            yield _STRING.sub(b"0", piece).translate(None, _BLANKS), _STRING.findall(piece)
        release()
        at = end
    yield bytes(text[at:last]).translate(None, _BLANKS), []


def nested_shape(value: LongValue) -> list[int]:
    """The shape of a nested array, from its brackets and commas. Raises MalformedError, RaggedError."""
    return _shape(b",".join([_brackets(piece) for piece in _number_pieces(value)]), b"")


def _brackets(piece: bytes) -> bytes:
    """The brackets and commas of a piece."""
    text = np.frombuffer(piece, np.uint8)
    text = text[text > ord(" ")]
    opening, closing, comma = text == ord("["), text == ord("]"), text == ord(",")
    after_no_comma = opening[1:] & ~(opening | comma)[:-1]
    before_no_comma = closing[:-1] & ~(closing | comma)[1:]
    if after_no_comma.any() or before_no_comma.any():
        raise MalformedError("a comma is missing beside a bracket")
    kept: bytes = text[opening | closing | comma].tobytes()
    return kept


def text_pieces(string: bytes) -> Iterator[bytes]:
    """A long string as several ones, cut between characters."""
    at, last = 1, len(string) - 1
    while at < last:
        end = _CHARACTERS.match(string, at, min(at + STRINGS_BYTES, last)).end()  # type: ignore[union-attr]
        if _SECOND_HALF.match(string, end, last):
            end += 6  # of a surrogate pair
        while end < last and string[end] & 0xC0 == 0x80:
            end -= 1  # UTF-8 goes on
        if end <= at:
            raise MalformedError("a string cannot be read")
        yield b'"%b"' % string[at:end]
        release()
        at = end


def string_shape(pieces: Sequence[bytes]) -> list[int]:
    """The shape of an array of strings, from its pieces. Raises MalformedError, RaggedError."""
    return _shape(b"".join(pieces), b"0")


class RaggedError(ValueError):
    """Rows differ in length or depth."""


def _shape(text: bytes, element: bytes) -> list[int]:
    """The shape of nested arrays. `text` has their brackets and commas, and `element` for each element."""
    depth = len(text) - len(text.lstrip(b"["))
    if depth > _MAX_AXES:
        raise MalformedError("it is nested too deeply")
    shape: list[int] = []
    for level in range(1, depth + 1):
        # The first rows of this depth end here.
        end = text.find(b"]" * level)
        shape.insert(0, (text.count(b",", 0, max(end, 0)) + 1) // prod(shape))
    length = len(element)
    for size in reversed(shape):
        length = size * (length + 1) + 1
    if length != len(text):
        raise RaggedError
    for size in reversed(shape):
        element = b"[%b]" % (size * (element + b","))[:-1]
    if element != text:
        raise RaggedError
    return shape
