"""Schemas of the OpenAPI document: requests from the types that parse them, answers from operations.json."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from cobatch.engines.base import DATATYPES, Signature, TensorSpec
from cobatch.server.batch import items as batch_messages
from cobatch.server.http.problem import ALWAYS, MEMBERS, SOMETIMES
from cobatch.server.predictions import decode as v1_messages
from cobatch.server.v2 import messages as v2_messages

Json = dict[str, Any]

_DATATYPE: Json = {"enum": list(DATATYPES)}
# The contents of fields that the server's types keep as raw text.
_V2_DATA = Annotated[list[Any], Meta(description="nested or flat, row-major; binary inputs have none")]
_V1_INPUTS = Annotated[dict[str, Any], Meta(extra_json_schema={"minProperties": 1})]
_ENCODED: Json = {"$ref": "#/components/schemas/Encoded"}
_ANY_JSON = Annotated[Any, Meta(description="JSON; no binary tensors")]


def schemas(answers: Json, signatures: Mapping[str, Signature], required: Mapping[str, list[str]]) -> Json:
    """Return all schemas by name. `required` are the inputs that a request must have, by loaded model."""
    datatype = Annotated[str, Meta(extra_json_schema=_DATATYPE)]
    tensor = _shown(v2_messages.InputTensor, "InputTensor", data=_V2_DATA, datatype=datatype)
    requests = [
        _shown(v2_messages.InferMessage, "InferRequest", inputs=list.__class_getitem__(tensor)),
        _shown(v1_messages.JsonRequest, "PredictionRequest", inputs=_V1_INPUTS),
        v1_messages.FormOptions,
        v1_messages.Encoded,
        _shown(batch_messages.Item, "BatchItem", body=_ANY_JSON),
    ]
    _, derived = msgspec.json.schema_components(requests, ref_template="#/components/schemas/{name}")
    result = answers | derived
    for name, schema in result["Problem"]["properties"].items():
        schema["description"] = (ALWAYS | SOMETIMES | MEMBERS)[name]
    for name in ("TensorMetadata", "OutputTensor"):
        result[name]["properties"]["datatype"] |= _DATATYPE
    if signatures:
        _narrow(result, signatures, required)
    for schema in result.values():
        schema["description"] = " ".join(schema["description"].split())
    return dict(sorted(result.items()))


def raw_options() -> Json:
    """Return the schemas of the options in a raw body's query."""
    _, components = msgspec.json.schema_components([v1_messages.RawOptions])
    properties: Json = components["RawOptions"]["properties"]
    return properties


def _shown(kind: type[msgspec.Struct], name: str, **types: Any) -> Any:
    """Return the type under a public name; `types` replaces those of raw fields."""
    fields: list[Any] = []
    for field in msgspec.structs.fields(kind):
        shown = types.get(field.name, field.type)
        if field.required:
            fields.append((field.name, shown))
        elif isinstance(field.default, msgspec.Raw):
            fields.append((field.name, shown | msgspec.UnsetType, msgspec.UNSET))
        else:
            fields.append((field.name, shown, field.default))
    return msgspec.defstruct(
        name,
        fields,
        kw_only=True,
        forbid_unknown_fields=kind.__struct_config__.forbid_unknown_fields,
        namespace={"__doc__": kind.__doc__},
    )


def _narrow(result: Json, signatures: Mapping[str, Signature], required: Mapping[str, list[str]]) -> None:
    """Restrict the schemas to the inputs and outputs of the loaded models."""
    tensors: dict[TensorSpec, Json] = {}
    for model, signature in signatures.items():
        for spec in signature.inputs:
            tensors.setdefault(spec, _v2_input(model, spec))
    inputs = result["InferRequest"]["properties"]["inputs"]
    inputs["items"] = {"allOf": [inputs["items"], {"anyOf": list(tensors.values())}]}
    inputs["minItems"] = 1
    outputs = list(dict.fromkeys(spec.name for one in signatures.values() for spec in one.outputs))
    result["WantedOutput"]["properties"]["name"]["enum"] = outputs
    properties = result["PredictionRequest"]["properties"]
    models = [_v1_inputs(model, one.inputs, required[model]) for model, one in signatures.items()]
    properties["inputs"] = {"anyOf": models}
    for options in (properties, result["FormOptions"]["properties"]):
        options["outputs"]["anyOf"][0]["items"]["enum"] = outputs


def _v2_input(model: str, spec: TensorSpec) -> Json:
    axes = len(spec.full_shape)
    properties = {
        "name": {"const": spec.name},
        "datatype": {"const": spec.datatype},
        "shape": {"minItems": axes, "maxItems": axes},
    }
    return {"title": f"{spec.name} of {model}", "properties": properties}


def _v1_inputs(model: str, specs: Sequence[TensorSpec], required: list[str]) -> Json:
    # JSON has no numbers like BF16's.
    forms = {spec.name: [_nested(spec)] * (spec.datatype != "BF16") + [_ENCODED] for spec in specs}
    return {
        "title": f"Inputs of {model}",
        "type": "object",
        "required": required,
        "additionalProperties": False,
        "properties": {name: {"anyOf": options} for name, options in forms.items()},
    }


def _nested(spec: TensorSpec) -> Json:
    """Return the schema of a nested list of the tensor's shape, if batched with any number of rows."""
    schema = _element(spec)
    for size in reversed(spec.shape):
        schema = {"type": "array", "items": schema}
        if size != -1:
            schema |= {"minItems": size, "maxItems": size}
    if not spec.batched:
        return {"title": f"{spec.datatype} {list(spec.shape)}", **schema}
    title = f"{spec.datatype} [{', '.join(['rows', *map(str, spec.shape)])}]"
    return {"title": title, "type": "array", "minItems": 1, "items": schema}


def _element(spec: TensorSpec) -> Json:
    if spec.datatype in ("BYTES", "BOOL"):
        return {"type": "string" if spec.datatype == "BYTES" else "boolean"}
    if spec.dtype.kind == "f":
        largest = {2: 65504.0, 4: 3.4e38}.get(spec.dtype.itemsize, 1.7e308)
        return {"type": "number", "minimum": -largest, "maximum": largest}
    limits = np.iinfo(spec.dtype)
    return {"type": "integer", "minimum": limits.min, "maximum": limits.max}
