"""The Open Inference Protocol's infer request as types: msgspec checks it while it parses.

A tensor's `data` stays raw text here, or an array of simdjson's beside it, because how to read it depends
on the datatype that the model expects (see `server.v2_data`).
"""

from __future__ import annotations

from typing import Any

import msgspec
import simdjson

Parameters = dict[str, str | int | float | bool]


class InputTensor(msgspec.Struct, gc=False):
    """One input: `data` in JSON, or `binary_data_size` among the parameters and bytes in the tail."""

    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = msgspec.Raw(b"")
    parameters: Parameters | None = None


class WantedOutput(msgspec.Struct, gc=False):
    """An output that the caller asks for."""

    name: str
    parameters: Parameters | None = None


class InferMessage(msgspec.Struct, gc=False):
    """The JSON of an infer request."""

    inputs: list[InputTensor]
    id: str | None = None
    parameters: Parameters | None = None
    outputs: list[WantedOutput] | None = None


decode_message = msgspec.json.Decoder(InferMessage).decode


# A message this long is parsed by simdjson: from about 500 numbers on it is the faster one.
LARGE_BYTES = 4096
# Syntax, ranges, missing fields, other types than expected, depth: what simdjson and msgspec raise then.
_UNFIT = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, msgspec.MsgspecError)


def parse_large(text: bytes | bytearray | memoryview) -> tuple[InferMessage, list[simdjson.Array]] | None:
    """The message and each input's data, parsed by simdjson. None: let `decode_message` have a look.

    All but the data goes through msgspec, so what is accepted and what is said of the rest is the same.
    """
    try:
        # A parser of its own: one that is shared refuses to parse while a result is still alive.
        # Any: what is not of the form that the lines below expect raises, and that is the check.
        document: Any = simdjson.Parser().parse(bytes(text))
        fields: dict[str, Any] = {name: _plain(document[name]) for name in document if name != "inputs"}
        arrays = []
        fields["inputs"] = tensors = []
        for tensor in document["inputs"]:
            arrays.append(tensor["data"])
            tensors.append({name: _plain(tensor[name]) for name in tensor if name != "data"})
        if not all(isinstance(array, simdjson.Array) for array in arrays):
            return None
        return msgspec.convert(fields, InferMessage), arrays
    except _UNFIT:
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, simdjson.Array):
        return value.as_list()
    return value.as_dict() if isinstance(value, simdjson.Object) else value
