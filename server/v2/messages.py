"""The Open Inference Protocol's infer request as types: msgspec checks it while it parses.

A tensor's `data` stays raw text here, or the mark of a long value beside the message, because how to read it
depends on the datatype that the model expects (see `server.v2.json_data`).
"""

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from cobatch.server.v2.long_json import LongValue

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


# A body's parts: the message; the binary tail, if there is one; the long values of its JSON.
Parsed = tuple[InferMessage, memoryview | None, Sequence[LongValue]]
