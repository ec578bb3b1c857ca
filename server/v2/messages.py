"""The Open Inference Protocol's infer request as types: msgspec checks it while it parses.

A tensor's `data` stays raw text here, or an array of simdjson's beside it, because how to read it depends
on the datatype that the model expects (see `server.v2.json_data`).
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import simdjson
from msgspec import Meta

# Bounded, since what is refused is quoted in the answer.
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


decode_message = msgspec.json.Decoder(InferMessage).decode


# A message this long is parsed by simdjson: from about 500 numbers on it is the faster one.
LARGE_BYTES = 4096
# And up to here: pysimdjson 7.0.2 holds an array's length in 24 bits and writes past its memory beyond,
# and each element takes at least two bytes of text.
MOST_LARGE_BYTES = 2 * 0xFFFFFF
# Syntax, ranges, missing fields, other types than expected, depth: what simdjson and msgspec raise then.
_UNFIT = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, msgspec.MsgspecError)


def parse_large(text: bytes | bytearray) -> tuple[InferMessage, list[simdjson.Array]] | None:
    """The message and each input's data, parsed by simdjson. None: let `decode_message` have a look.

    All but the data goes through msgspec, so what is accepted and what is said of the rest is the same.
    """
    try:
        # A parser of its own: one that is shared refuses to parse while a result is still alive.
        # Any: what is not of the form that the lines below expect raises, and that is the check.
        document: Any = simdjson.Parser().parse(bytes(text))
        fields = {name: _plain(document[name]) for name in _names(document) if name != "inputs"}
        arrays = []
        tensors = []
        for item in document["inputs"]:
            arrays.append(item["data"])
            tensors.append({name: _plain(item[name]) for name in _names(item) if name != "data"})
        # simdjson's flat buffers do not show nesting, so that ragged data would pass: count the brackets.
        flat = text.count(b"[") == 1 + 2 * len(tensors) + ("outputs" in fields)
        if not flat or not all(isinstance(array, simdjson.Array) for array in arrays):
            return None
        return msgspec.convert(fields | {"inputs": tensors}, InferMessage), arrays
    except _UNFIT:
        return None


def _names(value: Any) -> list[str]:
    """An object's names. Of one that is there twice msgspec takes the last value, simdjson the first."""
    names = list(value)
    if len(set(names)) != len(names):
        raise ValueError("a name is given twice")
    return names


def _plain(value: Any) -> Any:
    if isinstance(value, simdjson.Array):
        return value.as_list()
    return value.as_dict() if isinstance(value, simdjson.Object) else value
