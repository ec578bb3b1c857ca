"""An infer request's body -> rows, row shapes and payloads: parse, check against the signature, read.

The quick checks compare whole values (`shape[1:] == ...`). Only when one fails does slower code look for the
fault, so a valid request pays for the comparison alone.
"""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, TypeVar

import msgspec

from cobatch.batcher.errors import TooManyRowsError
from cobatch.batcher.request import Payload
from cobatch.batcher.rows.padding import Padder
from cobatch.engines.base import RowShapes, Signature
from cobatch.server.http.body import Body
from cobatch.server.http.problem import Problem, from_error
from cobatch.server.v2.binary import cut_tail, read_binary, read_raw
from cobatch.server.v2.checks import OutputSizes, TensorNames, check_tensor, check_text, wrong_shape
from cobatch.server.v2.json_data import JsonReader
from cobatch.server.v2.long_json import ENVELOPE_BYTES, LongValue, cut, marked
from cobatch.server.v2.messages import InferMessage, InputTensor, Parameters, Parsed
from cobatch.server.v2.options import DEFAULT_OPTIONS, RequestOptions, read_flag, read_options

# The outputs that a caller wants: (index in the signature, as binary).
WantedOutputs = tuple[tuple[int, bool], ...]
# Parameters that would put an output elsewhere or turn it into something else.
_UNSUPPORTED = ("classification", "shared_memory_region")
_decode = msgspec.json.Decoder(InferMessage).decode
_T = TypeVar("_T")

# Messages of at least this length may have values that are read in pieces (`server.v2.long_json`).
LARGE_BYTES = 4096
# Longer requests are decoded in a thread: of numbers; of strings or flags, which take longer for each byte.
_SHORT_BYTES = 1 << 16
_SHORT_STRINGS_BYTES = 1 << 14


class Decoded(msgspec.Struct, eq=False, gc=False):
    """The content of an infer request. Payloads that came as binary are views of the body."""

    rows: int
    row_shapes: RowShapes
    payloads: Sequence[Payload]
    id: str | None
    outputs: WantedOutputs
    options: RequestOptions = DEFAULT_OPTIONS


