"""The Open Inference Protocol's infer request as types: msgspec checks it while it parses.

A tensor's `data` stays raw text here, because how to read it depends on the datatype that the model
expects (see `server.v2_data`).
"""

from __future__ import annotations

import msgspec

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
