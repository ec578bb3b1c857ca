"""What the JSON of a prediction's request may hold, as types: msgspec checks it while it parses.

A prediction's request -> rows, row shapes and payloads, checked against the model's signature.

Whatever form the tensors come in, shape and datatype are the model's or the request is refused: nothing
is converted silently. The checks are those of the V2 decoder, in the same words.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from math import prod
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
from msgspec import Meta

from cobatch.batcher.request import Payload
from cobatch.engines.base import RowShapes, TensorSpec
from cobatch.server.http.problem import Problem
from cobatch.server.predictions.content import JSON, MULTIPART, NPY, OPTIONS_PART, Content, Field
from cobatch.server.predictions.npy import datatype_of, read_npy
from cobatch.server.v2.binary import read_binary, read_raw
from cobatch.server.v2.decode import Decoder
from cobatch.server.v2.messages import InputTensor, WantedOutput

_Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Axis = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class Options(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a request says beside its tensors. Raw bodies have it in the query."""

    outputs: list[str] | None = None
    deadline_ms: Annotated[float, Meta(gt=0, le=86_400_000)] | None = None
    priority: Annotated[int, Meta(ge=0, le=2**32 - 1)] = 0
    top_k: _Count | dict[str, _Count] | None = None


class JsonRequest(Options, kw_only=True, forbid_unknown_fields=True):
    """A whole request in JSON."""

    inputs: dict[str, msgspec.Raw]


class FormOptions(Options, kw_only=True, forbid_unknown_fields=True):
    """The part "request" of a form: raw parts hold one row, unless their shape is given here."""

    shapes: dict[str, list[_Axis]] = {}


class RawOptions(Options, kw_only=True, forbid_unknown_fields=True):
    """The query of a raw body, which is one row unless its shape is given here."""

    shape: list[_Axis] | None = None


