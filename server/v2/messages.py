"""The Open Inference Protocol's infer request as types: msgspec checks it while it parses.

A tensor's `data` stays raw text here, or a simdjson array beside the message, because how to read it depends
on the datatype that the model expects (see `server.v2.json_data`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import msgspec
import simdjson
from msgspec import Meta

from cobatch.server.http.problem import Problem

Body = bytes | bytearray
# Bounded, since a refusal quotes them.
Name = Annotated[str, Meta(max_length=1024)]
Text = Annotated[str, Meta(max_length=16_384)]
Parameters = dict[Name, Text | int | float | bool]


class InputTensor(msgspec.Struct, gc=False):
    """One input: `data` in JSON, or `binary_data_size` among the parameters and bytes in the tail."""

    name: Name
    shape: Annotated[list[int], Meta(max_length=64)]
    datatype: Name
    data: msgspec.Raw = msgspec.Raw(b"")
    parameters: Parameters | None = None


class WantedOutput(msgspec.Struct, gc=False):
    """An output that the caller asks for."""

    name: Name
    parameters: Parameters | None = None


class InferMessage(msgspec.Struct, gc=False):
    """The JSON of an infer request."""

    inputs: list[InputTensor]
    id: Text | None = None
    parameters: Parameters | None = None
    outputs: list[WantedOutput] | None = None


# A body's parts: the message; the binary tail, if there is one; the inputs' data, if simdjson parsed it.
Parsed = tuple[InferMessage, memoryview | None, list[simdjson.Array] | None]


_decode = msgspec.json.Decoder(InferMessage).decode
_T = TypeVar("_T")

# simdjson parses messages of at least this length; from about 500 numbers on it is the faster parser.
LARGE_BYTES = 4096
# pysimdjson 7.0.2 holds an array's length in 24 bits and writes past its memory beyond; each element takes
# at least two bytes of text.
LARGE_LIMIT_BYTES = 2 * 0xFFFFFF
# Syntax, ranges, missing fields, unexpected types, depth: the errors that simdjson and msgspec raise.
_UNFIT = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, msgspec.MsgspecError)


def parse(body: Body, json_length: int | None) -> Parsed:
    """Take a body apart. `json_length` is the header's value, None without that header. Raises Problem."""
    if json_length is None:
        large = parse_large(body) if LARGE_BYTES <= len(body) <= LARGE_LIMIT_BYTES else None
        return large or (decode_json(_decode, body, "an infer request"), None, None)
    if json_length > len(body):
        raise Problem(
            "bad-binary",
            f"Inference-Header-Content-Length is {json_length}, the body has {len(body)} bytes",
            header_length=json_length,
            body_bytes=len(body),
        )
    view = memoryview(body)
    return decode_json(_decode, view[:json_length], "an infer request"), view[json_length:], None


def decode_json(decode: Callable[[Any], _T], text: Body | memoryview | msgspec.Raw, what: str) -> _T:
    """Decode a text with a msgspec decoder; `what` names the expected content. Raises Problem."""
    try:
        return decode(text)
    except msgspec.ValidationError as error:
        raise Problem("bad-request", f"not {what}: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem("not-json", f"the body is not JSON: {error}") from None


def parse_large(text: Body) -> Parsed | None:
    """Parse a message of flat data with simdjson; None for one that msgspec must parse.

    Everything but the data goes through msgspec, so both accept the same and refuse in the same words.
    """
    try:
        # A parser of its own: a shared one refuses to parse while a result of it is alive.
        # Any: a document of another form raises in the lines below.
        document: Any = simdjson.Parser().parse(bytes(text))
        fields = {name: _plain(document[name]) for name in _names(document) if name != "inputs"}
        arrays = []
        tensors = []
        for item in document["inputs"]:
            arrays.append(item["data"])
            tensors.append({name: _plain(item[name]) for name in _names(item) if name != "data"})
        # simdjson flattens nested data without noticing ragged rows: count the brackets.
        flat = text.count(b"[") == 1 + 2 * len(tensors) + ("outputs" in fields)
        if not flat or not all(isinstance(array, simdjson.Array) for array in arrays):
            return None
        return msgspec.convert(fields | {"inputs": tensors}, InferMessage), None, arrays
    except _UNFIT:
        return None


def _names(value: Any) -> list[str]:
    """An object's names. Of a repeated name msgspec takes the last value, simdjson the first."""
    names = list(value)
    if len(set(names)) != len(names):
        raise ValueError("a name is given twice")
    return names


def _plain(value: Any) -> Any:
    if isinstance(value, simdjson.Array):
        return value.as_list()
    return value.as_dict() if isinstance(value, simdjson.Object) else value
