"""An infer request's body -> rows, row shapes and payloads, checked against the model's signature.

The quick checks compare whole values (`shape[1:] == ...`); only when one fails does the slower code
find out what exactly is wrong, so that a good request pays for nothing but being good.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import msgspec
import numpy as np
import simdjson

from batcher.request import Payload
from engines.base import RowShapes, Signature, TensorSpec
from server.problems import Problem
from server.v2_data import JsonReader
from server.v2_messages import (
    LARGE_BYTES,
    InferMessage,
    InputTensor,
    Parameters,
    WantedOutput,
    decode_message,
    parse_large,
)

Body = bytes | bytearray
# Which outputs a caller wants: (index in the signature, as binary).
Wants = tuple[tuple[int, bool], ...]
_RESERVED = ("triton_", "headers")


class _LookCloserError(Exception):
    """simdjson's result is not enough to say what is wrong, or to do without the text."""


def _look_closer() -> Payload:
    raise _LookCloserError


class Decoded(NamedTuple):
    """What an infer request says. Payloads are views of the body where they came as binary."""

    rows: int
    row_shapes: RowShapes
    payloads: Sequence[Payload]
    id: str | None
    wants: Wants


class Decoder:
    """Decodes infer requests for one model."""

    def __init__(self, signature: Signature) -> None:
        self._specs = signature.inputs
        self._readers = tuple(JsonReader(spec) for spec in signature.inputs)
        self._names = [spec.name for spec in signature.inputs]
        self._fixed = all(-1 not in spec.shape for spec in signature.inputs)
        self._row_shapes: RowShapes = tuple(spec.shape for spec in signature.inputs)
        self._row_lists = [list(spec.shape) for spec in signature.inputs]
        self._outputs = {spec.name: index for index, spec in enumerate(signature.outputs)}
        self._all_json: Wants = tuple((index, False) for index in range(len(signature.outputs)))
        self._all_binary: Wants = tuple((index, True) for index in range(len(signature.outputs)))

    def decode(self, body: Body, json_length: int | None) -> Decoded:
        """Raises Problem. `json_length` is the header's value, None where there was no header."""
        if json_length is None:
            decoded = self._decode_large(body) if len(body) >= LARGE_BYTES else None
            if decoded is not None:
                return decoded
            message, tail = self._message(body), None
        else:
            if not 0 < json_length <= len(body):
                raise Problem(
                    "bad-binary",
                    f"Inference-Header-Content-Length is {json_length}, the body has {len(body)} bytes",
                    header_length=json_length,
                    body_bytes=len(body),
                )
            view = memoryview(body)
            message, tail = self._message(view[:json_length]), view[json_length:]
        return self._decoded(message, *self._inputs(message, tail, None))

    def _decode_large(self, body: Body) -> Decoded | None:
        """The same through simdjson; None where the other way has to have a look."""
        parsed = parse_large(body)
        if parsed is None:
            return None
        message, arrays = parsed
        try:
            return self._decoded(message, *self._inputs(message, None, arrays))
        except _LookCloserError:
            return None

    def _decoded(
        self, message: InferMessage, rows: int, row_shapes: RowShapes, payloads: Sequence[Payload]
    ) -> Decoded:
        if message.outputs is None and message.parameters is None:
            wants = self._all_json
        else:
            wants = self._wants(message)
        return Decoded(rows, row_shapes, payloads, message.id, wants)

    def _message(self, text: Body | memoryview) -> InferMessage:
        try:
            return decode_message(text)
        except msgspec.ValidationError as error:
            raise Problem("bad-request", f"not an infer request: {error}") from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Problem("not-json", f"the body is not JSON: {error}") from None

    def _inputs(
        self, message: InferMessage, tail: memoryview | None, arrays: Sequence[simdjson.Array] | None
    ) -> tuple[int, RowShapes, Sequence[Payload]]:
        tensors = message.inputs
        if [tensor.name for tensor in tensors] != self._names:
            self._check_names(tensors)
        payloads: list[Payload] = [b""] * len(tensors)
        row_shapes: list[tuple[int, ...]] | None = None if self._fixed else [()] * len(tensors)
        rows = -1
        offset = 0
        for position, tensor in enumerate(tensors):
            index = position
            if tensor.name != self._names[index]:
                index = self._names.index(tensor.name)
            spec = self._specs[index]
            shape = tensor.shape
            if shape[1:] != self._row_lists[index] or shape[0] < 1 or tensor.datatype != spec.datatype:
                self._check_tensor(tensor, spec)
            if row_shapes is not None:
                row_shapes[index] = tuple(shape[1:])
            if rows == -1:
                rows = shape[0]
            elif rows != shape[0]:
                raise self._wrong_shape(tensor, spec, f"the other inputs have {rows} rows")
            elements = prod(shape)
            if tensor.parameters and "binary_data_size" in tensor.parameters:
                size = self._binary_size(tensor, tail, offset)
                assert tail is not None
                payloads[index] = self._binary(tensor, spec, tail[offset : offset + size], elements)
                offset += size
            elif arrays is None:
                payloads[index] = self._readers[index].read(tensor.data, shape, elements)
            else:
                payloads[index] = (
                    self._readers[index].read_array(arrays[position], elements) or _look_closer()
                )
        if tail is not None and offset != len(tail):
            raise Problem(
                "bad-binary",
                f"{len(tail) - offset} bytes are left over after the last binary tensor",
                left_over_bytes=len(tail) - offset,
            )
        return rows, self._row_shapes if row_shapes is None else tuple(row_shapes), payloads

    def _check_names(self, tensors: list[InputTensor]) -> None:
        seen = set()
        for tensor in tensors:
            if tensor.name not in self._names:
                raise Problem(
                    "unknown-tensor",
                    f"the model has no input {tensor.name!r}; its inputs are {', '.join(self._names)}",
                    tensor=tensor.name,
                    inputs=self._names,
                )
            if tensor.name in seen:
                raise Problem("duplicate-tensor", f"input {tensor.name!r} is given twice", tensor=tensor.name)
            seen.add(tensor.name)
        for name in self._names:
            if name not in seen:
                raise Problem("missing-tensor", f"input {name!r} is missing", tensor=name)

    def _check_tensor(self, tensor: InputTensor, spec: TensorSpec) -> None:
        """Find what the quick comparison stumbled over; return if a variable axis explains it."""
        if tensor.datatype != spec.datatype:
            raise Problem(
                "wrong-datatype",
                f"input {spec.name!r} is {spec.datatype}, got {tensor.datatype!r}",
                tensor=spec.name,
                expected=spec.datatype,
                actual=tensor.datatype,
            )
        shape = tensor.shape
        if len(shape) != len(spec.shape) + 1:
            raise self._wrong_shape(tensor, spec, f"it needs {len(spec.shape) + 1} axes")
        if shape[0] < 1:
            raise self._wrong_shape(tensor, spec, "it needs at least one row")
        for size, expected in zip(shape[1:], spec.shape, strict=True):
            if size != expected and not (expected == -1 and size >= 0):
                raise self._wrong_shape(tensor, spec, None)

    def _wrong_shape(self, tensor: InputTensor, spec: TensorSpec, why: str | None) -> Problem:
        expected = [-1, *spec.shape]
        detail = f"input {spec.name!r} has shape {expected} (-1: any), got {tensor.shape}"
        if why is not None:
            detail += f": {why}"
        return Problem("wrong-shape", detail, tensor=spec.name, expected=expected, actual=tensor.shape)

    def _binary_size(self, tensor: InputTensor, tail: memoryview | None, offset: int) -> int:
        if tail is None:
            raise Problem(
                "bad-binary",
                f"input {tensor.name!r} has binary_data_size, but Inference-Header-Content-Length is missing",
                tensor=tensor.name,
            )
        left = len(tail) - offset
        assert tensor.parameters is not None
        size = tensor.parameters["binary_data_size"]
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise Problem(
                "bad-binary", f"input {tensor.name!r}: binary_data_size is {size!r}", tensor=tensor.name
            )
        if size > left:
            raise Problem(
                "bad-binary",
                f"input {tensor.name!r}: binary_data_size is {size}, the body has {left} bytes left",
                tensor=tensor.name,
                binary_data_size=size,
                left_bytes=left,
            )
        if len(tensor.data):
            raise Problem(
                "bad-binary", f"input {tensor.name!r} has both data and binary_data_size", tensor=tensor.name
            )
        return size

    def _binary(self, tensor: InputTensor, spec: TensorSpec, data: memoryview, elements: int) -> Payload:
        if spec.datatype == "BYTES":
            return _read_bytes_tensor(data, elements, spec)
        expected = elements * spec.dtype.itemsize
        if len(data) != expected:
            raise Problem(
                "wrong-data",
                f"input {spec.name!r} ({spec.datatype}): shape {tensor.shape} takes {expected} bytes, "
                f"got {len(data)}",
                tensor=spec.name,
                expected_bytes=expected,
                actual_bytes=len(data),
            )
        if spec.datatype == "BOOL" and len(data) and np.frombuffer(data, np.uint8).max() > 1:
            raise Problem("wrong-data", f"input {spec.name!r} (BOOL): bytes must be 0 or 1", tensor=spec.name)
        return data

    def _wants(self, message: InferMessage) -> Wants:
        self._check_parameters(message.parameters)
        binary = _flag(message.parameters, "binary_data_output", False)
        if message.outputs is None:
            return self._all_binary if binary else self._all_json
        wants: dict[int, bool] = {}
        for output in message.outputs:
            index = self._output_index(output)
            if index in wants:
                raise Problem(
                    "duplicate-tensor", f"output {output.name!r} is asked for twice", tensor=output.name
                )
            wants[index] = _flag(output.parameters, "binary_data", binary)
        return tuple(wants.items()) or (self._all_binary if binary else self._all_json)

    def _output_index(self, output: WantedOutput) -> int:
        index = self._outputs.get(output.name)
        if index is None:
            names = list(self._outputs)
            raise Problem(
                "unknown-tensor",
                f"the model has no output {output.name!r}; its outputs are {', '.join(names)}",
                tensor=output.name,
                outputs=names,
            )
        if output.parameters and output.parameters.get("classification"):
            raise Problem("bad-parameter", "classification is not supported", parameter="classification")
        return index

    def _check_parameters(self, parameters: Parameters | None) -> None:
        for name in parameters or ():
            if name.startswith(_RESERVED):
                raise Problem("bad-parameter", f"parameter {name!r} is reserved", parameter=name)


def _flag(parameters: Parameters | None, name: str, default: bool) -> bool:
    if not parameters:
        return default
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise Problem("bad-parameter", f"{name} must be true or false, got {value!r}", parameter=name)
    return value


def _read_bytes_tensor(data: memoryview, elements: int, spec: TensorSpec) -> list[bytes]:
    """BYTES in binary: each element is its length (u32, little-endian) and its bytes."""
    values: list[bytes] = []
    at = 0
    while at + 4 <= len(data) and len(values) < elements:
        size = int.from_bytes(data[at : at + 4], "little")
        if size > len(data) - at - 4:
            break
        values.append(bytes(data[at + 4 : at + 4 + size]))
        at += 4 + size
    if at != len(data) or len(values) != elements:
        raise Problem(
            "wrong-data",
            f"input {spec.name!r} (BYTES): {len(data)} bytes do not hold exactly {elements} elements",
            tensor=spec.name,
            expected_elements=elements,
            actual_elements=len(values),
        )
    return values
