"""Hypothesis strategies for infer requests in the binary form, valid and damaged."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
from hypothesis import strategies as st

from cobatch.engines.base import Signature, TensorSpec

SPECS = (
    TensorSpec("x", "FP32", (-1,)),
    TensorSpec("k", "INT64", (2,)),
    TensorSpec("b", "BOOL", (-1, -1)),
    TensorSpec("s", "BYTES", (-1, -1)),
    TensorSpec("h", "BF16", (1,)),
)
DATATYPES = [spec.datatype for spec in SPECS] + ["FP16", "UINT8", "UINT64", "FP128", ""]
SIGNATURES = [
    Signature(SPECS, SPECS),
    *[Signature((spec,), (spec,)) for spec in SPECS],
]
# Its engine takes one byte of strings in a row.
LIMITED = Signature((replace(SPECS[3], max_text_bytes=1),), (SPECS[3],))


@dataclass
class Message:
    """An infer request in the binary form, valid or damaged."""

    json: Any
    tails: list[tuple[dict[str, Any], bytes]]  # of the binary inputs, in order
    header: str | None = None  # instead of the JSON's length
    damage: list[Callable[[bytes], bytes]] = field(default_factory=list)  # applied to the complete body

    def build(self) -> tuple[bytes, str]:
        """Return body and header."""
        text = json.dumps(self.json).encode()
        body = text + b"".join([data for _, data in self.tails])
        for change in self.damage:
            body = change(body)
        return body, str(len(text)) if self.header is None else self.header


def values(draw: st.DrawFn, spec: TensorSpec, elements: int) -> tuple[bytes, list[Any] | None]:
    """Return random elements as binary, and as JSON where possible."""
    if spec.datatype == "BYTES":
        words = draw(st.lists(st.text(max_size=5), min_size=elements, max_size=elements))
        coded = [word.encode() for word in words]
        return b"".join(struct.pack("<I", len(word)) + word for word in coded), words
    size = elements * spec.dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if spec.datatype == "BOOL":
        data = bytes(byte & 1 for byte in data)
    array = np.frombuffer(data, spec.dtype.newbyteorder("<"))
    if spec.datatype == "BF16" or (array.dtype.kind == "f" and not np.isfinite(array).all()):
        return data, None
    return data, array.tolist()


@st.composite
def whole(draw: st.DrawFn, signature: Signature) -> Message:
    """Draw a valid message; each input is binary or JSON."""
    rows = draw(st.integers(1, 3))
    inputs, tails = [], []
    for spec in draw(st.permutations(signature.inputs)):
        shape = [rows, *(draw(st.integers(0, 3)) if size == -1 else size for size in spec.shape)]
        data, listed = values(draw, spec, prod(shape))
        tensor: dict[str, Any] = {"name": spec.name, "datatype": spec.datatype, "shape": shape}
        if listed is not None and draw(st.booleans()):
            tensor["data"] = listed
        else:
            tensor["parameters"] = {"binary_data_size": len(data)}
            tails.append((tensor, data))
        inputs.append(tensor)
    message: dict[str, Any] = {"inputs": inputs}
    if draw(st.booleans()):
        message["parameters"] = {"binary_data_output": draw(st.booleans())}
    return Message(message, tails)


EDGES = [0, 1, -1, 2, 7, 8, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64, 2**70, -(2**63)]
integers = st.sampled_from(EDGES) | st.integers(-20, 200)
scalars = st.none() | st.booleans() | integers | st.floats(allow_nan=True) | st.text(max_size=5)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


def damage_tensor(draw: st.DrawFn, tensor: dict[str, Any]) -> None:
    """Damage the description of an input."""
    key = draw(st.sampled_from(["name", "data", "parameters", "shape", "datatype"]))
    shape = tensor.get("shape")
    match draw(st.integers(0, 5)):
        case 0:
            tensor["parameters"] = {"binary_data_size": draw(integers | scalars)}
        case 1 | 2 if isinstance(shape, list) and shape:
            shape[draw(st.integers(0, len(shape) - 1))] = draw(integers | scalars)
        case 3:
            tensor["datatype"] = draw(st.sampled_from(DATATYPES))
        case 4:
            tensor[key] = draw(anything)
        case 5:
            tensor.pop(key, None)


def damage_sizes(draw: st.DrawFn, message: Message) -> None:
    """Damage an input plausibly: sizes still add up, shapes keep their rank."""
    match draw(st.integers(0, 2)):
        case 0 if message.tails:
            at = draw(st.integers(0, len(message.tails) - 1))
            tensor, data = message.tails[at]
            size = draw(st.integers(0, len(data) + 8))
            tensor["parameters"] = {"binary_data_size": size}
            message.tails[at] = (tensor, data[:size].ljust(size, b"\x01"))
        case 1:
            rows = draw(integers)
            for tensor in message.json["inputs"]:
                if isinstance(tensor.get("shape"), list):
                    tensor["shape"][:1] = [rows]
        case _:
            tensor = draw(st.sampled_from(message.json["inputs"]))
            kinds = [spec for spec in SPECS if spec.name == tensor.get("name")] or SPECS
            tensor["shape"] = [1, *(draw(integers) if size == -1 else size for size in kinds[0].shape)]
            if draw(st.booleans()):  # no elements, so no data is missing for any shape
                tensor["shape"][1:] = [draw(st.sampled_from(EDGES)) for _ in kinds[0].shape]
                tensor["shape"][-1] = 0
                tensor["data"] = []
                tensor.pop("parameters", None)
                message.tails = [(one, data) for one, data in message.tails if one is not tensor]


def damage_body(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """Cut, insert or replace bytes of the body."""
    at = draw(st.integers(0, 300))
    more = draw(st.binary(min_size=1, max_size=20))
    match draw(st.integers(0, 2)):
        case 0:
            return lambda body: body[:at]
        case 1:
            return lambda body: body[:at] + more + body[at:]
        case _:
            return lambda body: body[:at] + more + body[at + len(more) :]


def damage(draw: st.DrawFn, message: Message) -> None:
    """Damage one part of the message."""
    inputs = message.json["inputs"]
    match draw(st.integers(0, 9)):
        case 0:
            message.header = draw(integers.map(str) | st.sampled_from(["", "x", "1e2", "-0", "0x8"]))
        case 1:
            message.json[draw(st.sampled_from(["outputs", "parameters", "id", "more"]))] = draw(anything)
        case 2:
            inputs.append(draw(st.sampled_from(inputs)))
        case 3:
            message.tails.reverse()
        case 4:
            message.damage.append(damage_body(draw))
        case 5 | 6 | 7:
            damage_sizes(draw, message)
        case _:
            damage_tensor(draw, draw(st.sampled_from(inputs)))


@st.composite
def hostile(draw: st.DrawFn, signature: Signature) -> Message:
    """Draw a valid message and damage it in up to three places."""
    message = draw(whole(signature))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        damage(draw, message)
    return message