class Decoder:
    """Decodes infer requests for one model. Everything raises Problem."""

    def __init__(self, signature: Signature, max_rows: int, padder: Padder | None = None) -> None:
        self.signature = signature
        self.padder = padder
        self.names = TensorNames(signature, padder)
        self.required = self.names.required
        self.output_sizes = OutputSizes(signature)
        self.readers = tuple(JsonReader(spec) for spec in signature.inputs)
        self._max_rows = max_rows
        self._specs = signature.inputs
        self._index = {spec.name: index for index, spec in enumerate(signature.inputs)}
        self._fixed = all(-1 not in spec.shape for spec in signature.inputs)
        self.row_shapes: RowShapes = tuple(spec.shape for spec in signature.inputs)
        # None equals no shape: a request's shape with -1 in it must not pass as the signature's.
        self._row_lists = [None if -1 in spec.shape else list(spec.shape) for spec in signature.inputs]
        first = signature.inputs[0]
        # The axis at which a row's shape begins: with batching off a request is one row, the whole tensors.
        self._row_axis = 1 if signature.batching.on else 0
        single = self._fixed and len(signature.inputs) == 1
        # The tensor of a request for one row of the only input; None is equal to no shape.
        self._one_row = list(first.tensor_shape(1, first.shape)) if single else None
        self._one_row_elements = prod(self._one_row or ())
        self._name, self._datatype = first.name, first.datatype
        # In binary, where its bytes need no check; -1 equals no size.
        plain = first.datatype not in ("BOOL", "BYTES")
        self._one_row_bytes = self._one_row_elements * first.dtype.itemsize if plain else -1
        # BF16 has no form in JSON (the protocol knows it in binary only).
        self._binary_only = tuple(spec.datatype == "BF16" for spec in signature.outputs)
        strings = any(spec.datatype == "BYTES" for spec in signature.inputs)
        each = strings or any(spec.datatype == "BOOL" for spec in signature.inputs)
        # Longer bodies are decoded in a thread, unless `is_quick`.
        self.short_bytes = _SHORT_STRINGS_BYTES if each else _SHORT_BYTES
        self._looks_at_each = each
        self._plain_tensors = not strings and not any(self._binary_only)
        self.all_json: WantedOutputs = tuple(enumerate(self._binary_only))
        self._all_binary: WantedOutputs = tuple((index, True) for index in range(len(signature.outputs)))

    def decode(self, body: Body, json_length: int | None) -> Decoded:
        """Decode a body; `json_length` is Inference-Header-Content-Length, None without that header."""
        if json_length == 0:
            return self._decode_raw(body)
        return self.read(parse(body, json_length))

    def is_quick(self, json_length: int | None) -> bool:
        """Return whether a long body is decoded in about a millisecond: its binary tensors need no check."""
        return json_length is not None and json_length <= self.short_bytes and not self._looks_at_each

    def read(self, parsed: Parsed) -> Decoded:
        """Check a parsed body against the signature and read its tensors."""
        message, tail, values = parsed
        if len(message.inputs) == 1 and message.outputs is None and not values:
            (tensor,) = message.inputs
            if (
                tensor.shape == self._one_row
                and tensor.name == self._name
                and tensor.datatype == self._datatype
            ):
                # Most small requests are one row of one input, so these are spelled out.
                if tail is not None:
                    outputs = self._outputs_of_one_row(message, tensor, tail)
                    if outputs is not None:
                        return Decoded(1, self.row_shapes, (tail,), message.id, outputs)
                elif message.parameters is None and tensor.parameters is None:
                    payload = self.readers[0].read(tensor.data, tensor.shape, self._one_row_elements)
                    return Decoded(1, self.row_shapes, (payload,), message.id, self.all_json)
        rows, row_shapes, payloads = self._read_inputs(parsed)
        if message.parameters is None and message.outputs is None:
            return Decoded(rows, row_shapes, payloads, message.id, self.all_json)
        options = DEFAULT_OPTIONS if message.parameters is None else read_options(message.parameters)
        return Decoded(rows, row_shapes, payloads, message.id, self._wanted(message), options)

    def is_plain_row(self, decoded: Decoded) -> bool:
        """Return whether a request is one row of fixed shape and size that asks for all outputs in JSON."""
        return (
            decoded.rows == 1
            and decoded.row_shapes is self.row_shapes
            and decoded.outputs is self.all_json
            and decoded.options is DEFAULT_OPTIONS
            and self._plain_tensors
        )

    def _outputs_of_one_row(
        self, message: InferMessage, tensor: InputTensor, tail: memoryview
    ) -> WantedOutputs | None:
        """The outputs wanted by one row in binary; None where there is more to check."""
        size = _only(tensor.parameters, "binary_data_size")
        if type(size) is not int or size != len(tail) or size != self._one_row_bytes or len(tensor.data):
            return None
        if message.parameters is None:
            return self.all_json
        return self._all_binary if _only(message.parameters, "binary_data_output") is True else None

    def _decode_raw(self, body: Body) -> Decoded:
        """Decode a body that is one row of the only input; all outputs come as binary."""
        required, inputs = self.required, self.names.inputs
        if len(required) != 1:
            detail = f"a raw body needs a model with one input, this one has {', '.join(inputs)}"
            raise Problem("bad-binary", detail, inputs=inputs)
        index = self._index[required[0].name]
        payloads: list[Any] = [None] * len(self._specs)
        row_shapes: list[tuple[int, ...]] = [()] * len(self._specs)
        row_shapes[index], payloads[index] = read_raw(required[0], body)
        if self.padder is not None:
            self.padder.add_masks(1, row_shapes, payloads)
        self.output_sizes.check(1, row_shapes)
        return Decoded(1, tuple(row_shapes), payloads, None, self._all_binary)

    def _read_inputs(self, parsed: Parsed) -> tuple[int, RowShapes, Sequence[Payload]]:
        message, tail, values = parsed
        tensors = message.inputs
        names = [tensor.name for tensor in tensors]
        if names != self.names.inputs:
            self.names.check_inputs(names)
        payloads: list[Any] = [None] * len(self._specs)
        row_shapes: list[tuple[int, ...]] = list(self.row_shapes)
        row_axis = self._row_axis
        rows = -1 if row_axis else 1
        offset = 0
        for tensor in tensors:
            index = self._index[tensor.name]
            spec = self._specs[index]
            shape = tensor.shape
            elements = prod(shape)
            if shape[row_axis:] != self._row_lists[index] or tensor.datatype != spec.datatype or elements < 1:
                check_tensor(spec, tensor.datatype, shape)
                row_shapes[index] = tuple(shape[row_axis:])
            if row_axis and rows != shape[0]:
                if rows != -1:
                    raise wrong_shape(spec, shape, f"the other inputs have {rows} rows")
                rows = shape[0]
                if rows > self._max_rows:
                    # Before reading the data, which is the larger part of the work.
                    raise from_error(TooManyRowsError(rows, self._max_rows))
            if tensor.parameters and "binary_data_size" in tensor.parameters:
                data = cut_tail(tensor, tail, offset)
                payloads[index] = read_binary(spec, data, shape)
                offset += len(data)
            elif (value := marked(tensor.data, values)) is not None:
                check = partial(_check_nesting, self.readers[index], shape, elements)
                payloads[index] = self.readers[index].read_long(value, check)[1]
            else:
                payloads[index] = self.readers[index].read(tensor.data, shape, elements)
            check_text(spec, rows, payloads[index])
        if tail is not None and offset != len(tail):
            left = len(tail) - offset
            detail = f"{left} bytes are left over after the last binary tensor"
            raise Problem("bad-binary", detail, left_over_bytes=left)
        if self._fixed:
            return rows, self.row_shapes, payloads
        if self.padder is not None:
            self.padder.add_masks(rows, row_shapes, payloads)
        self.output_sizes.check(rows, row_shapes)
        return rows, tuple(row_shapes), payloads

    def _wanted(self, message: InferMessage) -> WantedOutputs:
        binary = read_flag(message.parameters, "binary_data_output", False)
        outputs = message.outputs
        if not outputs:
            return self._all_binary if binary else self.all_json
        wanted = []
        indices = self.names.output_indices([output.name for output in outputs])
        for index, output in zip(indices, outputs, strict=True):
            for name in _UNSUPPORTED:
                if output.parameters and output.parameters.get(name):
                    raise Problem("bad-parameter", f"{name} is not supported", parameter=name)
            binary_only = self._binary_only[index]
            as_binary = read_flag(output.parameters, "binary_data", binary or binary_only)
            if binary_only and not as_binary:
                detail = f"output {output.name!r} is BF16, which travels as binary only"
                raise Problem("bad-parameter", detail, parameter="binary_data")
            wanted.append((index, as_binary))
        return tuple(wanted)


