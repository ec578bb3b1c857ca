"""The schemas of the API's description, made from the types that the server parses requests with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from cobatch.engines.base import Signature, TensorSpec
from cobatch.server.batch import items as batch_messages
from cobatch.server.http.problem_kinds import ALWAYS, MEMBERS, SOMETIMES
from cobatch.server.openapi.bodies import ANSWERS, Datatype
from cobatch.server.predictions import decode as v1_messages
from cobatch.server.v2 import messages as v2_messages

Json = dict[str, Any]
Signatures = Mapping[str, Signature]

_V2_DATA = Annotated[list[Any], Meta(description="nested or flat, row-major; binary inputs have none")]
_V1_INPUTS = Annotated[dict[str, Any], Meta(extra_json_schema={"minProperties": 1})]
_ANY_JSON = Annotated[Any, Meta(description="JSON; no binary tensors")]


def ref(name: str) -> Json:
    """A reference to one of the schemas."""
    return {"$ref": f"#/components/schemas/{name}"}


def schemas(signatures: Signatures, required: Mapping[str, list[str]]) -> Json:
    """All of them by name. `signatures` are those of the loaded models, `required` the names of the inputs
    that each must be given."""
    tensor = _shown(v2_messages.InputTensor, "InputTensor", data=_V2_DATA, datatype=Datatype)
    requests = [
        _shown(v2_messages.InferMessage, "InferRequest", inputs=list[tensor]),  # type: ignore[valid-type]
        _shown(v1_messages.JsonRequest, "PredictionRequest", inputs=_V1_INPUTS),
        v1_messages.FormOptions,
        v1_messages.Encoded,
        _batch(),
    ]
    _, found = msgspec.json.schema_components(
        [*requests, *ANSWERS], ref_template="#/components/schemas/{name}"
    )
    made: Json = dict(found)
    made["Prediction"]["properties"]["error"] = ref("Problem")
    made["Problem"] = _problem()
    _narrow(made, signatures, required)
    for schema in made.values():
        schema["description"] = " ".join(schema["description"].split())
    return dict(sorted(made.items()))


def option_schemas() -> Json:
    """The schema of what a raw body's query may hold."""
    return msgspec.json.schema_components([v1_messages.RawOptions])[1]


def _batch() -> Any:
    item: Any = _shown(batch_messages.Item, "BatchItem", body=_ANY_JSON)
    fields: list[Any] = [("requests", list.__class_getitem__(item))]
    namespace = {"__doc__": "Requests, each of which is answered by itself."}
    return msgspec.defstruct("BatchRequest", fields, forbid_unknown_fields=True, namespace=namespace)


def _shown(kind: type[msgspec.Struct], name: str, **types: Any) -> Any:
    """The type under a name for readers. `types` say what is behind fields that are kept as raw text."""
    fields: list[Any] = []
    for field in msgspec.structs.fields(kind):
        shown = types.get(field.name, field.type)
        default = field.default
        if field.required:
            fields.append((field.name, shown))
        elif isinstance(default, msgspec.Raw):
            fields.append((field.name, shown | msgspec.UnsetType, msgspec.UNSET))
        else:
            fields.append((field.name, shown, default))
    return msgspec.defstruct(
        name,
        fields,
        kw_only=True,
        forbid_unknown_fields=kind.__struct_config__.forbid_unknown_fields,
        namespace={"__doc__": kind.__doc__},
    )


# The members' types, where they are not a number that counts something.
_TEXT = {"type": "string"}
_NUMBER = {"type": "number"}
_TEXTS = {"type": "array", "items": _TEXT}
# Long ones are cut, and end with "...".
_SHAPE = {"type": "array", "items": {"type": ["integer", "string"]}}
_MEMBER_TYPES: dict[str, Json] = {
    "actual": {"anyOf": [_TEXT, _SHAPE]},
    "expected": {"anyOf": [_TEXT, _SHAPE]},
    "shape": _SHAPE,
    **dict.fromkeys(("limit_ms", "needed_ms", "timeout_ms"), _NUMBER),
    **dict.fromkeys(("allowed", "inputs", "models", "outputs", "supported", "versions"), _TEXTS),
    **dict.fromkeys(
        ("datatype", "encoding", "field", "id", "model", "parameter", "permission", "reference", "tenant",
         "tensor", "version", "what"),
        _TEXT,
    ),
}  # fmt: skip