class Encoded(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tensor inside JSON as bytes: little-endian, C order, in base64. `dtype` is V2's or NumPy's name."""

    b64: str
    dtype: str
    shape: list[_Axis]


# Which outputs a caller wants: (index in the signature, how many of the best scores, None for all data).
Wants = tuple[tuple[int, int | None], ...]


class Work(NamedTuple):
    """What a request asks for."""

    rows: int
    row_shapes: RowShapes
    payloads: Sequence[Payload]
    wants: Wants
    priority: int
    timeout_s: float | None

    @property
    def bytes(self) -> int:
        """What the tensors take in memory, about."""
        return sum(
            sum(len(element) + _BYTES_OBJECT for element in payload)
            if isinstance(payload, list)
            else len(payload)
            for payload in self.payloads
        )


# Of a BYTES element: Python's object and the pointer to it.
_BYTES_OBJECT = 41
_S = TypeVar("_S", bound=msgspec.Struct)


def decode(content: Content, decoder: Decoder) -> Work:
    """Raises Problem. `decoder` is the model's."""
    if content.media in (JSON, MULTIPART) and content.query:
        name = content.query[0][0]
        raise Problem("bad-parameter", f"{name} belongs in the body, not in the query", parameter=name)
    shapes: dict[str, list[int]] = {}
    if content.media == JSON:
        options: Options = _parse(content.fields[0].data, JsonRequest, "a prediction's request")
        assert isinstance(options, JsonRequest)
        fields: Sequence[Field] = [Field(name, JSON, raw) for name, raw in options.inputs.items()]
    elif content.media == MULTIPART:
        fields = [field for field in content.fields if field.name != OPTIONS_PART]
        options = form = _form_options(content)
        shapes = form.shapes
    else:
        options = raw_options = _query_options(content.query)
        fields = [_only_input(content.fields[0], decoder)]
        if raw_options.shape is not None:
            shapes = {fields[0].name: raw_options.shape}
    return _work(fields, options, shapes, decoder)


def _parse(text: Any, kind: type[_S], what: str) -> _S:
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as error:
        raise Problem("bad-request", f"not {what}: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Problem("not-json", f"the body is not JSON: {error}") from None


def _form_options(content: Content) -> FormOptions:
    found = [field for field in content.fields if field.name == OPTIONS_PART]
    if len(found) > 1:
        raise Problem("bad-request", f"the part {OPTIONS_PART!r} is there {len(found)} times")
    return (
        _parse(found[0].data, FormOptions, f"what the part {OPTIONS_PART!r} may hold")
        if found
        else FormOptions()
    )


def _query_options(query: Sequence[tuple[str, str]]) -> RawOptions:
    values: dict[str, Any] = {}
    for name, value in query:
        if name == "outputs":
            values.setdefault(name, []).append(value)
        elif name in values:
            raise Problem("bad-parameter", f"{name} is there twice", parameter=name)
        else:
            values[name] = value.split(",") if name == "shape" else value
    try:
        return msgspec.convert(values, RawOptions, strict=False)
    except msgspec.ValidationError as error:
        raise Problem("bad-parameter", f"the query cannot be read: {error}") from None


def _only_input(field: Field, decoder: Decoder) -> Field:
    names = [spec.name for spec in decoder.required]
    if len(names) != 1:
        detail = f"a body that is one tensor needs a model with one input, this one has {', '.join(names)}"
        raise Problem("bad-request", detail)
    return field._replace(name=names[0])


def _work(fields: Sequence[Field], options: Options, shapes: dict[str, list[int]], decoder: Decoder) -> Work:
    tensors = [InputTensor(field.name, [], "") for field in fields]
    decoder.check_names(tensors)
    for name in shapes:
        if name not in [field.name for field in fields]:
            raise Problem("bad-parameter", f"shapes: there is no part {name!r}", parameter="shapes")
    specs = decoder.signature.inputs
    names = [spec.name for spec in specs]
    payloads: list[Any] = [None] * len(specs)
    row_shapes: list[tuple[int, ...]] = [()] * len(specs)
    rows = -1
    for field, tensor in zip(fields, tensors, strict=True):
        index = names.index(field.name)
        payloads[index] = _Reader(decoder, index, tensor).read(field, shapes.get(field.name))
        row_shapes[index] = tuple(tensor.shape[1:])
        if rows not in (-1, tensor.shape[0]):
            raise decoder.wrong_shape(tensor, specs[index], f"the other inputs have {rows} rows")
        rows = tensor.shape[0]
    timeout_s = None if options.deadline_ms is None else options.deadline_ms / 1000
    decoder.add_masks(rows, row_shapes, payloads)
    return Work(rows, tuple(row_shapes), payloads, _wants(options, decoder), options.priority, timeout_s)


class _Reader:
    """Reads one input, and fills in its tensor's shape and datatype."""

    def __init__(self, decoder: Decoder, index: int, tensor: InputTensor) -> None:
        self._decoder = decoder
        self._index = index
        self._spec = decoder.signature.inputs[index]
        self._tensor = tensor

    def read(self, field: Field, shape: list[int] | None) -> Payload:
        spec = self._spec
        if field.media == JSON:
            return self._read_json(field.data)
        data = memoryview(field.data)
        if field.media == NPY:
            if shape is not None:
                raise Problem("bad-parameter", "a .npy file has its shape itself", parameter="shape")
            return read_npy(data, spec, self._check)[1]
        if shape is None:
            row_shape, payload = read_raw(field.data, spec)
            self._check([1, *row_shape], spec.datatype)
            return payload
        return self._read_bytes(data, shape, spec.datatype)

    def _read_json(self, data: bytes | bytearray) -> Payload:
        # Behind the blanks there is something: the text was parsed once already, or it is not JSON.
        if bytes(memoryview(data)[:64]).lstrip()[:1] == b"{":
            given = _parse(data, Encoded, f"what input {self._spec.name!r} may be")
            return self._read_encoded(given)
        reader = self._decoder.readers[self._index]
        return reader.read_nested(data, lambda shape: self._check(shape, self._spec.datatype))[1]

    def _read_encoded(self, given: Encoded) -> Payload:
        try:
            data = base64.b64decode(given.b64, validate=True)
        except (binascii.Error, ValueError) as error:
            detail = f"input {self._spec.name!r} ({self._spec.datatype}): not base64: {error}"
            raise Problem(
                "wrong-data", detail, tensor=self._spec.name, datatype=self._spec.datatype
            ) from None
        return self._read_bytes(memoryview(data), given.shape, datatype_of(given.dtype) or given.dtype)

    def _read_bytes(self, data: memoryview, shape: list[int], datatype: str) -> Payload:
        self._check(shape, datatype)
        return read_binary(self._tensor, self._spec, data, prod(shape))

    def _check(self, shape: list[int], datatype: str) -> None:
        self._tensor.shape = shape
        self._tensor.datatype = datatype
        self._decoder.check_tensor(self._tensor, self._spec)


def _wants(options: Options, decoder: Decoder) -> Wants:
    specs = decoder.signature.outputs
    if options.outputs is None:
        indices = list(range(len(specs)))
    else:
        indices = [decoder.output_index(WantedOutput(name)) for name in options.outputs]
        for position, index in enumerate(indices):
            if index in indices[:position]:
                name = specs[index].name
                raise Problem("duplicate-tensor", f"output {name!r} is asked for twice", tensor=name)
    wanted = {specs[index].name: specs[index] for index in indices}
    best = _best(options.top_k, wanted)
    return tuple((index, best.get(specs[index].name)) for index in indices)


def _best(top_k: int | dict[str, int] | None, wanted: dict[str, TensorSpec]) -> dict[str, int]:
    """How many of the best scores of which outputs."""
    if top_k is None:
        return {}
    scores = [name for name, spec in wanted.items() if spec.shape and spec.datatype not in ("BYTES", "BOOL")]
    best = top_k if isinstance(top_k, dict) else dict.fromkeys(scores, top_k)
    odd = [name for name in best if name not in scores]
    if odd or not best:
        what = f"output {odd[0]!r} is not one" if odd else "none is asked for"
        raise Problem("bad-parameter", f"top_k is for outputs that are scores: {what}", parameter="top_k")
    return best
