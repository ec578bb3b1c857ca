"""An infer request's body -> rows, row shapes and payloads, checked against the model's signature.

The quick checks compare whole values (`shape[1:] == ...`); only when one fails does the slower code
find out what exactly is wrong, so that a good request pays for nothing but being good.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import msgspec
import simdjson

from cobatch.batcher.errors import TooManyRowsError
from cobatch.batcher.request import Payload
from cobatch.batcher.rows.padding import Padder
from cobatch.engines.base import RowShapes, Signature, TensorSpec, within
from cobatch.server.http.problem import Problem, from_error
from cobatch.server.v2.binary import binary_size, read_binary, read_raw
from cobatch.server.v2.json_data import JsonReader
from cobatch.server.v2.messages import (
    LARGE_BYTES,
    MOST_LARGE_BYTES,
    InferMessage,
    InputTensor,
    Parameters,
    WantedOutput,
    decode_message,
    parse_large,
)
from cobatch.server.v2.options import NO_WISHES, Wishes, read_flag, read_parameters

Body = bytes | bytearray
# Which outputs a caller wants: (index in the signature, as binary).
Wants = tuple[tuple[int, bool], ...]
# A tensor without elements is bounded by no data; NumPy refuses one whose other axes are beyond memory.
_MOST_EMPTY = 2**32
# Parameters that would put an output elsewhere or turn it into something else.
_UNSUPPORTED = ("classification", "shared_memory_region")


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
    wishes: Wishes = NO_WISHES


class Decoder:
    """Decodes infer requests for one model; `server.predictions.decode` shares its checks."""

    def __init__(self, signature: Signature, most_rows: int, padder: Padder | None = None) -> None:
        self._padder = padder
        masks = set() if padder is None else {mask.tensor for _, mask in padder.masks}
        # What a caller must send, and the only input of it, if it is one.
        self.required = [spec for index, spec in enumerate(signature.inputs) if index not in masks]
        self._required = {spec.name for spec in self.required}
        self.most_rows = most_rows
        self.signature = signature
        self._specs = signature.inputs
        self.readers = tuple(JsonReader(spec) for spec in signature.inputs)
        self._names = [spec.name for spec in signature.inputs]
        self._fixed = all(-1 not in spec.shape for spec in signature.inputs)
        self.row_shapes: RowShapes = tuple(spec.shape for spec in signature.inputs)
        # None equals no shape: one that says -1, as the signature does, must not look like a quick match.
        self._row_lists = [None if -1 in spec.shape else list(spec.shape) for spec in signature.inputs]
        self._one_row = [1, *self.row_shapes[0]] if self._fixed and len(self._specs) == 1 else None
        self._one_row_elements = prod(self._one_row or ())
        # Of a row whose bytes need no further look when they come as binary; -1 equals no size.
        plain = self._specs[0].datatype not in ("BOOL", "BYTES")
        self._one_row_bytes = self._one_row_elements * self._specs[0].dtype.itemsize if plain else -1
        self._outputs = {spec.name: index for index, spec in enumerate(signature.outputs)}
        # BF16 has no form in JSON (the protocol knows it in binary only).
        self._binary_only = tuple(spec.datatype == "BF16" for spec in signature.outputs)
        self.all_json: Wants = tuple(enumerate(self._binary_only))
        # The same where it is JSON indeed, which saves looking; else nothing that is ever wanted.
        self.all_text: Wants | None = None if any(self._binary_only) else self.all_json
        self._all_binary: Wants = tuple((index, True) for index in range(len(signature.outputs)))

    def decode(self, body: Body, json_length: int | None) -> Decoded:
        """Raises Problem. `json_length` is the header's value, None where there was no header."""
        if json_length == 0:
            return self._decode_raw(body)
        if json_length is None:
            decoded = self._decode_large(body) if LARGE_BYTES <= len(body) <= MOST_LARGE_BYTES else None
            if decoded is not None:
                return decoded
            return self.decode_message(self._message(body))
        if json_length > len(body):
            raise Problem(
                "bad-binary",
                f"Inference-Header-Content-Length is {json_length}, the body has {len(body)} bytes",
                header_length=json_length,
                body_bytes=len(body),
            )
        view = memoryview(body)
        message = self._message(view[:json_length])
        tail = view[json_length:]
        if message.outputs is None and len(message.inputs) == 1:
            (tensor,) = message.inputs
            size = _only(tensor.parameters, "binary_data_size")
            binary = message.parameters and _only(message.parameters, "binary_data_output")
            if (
                type(size) is int
                and size == len(tail) == self._one_row_bytes
                and (binary is None or binary is True)
                and self._is_one_row(tensor)
                and not len(tensor.data)
            ):
                wants = self._all_binary if binary else self.all_json
                return Decoded(1, self.row_shapes, (tail,), message.id, wants)
        return self._decoded(message, *self._inputs(message, tail, None))

    def decode_message(self, message: InferMessage) -> Decoded:
        """The same for a message without binary tail that is parsed already. Raises Problem."""
        row = self.plain_row(message)
        if row is not None:
            return Decoded(1, self.row_shapes, (row,), message.id, self.all_json)
        return self._decoded(message, *self._inputs(message, None, None))

    def plain_row(self, message: InferMessage) -> Payload | None:
        """The data of a message that is one JSON row for a model with one input and asks for nothing else.

        Most small requests are that, so it is spelled out. None for any other. Raises Problem.
        """
        if message.parameters is None and message.outputs is None and len(message.inputs) == 1:
            (tensor,) = message.inputs
            if self._is_one_row(tensor) and tensor.parameters is None:
                return self.readers[0].read(tensor.data, tensor.shape, self._one_row_elements)
        return None

    def _is_one_row(self, tensor: InputTensor) -> bool:
        spec = self._specs[0]
        return tensor.shape == self._one_row and tensor.name == spec.name and tensor.datatype == spec.datatype

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

    def _decode_raw(self, body: Body) -> Decoded:
        """A body that is one row of the only input and nothing else; all outputs come as binary."""
        if len(self.required) != 1:
            detail = f"a raw body needs a model with one input, this one has {', '.join(self._names)}"
            raise Problem("bad-binary", detail, inputs=self._names)
        row_shape, payload = read_raw(body, self.required[0])
        if self._padder is None:
            return Decoded(1, (row_shape,), [payload], None, self._all_binary)
        index = self._specs.index(self.required[0])
        row_shapes: list[tuple[int, ...]] = [()] * len(self._specs)
        payloads: list[Any] = [None] * len(self._specs)
        row_shapes[index], payloads[index] = row_shape, payload
        self.add_masks(1, row_shapes, payloads)
        return Decoded(1, tuple(row_shapes), payloads, None, self._all_binary)

    def add_masks(self, rows: int, row_shapes: list[tuple[int, ...]], payloads: list[Any]) -> None:
        """Make the inputs that a caller may leave out, and did: they are None in `payloads`."""
        if self._padder is not None:
            self._padder.add_masks(rows, row_shapes, payloads)

    def _decoded(
        self, message: InferMessage, rows: int, row_shapes: RowShapes, payloads: Sequence[Payload]
    ) -> Decoded:
        if message.parameters is None:
            wants = self.all_json if message.outputs is None else self._wants(message)
            return Decoded(rows, row_shapes, payloads, message.id, wants)
        wishes = read_parameters(message.parameters)
        return Decoded(rows, row_shapes, payloads, message.id, self._wants(message), wishes)

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
            self.check_names(tensors)
        payloads: list[Any] = [None] * len(self._specs)
        row_shapes: list[tuple[int, ...]] | None = None if self._fixed else [()] * len(self._specs)
        rows = -1
        offset = 0
        for position, tensor in enumerate(tensors):
            index = position
            if tensor.name != self._names[index]:
                index = self._names.index(tensor.name)
            spec = self._specs[index]
            shape = tensor.shape
            elements = prod(shape)
            # Read off what a good tensor looks like; `check_tensor` says what is wrong with any other.
            if shape[1:] != self._row_lists[index] or tensor.datatype != spec.datatype or elements < 1:
                self.check_tensor(tensor, spec)
            if row_shapes is not None:
                row_shapes[index] = tuple(shape[1:])
            if rows != shape[0]:
                rows = self._rows(tensor, spec, rows)
            if tensor.parameters and "binary_data_size" in tensor.parameters:
                size = binary_size(tensor, tail, offset)
                assert tail is not None
                payloads[index] = read_binary(tensor, spec, tail[offset : offset + size], elements)
                offset += size
            elif arrays is None:
                payloads[index] = self.readers[index].read(tensor.data, shape, elements)
            else:
                payloads[index] = self.readers[index].read_array(arrays[position], elements) or _look_closer()
        if tail is not None and offset != len(tail):
            raise Problem(
                "bad-binary",
                f"{len(tail) - offset} bytes are left over after the last binary tensor",
                left_over_bytes=len(tail) - offset,
            )
        if row_shapes is None:
            return rows, self.row_shapes, payloads
        if self._padder is not None:
            self._padder.add_masks(rows, row_shapes, payloads)
        return rows, tuple(row_shapes), payloads

    def _rows(self, tensor: InputTensor, spec: TensorSpec, others: int) -> int:
        """The first tensor's rows, where `others` is -1; a Problem for one that differs from the others'."""
        rows = tensor.shape[0]
        if others != -1:
            raise self.wrong_shape(tensor, spec, f"the other inputs have {others} rows")
        if rows > self.most_rows:
            # Said before the data is decoded: that would be the larger part of the work.
            raise from_error(TooManyRowsError(rows, self.most_rows))
        return rows

    def check_names(self, tensors: list[InputTensor]) -> None:
        """Raises Problem unless each input is there exactly once, but for masks, and no others."""
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
            if name not in seen and name in self._required:
                raise Problem("missing-tensor", f"input {name!r} is missing", tensor=name)

    def check_tensor(self, tensor: InputTensor, spec: TensorSpec) -> None:
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
            raise self.wrong_shape(tensor, spec, f"it needs {len(spec.shape) + 1} axes")
        if shape[0] < 1:
            raise self.wrong_shape(tensor, spec, "it needs at least one row")
        for size, expected in zip(shape[1:], spec.shape, strict=True):
            if size < 0 or expected not in (size, -1):
                raise self.wrong_shape(tensor, spec, None)
        if spec.ranges and not any(within(low, shape[1:], high) for low, high in spec.ranges):
            shown = " or ".join(f"{list(low)} to {list(high)}" for low, high in spec.ranges)
            raise self.wrong_shape(tensor, spec, f"the engine takes rows of {shown}")
        if not prod(shape) and prod(size or 1 for size in shape) > _MOST_EMPTY:
            raise self.wrong_shape(tensor, spec, "an axis is too large")

    def wrong_shape(self, tensor: InputTensor, spec: TensorSpec, why: str | None) -> Problem:
        """The Problem that says which shape the input has and which one came."""
        expected = [-1, *spec.shape]
        detail = f"input {spec.name!r} has shape {expected} (-1: any), got {tensor.shape}"
        if why is not None:
            detail += f": {why}"
        return Problem("wrong-shape", detail, tensor=spec.name, expected=expected, actual=tensor.shape)

    def _wants(self, message: InferMessage) -> Wants:
        binary = read_flag(message.parameters, "binary_data_output", False)
        if message.outputs is None:
            return self._all_binary if binary else self.all_json
        wants: dict[int, bool] = {}
        for output in message.outputs:
            index = self.output_index(output)
            if index in wants:
                raise Problem(
                    "duplicate-tensor", f"output {output.name!r} is asked for twice", tensor=output.name
                )
            wants[index] = read_flag(output.parameters, "binary_data", binary or self._binary_only[index])
            if self._binary_only[index] and not wants[index]:
                detail = f"output {output.name!r} is BF16, which travels as binary only"
                raise Problem("bad-parameter", detail, parameter="binary_data")
        return tuple(wants.items()) or (self._all_binary if binary else self.all_json)

    def output_index(self, output: WantedOutput) -> int:
        """Where the output stands in the signature. Raises Problem."""
        index = self._outputs.get(output.name)
        if index is None:
            names = list(self._outputs)
            raise Problem(
                "unknown-tensor",
                f"the model has no output {output.name!r}; its outputs are {', '.join(names)}",
                tensor=output.name,
                outputs=names,
            )
        for name in _UNSUPPORTED:
            if output.parameters and output.parameters.get(name):
                raise Problem("bad-parameter", f"{name} is not supported", parameter=name)
        return index


def _only(parameters: Parameters | None, name: str) -> object:
    """The value of this parameter if it is the only one, else False."""
    return parameters.get(name, False) if parameters is not None and len(parameters) == 1 else False
