"""A prediction's request -> rows, row shapes and payloads, checked against the model's signature.

In every form of a tensor, shape and datatype must be the model's: nothing is converted silently. The checks
are those of the V2 decoder, in the same words.
"""

import binascii
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from cobatch.batcher.request import Payload
from cobatch.engines.base import RowShapes, TensorSpec
from cobatch.server.http.body import Body
from cobatch.server.http.problem import Problem, too_large
from cobatch.server.predictions.content import JSON, MULTIPART, NPY, OPTIONS_PART, Content, Field
from cobatch.server.predictions.npy import datatype_of, read_npy
from cobatch.server.v2.binary import read_binary, read_raw
from cobatch.server.v2.checks import check_tensor, check_text, wrong_data, wrong_shape
from cobatch.server.v2.decode import LARGE_BYTES, Decoder, decode_json
from cobatch.server.v2.json_data import JsonReader
from cobatch.server.v2.long_json import ENVELOPE_BYTES, PIECE_BYTES, LongValue, Text, as_text, cut, marked
from cobatch.server.v2.pieces import release

_Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
_Axis = Annotated[int, Meta(ge=0, le=2**31 - 1)]


class Options(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The options of a request. Raw bodies have them in the query."""

    outputs: list[str] | None = None
    deadline_ms: Annotated[float, Meta(gt=0, le=86_400_000)] | None = None
    priority: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
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


# The outputs that a caller wants: (index in the signature, how many of the best scores, None for all data).
WantedOutputs = tuple[tuple[int, int | None], ...]
# Of a BYTES element in memory: Python's object and the pointer to it.
_BYTES_OBJECT = 41
_decode_request = msgspec.json.Decoder(JsonRequest).decode
_decode_options = msgspec.json.Decoder(FormOptions).decode
_decode_encoded = msgspec.json.Decoder(Encoded).decode
_from_base64_piece = partial(binascii.a2b_base64, strict_mode=True)


class Decoded(NamedTuple):
    """The content of a request."""

    rows: int
    row_shapes: RowShapes
    payloads: Sequence[Payload]
    outputs: WantedOutputs
    priority: int
    timeout_s: float | None

    @property
    def bytes(self) -> int:
        """The memory that the tensors take, approximately."""
        return sum(
            sum(len(element) + _BYTES_OBJECT for element in payload)
            if isinstance(payload, list)
            else len(payload)
            for payload in self.payloads
        )


def decode(content: Content, decoder: Decoder) -> Decoded:
    """Decode a request for the model of this V2 decoder. Raises Problem."""
    if content.media in (JSON, MULTIPART) and content.query:
        name = content.query[0][0]
        raise Problem("bad-parameter", f"{name} belongs in the body, not in the query", parameter=name)
    shapes: dict[str, list[int]] = {}
    options: JsonRequest | FormOptions | RawOptions
    fields: Sequence[Field]
    if content.media == JSON:
        text, values = _cut(content.fields[0].data)
        options = decode_json(_decode_request, text, "a prediction's request")
        fields = [Field(name, JSON, raw, values) for name, raw in options.inputs.items()]
    elif content.media == MULTIPART:
        fields = [_cut_field(field) for field in content.fields if field.name != OPTIONS_PART]
        options = _form_options(content)
        shapes = options.shapes
    else:
        options = _query_options(content.query)
        fields = [content.fields[0]._replace(name=_only_input(decoder))]
        if options.shape is not None:
            shapes = {fields[0].name: options.shape}
    rows, row_shapes, payloads = _read_inputs(fields, shapes, decoder)
    timeout_s = None if options.deadline_ms is None else options.deadline_ms / 1000
    outputs = _wanted(options, decoder)
    return Decoded(rows, row_shapes, payloads, outputs, options.priority, timeout_s)


def _cut(text: Body) -> tuple[Text, Sequence[LongValue]]:
    return (as_text(text), ()) if len(text) < LARGE_BYTES else cut(text, ENVELOPE_BYTES, strings=True)


def _cut_field(field: Field) -> Field:
    if field.media != JSON:
        return field
    text, values = _cut(field.data)
    return field._replace(data=text.strip(), values=values)


def _form_options(content: Content) -> FormOptions:
    parts = [field for field in content.fields if field.name == OPTIONS_PART]
    if len(parts) > 1:
        raise Problem("bad-request", f"the part {OPTIONS_PART!r} is there {len(parts)} times")
    if not parts:
        return FormOptions()
    if len(parts[0].data) > ENVELOPE_BYTES:
        raise too_large(len(parts[0].data), ENVELOPE_BYTES)
    return decode_json(_decode_options, parts[0].data, f"a valid part {OPTIONS_PART!r}")


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


def _only_input(decoder: Decoder) -> str:
    names = [spec.name for spec in decoder.required]
    if len(names) != 1:
        detail = f"a body that is one tensor needs a model with one input, this one has {', '.join(names)}"
        raise Problem("bad-request", detail)
    return names[0]


def _read_inputs(
    fields: Sequence[Field], shapes: dict[str, list[int]], decoder: Decoder
) -> tuple[int, RowShapes, Sequence[Payload]]:
    names = [field.name for field in fields]
    decoder.names.check_inputs(names)
    for name in shapes:
        if name not in names:
            raise Problem("bad-parameter", f"shapes: there is no part {name!r}", parameter="shapes")
    specs = decoder.signature.inputs
    payloads: list[Any] = [None] * len(specs)
    row_shapes: list[tuple[int, ...]] = [()] * len(specs)
    rows = -1 if decoder.signature.batching.on else 1
    for field in fields:
        index = decoder.names.inputs.index(field.name)
        spec = specs[index]
        shape, payloads[index] = _read(field, shapes.get(field.name), spec, decoder.readers[index])
        row_shapes[index] = tuple(shape[1:] if spec.batched else shape)
        check_text(spec, shape[0] if spec.batched else 1, payloads[index])
        if not spec.batched:
            continue
        if rows not in (-1, shape[0]):
            raise wrong_shape(spec, shape, f"the other inputs have {rows} rows")
        rows = shape[0]
    if decoder.padder is not None:
        decoder.padder.add_masks(rows, row_shapes, payloads)
    decoder.output_sizes.check(rows, row_shapes)
    return rows, tuple(row_shapes), payloads


def _read(
    field: Field, shape: list[int] | None, spec: TensorSpec, reader: JsonReader
) -> tuple[list[int], Payload]:
    """An input's whole shape and its data; `shape` is the one given beside it."""
    if field.media == JSON:
        return _read_json(field, spec, reader)
    if field.media == NPY:
        if shape is not None:
            raise Problem("bad-parameter", "a .npy file has its shape itself", parameter="shape")
        return read_npy(memoryview(field.data), spec)
    if shape is None:
        row_shape, payload = read_raw(spec, field.data)
        shape = list(spec.tensor_shape(1, row_shape))
        check_tensor(spec, spec.datatype, shape)
        return shape, payload
    return _read_bytes(memoryview(field.data), spec, spec.datatype, shape)


def _read_json(field: Field, spec: TensorSpec, reader: JsonReader) -> tuple[list[int], Payload]:
    data, values = as_text(field.data), field.values
    check = partial(check_tensor, spec, spec.datatype)
    if (value := marked(data, values)) is not None:
        return reader.read_long(value, check)
    # Something follows the blanks: the text was parsed once already, or it is not JSON.
    if bytes(memoryview(data)[:64]).lstrip()[:1] != b"{":
        return reader.read_nested(data, check)
    given = decode_json(_decode_encoded, data, f"a valid input {spec.name!r}")
    text = given.b64.encode()
    if (value := marked(b'"%b"' % text, values)) is not None:
        # "/" may be escaped in JSON.
        text = bytes(value.text[value.start + 1 : value.end - 1]).replace(b"\\/", b"/")
    try:
        raw = _from_base64(text)
    except ValueError as error:
        raise wrong_data(spec, f"not base64: {error}") from None
    return _read_bytes(memoryview(raw), spec, datatype_of(given.dtype) or given.dtype, given.shape)


def _from_base64(text: bytes) -> bytes:
    if 0 <= text.find(b"=") < len(text) - 2:
        raise ValueError("it goes on after its padding")
    pieces = []
    for at in range(0, len(text), PIECE_BYTES):
        pieces.append(_from_base64_piece(text[at : at + PIECE_BYTES]))
        release()
    return b"".join(pieces)


def _read_bytes(
    data: memoryview, spec: TensorSpec, datatype: str, shape: list[int]
) -> tuple[list[int], Payload]:
    check_tensor(spec, datatype, shape)
    return shape, read_binary(spec, data, shape)


def _wanted(options: Options, decoder: Decoder) -> WantedOutputs:
    specs = decoder.signature.outputs
    names = [spec.name for spec in specs] if options.outputs is None else options.outputs
    indices = decoder.names.output_indices(names)
    best = _best(options.top_k, [specs[index] for index in indices])
    return tuple((index, best.get(specs[index].name)) for index in indices)


def _best(top_k: int | dict[str, int] | None, wanted: Sequence[TensorSpec]) -> dict[str, int]:
    """The number of best scores to return, by output."""
    if top_k is None:
        return {}
    scores = [spec.name for spec in wanted if spec.shape and spec.datatype not in ("BYTES", "BOOL")]
    best = top_k if isinstance(top_k, dict) else dict.fromkeys(scores, top_k)
    odd = [name for name in best if name not in scores]
    if odd or not best:
        why = f"output {odd[0]!r} is not one" if odd else "none is asked for"
        raise Problem("bad-parameter", f"top_k is for outputs that are scores: {why}", parameter="top_k")
    return best
