"""Tensor data in JSON -> the bytes that are copied into the batch.

Three ways, chosen by size and form, as `benchmarks/request_cost/codec.py` measures them:

* flat and small: msgspec makes a typed list and `struct` packs it, without NumPy, whose calls cost more
  than the work on a few numbers;
* long (`server.v2.long_json`): piece by piece; simdjson writes the numbers into a buffer without a Python
  object for each;
* nested, or rejected by the first two: plain lists and `numpy.array`. This way also finds ragged data and
  words the refusal.
"""

import struct
from collections.abc import Callable
from math import prod
from typing import Any, Literal

import msgspec
import numpy as np
import simdjson

from cobatch.batcher.request import Payload
from cobatch.engines.base import TensorSpec
from cobatch.server.http.problem import Problem
from cobatch.server.v2.checks import check_strings, wrong_data
from cobatch.server.v2.long_json import (
    STRINGS_BYTES,
    LongValue,
    MalformedError,
    RaggedError,
    is_flat,
    nested_shape,
    number_arrays,
    string_pieces,
    string_shape,
    text_pieces,
)

_SMALL_BYTES = 8192
_KEPT_PACKERS = 256
_STRUCT = {
    "BOOL": "?", "INT8": "b", "INT16": "h", "INT32": "i", "INT64": "q",
    "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q",
    "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip
_LISTS: dict[str, Callable[[Any], list[Any]]] = {
    "b": msgspec.json.Decoder(list[bool]).decode,
    "i": msgspec.json.Decoder(list[int]).decode,
    "u": msgspec.json.Decoder(list[int]).decode,
    "f": msgspec.json.Decoder(list[float]).decode,
}
_WORDS = {"b": "true or false", "i": "integers", "u": "integers that are not negative", "f": "numbers"}
# Of simdjson's buffers, by NumPy's kind: the type asked for, and as NumPy names it.
_BUFFERS: dict[str, tuple[Literal["d", "u", "i"], type[np.number[Any]]]] = {
    "f": ("d", np.float64),
    "u": ("u", np.uint64),
    "i": ("i", np.int64),
}
# A malformed or unfitting value makes the quick ways raise one of these; the careful way names it.
_UNFIT = (msgspec.MsgspecError, struct.error, OverflowError, TypeError, ValueError, RuntimeError)
_RAGGED = "the data is ragged: rows differ in length or depth"


class JsonReader:
    """Reads the JSON data of one input tensor. Everything raises Problem."""

    def __init__(self, spec: TensorSpec) -> None:
        self._spec = spec
        self._dtype = spec.dtype.newbyteorder("<") if spec.datatype != "BYTES" else spec.dtype
        self._code = _STRUCT.get(spec.datatype)
        self._list = _LISTS.get(self._dtype.kind) if self._code else None
        self._buffer = _BUFFERS.get(self._dtype.kind) if self._code else None
        self._packers: dict[int, Callable[..., bytes]] = {}

    def read(self, data: msgspec.Raw, shape: list[int], elements: int) -> Payload:
        """The data as little-endian bytes in C order (BYTES: a list).

        `shape` is the whole shape, batch axis included, of `elements` elements.
        """
        raw = memoryview(data)
        try:
            if self._list is not None and len(raw) <= _SMALL_BYTES:
                return self._packer(elements)(*self._list(raw))
        except _UNFIT:
            pass
        return self._read_carefully(raw, shape, elements)

    def _packer(self, elements: int) -> Callable[..., bytes]:
        packer = self._packers.get(elements)
        if packer is None:
            if len(self._packers) >= _KEPT_PACKERS:
                self._packers.clear()
            packer = self._packers[elements] = struct.Struct(f"<{elements}{self._code}").pack
        return packer

    def read_long(self, value: LongValue, check: Callable[[list[int]], None]) -> tuple[list[int], Payload]:
        """The shape and the payload of a long array. `check` may refuse the shape."""
        self._check_form()
        try:
            if value.holds_strings:
                return self._read_long_strings(value, check)
            shape = None if is_flat(value) else nested_shape(value)
            if shape is not None:
                check(shape)
            parts = [self._read_piece(piece) for piece in number_arrays(value)]
        except RaggedError:
            raise self.wrong(_RAGGED) from None
        except MalformedError as error:
            raise Problem("not-json", f"the data of input {self._spec.name!r} is not JSON: {error}") from None
        numbers = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if shape is None:
            shape = [numbers.size]
            check(shape)
        elif numbers.size != prod(shape):
            raise self.wrong(_RAGGED)
        return shape, numbers.data.cast("B")

    def _read_piece(self, text: bytes) -> np.ndarray[Any, Any]:
        """The numbers of a flat array."""
        if self._spec.datatype == "BYTES":
            self._convert(self._parse(memoryview(text), piece=True))
            raise RaggedError  # there are blanks only
        try:
            if self._buffer is not None:
                kind, wide = self._buffer
                array: Any = simdjson.Parser().parse(text)
                return self._narrow(np.frombuffer(array.as_buffer(of_type=kind), wide))
        except _UNFIT:
            pass
        return self._to_array(self._parse(memoryview(text), piece=True))

    def _read_long_strings(
        self, value: LongValue, check: Callable[[list[int]], None]
    ) -> tuple[list[int], Payload]:
        elements: list[bytes] = []
        outlines = []
        for outline, strings in string_pieces(value):
            outlines.append(outline)
            check_strings(self._spec, len(elements) + len(strings))
            if len(strings) == 1 and len(strings[0]) > STRINGS_BYTES:
                elements.append(b"".join([self._read_strings([text])[0] for text in text_pieces(strings[0])]))
            else:
                elements += self._read_strings(strings)
        shape = string_shape(outlines)
        check(shape)
        return shape, elements

    def _narrow(self, wide: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The numbers in the tensor's datatype."""
        dtype = self._dtype
        if dtype.kind == "f":
            with np.errstate(over="ignore"):
                narrow = wide.astype(dtype)
            if not np.isfinite(narrow).all():
                raise self.wrong("a number is too large")
            return narrow
        if wide.dtype.kind in "iu" and wide.size:
            range_ = np.iinfo(dtype)
            low, high = int(wide.min()), int(wide.max())
            if low < range_.min or high > range_.max:
                raise self.wrong(f"{low if low < range_.min else high} is out of range")
        return wide.astype(dtype)

    def read_nested(
        self, data: msgspec.Raw | bytes | bytearray, check: Callable[[list[int]], None]
    ) -> tuple[list[int], Payload]:
        """The shape of data whose nesting is its shape, and its payload. `check` may refuse the shape."""
        values = self._parse(memoryview(data), scalar=not self._spec.full_shape)
        shape = _shape(values)
        check(shape)
        return shape, self._convert(self._flatten(values if shape else [values], len(shape)))

    def _check_form(self) -> None:
        if self._spec.datatype == "BF16":
            raise self.wrong("it travels as binary only, JSON has no numbers of this kind")

    def _parse(self, raw: memoryview, *, piece: bool = False, scalar: bool = False) -> Any:
        self._check_form()
        try:
            values = msgspec.json.decode(raw)
        except (msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
            raise self.wrong(f"its data cannot be read: {error}") from None
        except msgspec.DecodeError as error:
            if piece:
                raise MalformedError(error) from None
            raise self.wrong(f"its data cannot be read: {error}") from None
        if not isinstance(values, list) and not scalar:
            raise self.wrong("its data is not an array")
        return values

    def _read_carefully(self, raw: memoryview, shape: list[int], elements: int) -> Payload:
        if not raw:
            raise Problem("missing-tensor", f"input {self._spec.name!r} has no data", tensor=self._spec.name)
        flat = self._flatten(self._parse(raw), len(shape))
        if len(flat) != elements:
            raise self.wrong_count(shape, elements, len(flat))
        return self._convert(flat)

    def wrong_count(self, shape: list[int], elements: int, actual: int) -> Problem:
        """The Problem of data with another number of elements than its shape."""
        detail = f"shape {shape} has {elements} elements, the data has {actual}"
        return self.wrong(detail, shape=shape, expected_elements=elements, actual_elements=actual)

    def _read_strings(self, texts: list[bytes]) -> list[bytes]:
        part = self._convert(self._parse(memoryview(b"[%b]" % b",".join(texts)), piece=True))
        return part if isinstance(part, list) else []  # other datatypes take no strings

    def _flatten(self, values: list[Any], depth: int) -> list[Any]:
        """Row-major elements of a nested list at most `depth` deep whose rows have equal lengths."""
        while values and isinstance(values[0], list):
            depth -= 1
            if depth <= 0:
                raise self.wrong("the data is nested deeper than its shape")
            width = len(values[0])
            if not all(isinstance(value, list) and len(value) == width for value in values):
                raise self.wrong(_RAGGED)
            values = [element for value in values for element in value]
        return values

    def _convert(self, flat: list[Any]) -> Payload:
        if self._spec.datatype == "BYTES":
            return self._to_list(flat)
        return self._to_array(flat).data.cast("B") if flat else b""

    def _to_list(self, flat: list[Any]) -> list[bytes]:
        check_strings(self._spec, len(flat))
        return [self._to_bytes(value) for value in flat]

    def _to_bytes(self, value: object) -> bytes:
        if not isinstance(value, str):
            raise self.wrong(f"expected strings, got {_name(value)}")
        return value.encode()

    def _to_array(self, flat: list[Any]) -> np.ndarray[Any, Any]:
        kind = self._dtype.kind
        allowed = {"b": (bool,), "f": (int, float)}.get(kind, (int,))
        for value in flat:
            if not isinstance(value, allowed) or (isinstance(value, bool) and kind != "b"):
                raise self.wrong(f"expected {_WORDS[kind]}, got {_name(value)}")
        if kind == "b":
            return np.array(flat, self._dtype)
        wide = np.float64 if kind == "f" else np.uint64 if min(flat) >= 0 else np.int64
        try:
            return self._narrow(np.array(flat, wide))
        except OverflowError:
            raise self.wrong("a number is too large") from None

    def wrong(self, why: str, **members: Any) -> Problem:
        """The Problem of data that does not fit the tensor."""
        return wrong_data(self._spec, why, **members)


def _shape(values: Any) -> list[int]:
    """The shape of nested lists, read from their first elements."""
    shape = []
    while isinstance(values, list):
        shape.append(len(values))
        values = values[0] if values else None
    return shape


def _name(value: object) -> str:
    names = {str: "a string", bool: "true or false", int: "an integer", float: "a fraction", list: "an array"}
    return "null" if value is None else names.get(type(value), "an object")