def _only(parameters: Parameters | None, name: str) -> object:
    """The value of this parameter if it is the only one, else None."""
    return parameters.get(name) if parameters is not None and len(parameters) == 1 else None


def parse(body: Body, json_length: int | None) -> Parsed:
    """Take a body apart. `json_length` is the header's value, None without that header. Raises Problem."""
    if json_length is None:
        if len(body) < LARGE_BYTES:
            return decode_json(_decode, body, "an infer request"), None, ()
        message, values = _parse_long(body)
        return message, None, values
    if json_length > len(body):
        raise Problem(
            "bad-binary",
            f"Inference-Header-Content-Length is {json_length}, the body has {len(body)} bytes",
            header_length=json_length,
            body_bytes=len(body),
        )
    view = memoryview(body)
    if json_length < LARGE_BYTES:
        return decode_json(_decode, view[:json_length], "an infer request"), view[json_length:], ()
    message, values = _parse_long(view[:json_length])
    return message, view[json_length:], values


def _parse_long(text: Body) -> tuple[InferMessage, Sequence[LongValue]]:
    envelope, values = cut(text, ENVELOPE_BYTES)
    return decode_message(envelope), values


def decode_message(text: Body | memoryview | msgspec.Raw) -> InferMessage:
    """Parse a short message, or the envelope of a long one. Raises Problem."""
    return decode_json(_decode, text, "an infer request")


def decode_json(decode: Callable[[Any], _T], text: Body | memoryview | msgspec.Raw, what: str) -> _T:
    """Decode a text with a msgspec decoder; `what` names the expected content. Raises Problem."""
    try:
        return decode(text)
    except msgspec.ValidationError as error:
        raise Problem("bad-request", f"not {what}: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem("not-json", f"the body is not JSON: {error}") from None


def _check_nesting(reader: JsonReader, shape: list[int], elements: int, actual: list[int]) -> None:
    """Raise Problem unless a nesting of the data has as many elements as the shape, and no more axes."""
    if prod(actual) != elements:
        raise reader.wrong_count(shape, elements, prod(actual))
    if len(actual) > max(len(shape), 1):
        raise reader.wrong("the data is nested deeper than its shape")
