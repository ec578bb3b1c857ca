"""What the operations of the API's description are made of: parameters, headers, bodies, answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cobatch.engines.base import Signature
from cobatch.server.api.routing import Needs
from cobatch.server.openapi import examples
from cobatch.server.openapi.schemas import ref

Json = dict[str, Any]
JSON = "application/json"
OCTETS = "application/octet-stream"

HEADERS: Json = {
    "Server-Timing": {
        "description": "Milliseconds in the queue and in the engine, and the rows of the batch.",
        "schema": {"type": "string"},
        "example": "queue;dur=0.213, compute;dur=1.480, batch;desc=16",
    },
    "Inference-Header-Content-Length": {
        "description": "Where outputs are binary: bytes of the JSON before them.",
        "schema": {"type": "string", "pattern": "^[0-9]+$"},
        "example": "156",
    },
    "Retry-After": {
        "description": "When to try again, in seconds; `retry_after_ms` in the body is more exact.",
        "schema": {"type": "string", "pattern": "^[0-9]+$"},
        "example": "1",
    },
    "Allow": {
        "description": "The methods that there are at this address.",
        "required": True,
        "schema": {"type": "string"},
        "example": "GET, HEAD",
    },
    "Location": {
        "description": "Where the prediction is.",
        "required": True,
        "schema": {"type": "string"},
        "example": "/v1/predictions/kQ0vR1mXbq8sWc3LtZ5dYg6h",
    },
    "Preference-Applied": {
        "description": "Which preference was honoured (RFC 7240).",
        "schema": {"type": "string"},
        "example": "respond-async",
    },
    "Content-Encoding": {
        "description": "How a large answer is compressed, if Accept-Encoding permits it.",
        "schema": {"enum": ["gzip", "deflate"]},
        "example": "gzip",
    },
    "Cache-Control": {
        "description": "A prediction moves on, and is its maker's alone.",
        "schema": {"const": "no-store"},
        "example": "no-store",
    },
}

_QUERY = {
    "outputs": "An output that is wanted, once for each; without it all are.",
    "deadline_ms": "The longest wait in the queue, in milliseconds.",
    "priority": "1 is the highest, 0 the default.",
    "top_k": "So many of the best scores of each row, in place of all data.",
    "shape": "The tensor's shape, rows first, with commas; without it the body is one row.",
}

ACCEPT_ENCODING: Json = {
    "name": "Accept-Encoding",
    "in": "header",
    "description": "gzip and deflate are there for answers of some size (`compress_min_bytes`).",
    "schema": {"type": "string"},
    "example": "gzip",
}
JSON_LENGTH: Json = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "description": (
        "With binary tensors in the request: bytes of the JSON before them. 0: the body is one row of the "
        "model's only input, and nothing else; all outputs are binary then."
    ),
    "schema": {"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
}
IDEMPOTENCY_KEY: Json = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": (
        "Any text of your own. The same request with the same key, from the same caller, while its "
        "prediction is kept, joins that prediction; another request with it is refused."
    ),
    "schema": {"type": "string", "pattern": "^[ -~]{1,255}$"},
}


def prefer(text: str, example: str) -> Json:
    """The header Prefer (RFC 7240); what is not understood is passed over."""
    return {
        "name": "Prefer",
        "in": "header",
        "description": text,
        "schema": {"type": "string"},
        "examples": {example: {"value": example}},
    }


def in_path(name: str, text: str, values: Sequence[str] = (), example: str | None = None) -> Json:
    """A part of the path; `values` are all that there are."""
    schema: Json = {"type": "string", "minLength": 1}
    if values:
        schema["enum"] = list(values)
    found: Json = {"name": name, "in": "path", "required": True, "description": text, "schema": schema}
    return found | ({"example": example or values[0]} if example or values else {})


def in_query(schemas: Json, name: str) -> list[Json]:
    """The fields of a schema as parameters of the query, as far as text can say them."""
    made = []
    for field, schema in schemas[name]["properties"].items():
        options = schema.get("anyOf", [schema])
        text = next(one for one in options if one.get("type") not in ("object", "null"))
        more = {"style": "form", "explode": field != "shape"} if text["type"] == "array" else {}
        about = _QUERY[field] + " Only with a body that is one tensor."
        made.append({"name": field, "in": "query", "description": about, "schema": text, **more})
    return made


def header_refs(*names: str) -> Json:
    """References to headers of the answers."""
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def answer(description: str, schema: Json | str, example: Any = None, *headers: str) -> Json:
    """A JSON answer; a text names its schema."""
    media: Json = {"schema": ref(schema) if isinstance(schema, str) else schema}
    if example is not None:
        media["example"] = example
    response: Json = {"description": description, "content": {JSON: media}}
    return response | ({"headers": header_refs(*headers)} if headers else {})


def operation(
    id_: str,
    tag: str,
    summary: str,
    description: str,
    answers: Mapping[str, Json],
    *,
    needs: Needs,
    problems: Iterable[str] = (),
    parameters: Sequence[Json] = (),
    body: Json | None = None,
) -> Json:
    """An operation with the answers of its own. `needs` is what its route says to `guarded`.

    What it needs and what may go wrong is kept beside it until `server.openapi.access.complete`.
    """
    made: Json = {"operationId": id_, "tags": [tag], "summary": summary, "description": description}
    if parameters:
        made["parameters"] = list(parameters)
    if body is not None:
        made["requestBody"] = {"required": True, "content": body}
    return made | {"responses": dict(answers), "x-needs": needs, "x-problems": tuple(problems)}


def example(value: Any, model: str, what: str = "", json_length: int | None = None) -> Json:
    """A request for a model; `x-path` and `x-headers` are what goes with it."""
    made = {"summary": f"One row for {model}{what}", "value": value, "x-path": {"name": model}}
    if json_length is not None:
        made["x-headers"] = {"Inference-Header-Content-Length": str(json_length)}
    return made


def infer_body(signatures: Mapping[str, Signature]) -> Json:
    """The content of an infer request."""
    texts: Json = {}
    binaries: Json = {}
    for name, signature in signatures.items():
        if not examples.has_example(signature):
            continue
        if (message := examples.infer_json(signature)) is not None:
            texts[name] = example(message, name)
        binary, length = examples.infer_binary(signature)
        binaries[name] = example(binary, name, ": JSON, then its bytes", length)
        if (raw := examples.raw_tensor(signature)) is not None:
            binaries[f"{name}-raw"] = example(raw, name, " as bytes alone", 0)
    return {
        JSON: {"schema": ref("InferRequest")} | ({"examples": texts} if texts else {}),
        OCTETS: {"schema": {"type": "string", "format": "binary"}}
        | ({"examples": binaries} if binaries else {}),
    }


def prediction_body(signatures: Mapping[str, Signature]) -> Json:
    """The content of a prediction's request."""
    shown = {name: one for name, one in signatures.items() if examples.has_example(one)}
    tensors = {
        name: example(raw, name, " as bytes alone")
        for name, one in shown.items()
        if (raw := examples.raw_tensor(one)) is not None
    }
    content: dict[str, tuple[Json, Json]] = {
        JSON: (
            ref("PredictionRequest"),
            {name: example(examples.prediction(one), name) for name, one in shown.items()},
        ),
        "multipart/form-data": (
            _form_schema(signatures),
            {name: example(examples.form(one), name) for name, one in shown.items()},
        ),
        OCTETS: ({"type": "string", "format": "binary"}, tensors),
        "application/x-npy": ({"type": "string", "format": "binary"}, {}),
    }
    return {
        media: {"schema": schema} | ({"examples": found} if found else {})
        for media, (schema, found) in content.items()
    }


def _form_schema(signatures: Mapping[str, Signature]) -> Json:
    inputs = {spec.name for one in signatures.values() for spec in one.inputs}
    text = "nested lists in JSON, or with its own Content-Type raw bytes or a .npy file"
    parts: Json = {name: {"type": "array", "description": text} for name in sorted(inputs)}
    return {"type": "object", "properties": parts | {"request": ref("FormOptions")}}