def _problem() -> Json:
    known: dict[str, Json] = {
        **dict.fromkeys(ALWAYS, _TEXT),
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "prediction": ref("Prediction"),
        "instance": _TEXT,
        **{name: _MEMBER_TYPES.get(name, {"type": "integer"}) for name in MEMBERS},
    }
    texts = ALWAYS | SOMETIMES | MEMBERS
    return {
        "title": "Problem",
        "description": "What went wrong (RFC 9457). `type` says which members there are: see /problems.",
        "type": "object",
        # `error` is left out where the problem is a member of a prediction.
        "required": ["type", "title", "status", "detail"],
        "properties": {name: schema | {"description": texts[name]} for name, schema in known.items()},
        "additionalProperties": False,
    }


def _narrow(made: Json, signatures: Signatures, required: Mapping[str, list[str]]) -> None:
    """Say what the served models take, in place of what any model could take."""
    if not signatures:
        return
    tensors: dict[str, Json] = {}
    models = []
    for model, signature in signatures.items():
        for spec in signature.inputs:
            axes = len(spec.shape) + 1
            narrow = {
                "name": {"const": spec.name},
                "datatype": {"const": spec.datatype},
                "shape": {"minItems": axes, "maxItems": axes},
            }
            tensors.setdefault(f"{spec}", {"title": f"{spec.name} of {model}", "properties": narrow})
        models.append(_inputs_of(model, signature.inputs, required[model]))
    inputs = made["InferRequest"]["properties"]["inputs"]
    inputs["items"] = {"allOf": [inputs["items"], {"anyOf": list(tensors.values())}]}
    inputs["minItems"] = 1
    names = list(dict.fromkeys(spec.name for signature in signatures.values() for spec in signature.outputs))
    made["WantedOutput"]["properties"]["name"]["enum"] = names
    properties = made["PredictionRequest"]["properties"]
    properties["inputs"] = {"anyOf": models}
    for options in (properties, made["FormOptions"]["properties"]):
        options["outputs"]["anyOf"][0]["items"]["enum"] = names


def _inputs_of(model: str, specs: Sequence[TensorSpec], required: list[str]) -> Json:
    return {
        "title": f"Inputs of {model}",
        "type": "object",
        "required": required,
        "additionalProperties": False,
        "properties": {spec.name: {"anyOf": _forms(spec)} for spec in specs},
    }


def _forms(spec: TensorSpec) -> list[Json]:
    # JSON has no numbers of BF16's kind.
    return [ref("Encoded")] if spec.datatype == "BF16" else [_nested(spec), ref("Encoded")]


def _nested(spec: TensorSpec) -> Json:
    """A nested list of the tensor's shape, any number of rows."""
    schema = _element(spec)
    for size in reversed(spec.shape):
        schema = {"type": "array", "items": schema}
        if size != -1:
            schema |= {"minItems": size, "maxItems": size}
    return {
        "title": f"{spec.datatype} [{', '.join(['rows', *map(str, spec.shape)])}]",
        "type": "array",
        "minItems": 1,
        "items": schema,
    }


def _element(spec: TensorSpec) -> Json:
    dtype = spec.dtype
    if spec.datatype in ("BYTES", "BOOL"):
        return {"type": "string" if spec.datatype == "BYTES" else "boolean"}
    if dtype.kind == "f":
        largest = {2: 65504.0, 4: 3.4e38}.get(dtype.itemsize, 1.7e308)
        return {"type": "number", "minimum": -largest, "maximum": largest}
    bits = dtype.itemsize * 8
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype.kind == "i" else (0, 2**bits - 1)
    return {"type": "integer", "minimum": low, "maximum": high}
