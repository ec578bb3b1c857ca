"""What the operations of the API's description are made of: parameters, headers, bodies, answers.

Who may call, in the API's description; nothing of it where the server asks nobody who he is.

`server.openapi.document.operation` leaves beside each operation what it needs and what may go wrong. From
that, and from the settings of `[auth]`, `complete` makes the rest of it.

The served models as the API's description needs them.

What goes wrong, for the API's description: an example of each kind, and answers made of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec

from cobatch.engines.base import Signature
from cobatch.server.api.routing import Needs
from cobatch.server.auth.authenticator import Authenticator
from cobatch.server.auth.challenges import WELL_KNOWN
from cobatch.server.http.problem import PROBLEM_JSON, Problem
from cobatch.server.http.problem_kinds import KINDS
from cobatch.server.inference.model import Model
from cobatch.server.inference.service import Inference
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

    What it needs and what may go wrong is kept beside it until `server.openapi.document.complete`.
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


# Kinds that a server without [auth] does not know.
OF_AUTH = frozenset((
    "bad-authorization", "unauthenticated", "invalid-credentials", "forbidden", "tenant-limit",
    "too-many-bad-tokens", "keys-unavailable",
))  # fmt: skip
_CREDENTIALS = ("bad-authorization", "unauthenticated", "invalid-credentials")
_TOKENS = ("too-many-bad-tokens", "keys-unavailable")
# May happen wherever credentials are asked for.
GUARDED = (*_CREDENTIALS, *_TOKENS)

_SAID: dict[Needs, str] = {
    "open": "Open to everybody.",
    "known": "Needs credentials, and no permission.",
    "read": "Needs the permission `metadata`, or one to infer with the model.",
    "infer": "Needs the permission `infer`, or `infer:NAME` for this model.",
    "metadata": "Needs the permission `metadata`.",
    "admin": "Needs the permission `admin`.",
}
_WWW_AUTHENTICATE: Json = {
    "description": (
        "With 401, 403 and `bad-authorization`: the scheme, what was wrong (RFC 6750), and where the server "
        "knows its own address, where to learn whom to ask for a token (RFC 9728)."
    ),
    "schema": {"type": "string"},
    "example": 'Bearer error="invalid_token", error_description="the token has expired"',
}
_STANDING: Json = {
    "RateLimit-Policy": {
        "description": "The tenant's limits: `q` requests at once, full again after `w` seconds.",
        "schema": {"type": "string"},
        "example": '"requests";q=100;w=2, "concurrent";q=8;qu="concurrent-requests"',
    },
    "RateLimit": {
        "description": "What is left of them: `r` requests, and in `t` seconds all.",
        "schema": {"type": "string"},
        "example": '"requests";r=87;t=1, "concurrent";r=7',
    },
}


def security_schemes(auth: Authenticator) -> Json:
    """How to authenticate: each way that the settings know."""
    schemes: Json = {}
    if auth.settings.issuers:
        names = ", ".join(issuer.issuer for issuer in auth.settings.issuers)
        schemes["bearer"] = {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "JWT",
            "description": f"An access token of {names} for {' or '.join(auth.settings.audience)}.",
        }
    if auth.settings.api_keys_file:
        schemes["apiKey"] = {
            "type": "apiKey",
            "in": "header",
            "name": "X-API-Key",
            "description": "A key that the operator has made, for clients that cannot do OAuth.",
        }
    return schemes


def headers(auth: Authenticator | None) -> Json:
    """The headers of answers that there are with authentication only."""
    if auth is None:
        return {}
    standing = _STANDING if auth.settings.rate_limit_headers else {}
    return {"WWW-Authenticate": _WWW_AUTHENTICATE} | standing


def access_paths(auth: Authenticator | None, tag: str) -> Json:
    """GET /.well-known/oauth-protected-resource, where there is one."""
    if auth is None or not auth.challenges.resource:
        return {}
    text: Json = {"type": "string"}
    texts: Json = {"type": "array", "items": text}
    schema: Json = {
        "type": "object",
        "properties": {
            "resource": text,
            "authorization_servers": texts,
            "scopes_supported": texts,
            "bearer_methods_supported": texts,
            "resource_name": text,
        },
        "required": ["resource"],
    }
    example = {
        "resource": auth.challenges.resource,
        "authorization_servers": [issuer.issuer for issuer in auth.settings.issuers],
    }
    found = {"200": answer("The metadata.", schema, example)}
    described = operation(
        "getProtectedResource", tag, "Whom to ask for a token", "Metadata for OAuth clients (RFC 9728).",
        found, needs="open",
    )  # fmt: skip
    path = WELL_KNOWN + urlsplit(auth.challenges.resource).path.rstrip("/")
    return {path: {"get": described}}


def complete(described: Json, auth: Authenticator | None) -> None:
    """Turn what `operation` has left beside an operation into answers, and say who may use it."""
    needs: Needs = described.pop("x-needs")
    slugs = set(described.pop("x-problems"))
    if auth is None:
        slugs -= OF_AUTH
    else:
        described["description"] += f" {_SAID[needs]}"
    if auth is not None and needs != "open":
        described["security"] = [{name: []} for name in security_schemes(auth)]
        slugs.update(_CREDENTIALS)
        if auth.settings.issuers:
            slugs.update(_TOKENS)
        if needs != "known":
            slugs.add("forbidden")
        if needs == "infer":
            slugs.add("tenant-limit")
    responses = _merged(described["responses"], problem_responses(slugs))
    if auth is not None and needs != "open" and auth.settings.rate_limit_headers:
        refs = {name: {"$ref": f"#/components/headers/{name}"} for name in _STANDING}
        for status, response in responses.items():
            # Nobody stands anywhere before it is known who he is.
            if status != "401":
                responses[status] = response | {"headers": response.get("headers", {}) | refs}
    described["responses"] = responses


def _merged(answers: Json, problems: Json) -> Json:
    responses = dict(answers)
    for status, problem in problems.items():
        given = responses.get(status)
        if given is None:
            responses[status] = problem
        else:
            # One status with a body of its own, or a problem.
            content = given["content"] | problem["content"]
            text = f"{given['description']} Or: {problem['description']}"
            responses[status] = problem | {"description": text, "content": content}
    return dict(sorted(responses.items()))


class Described:
    """The served models as the description needs them: all their names, and those that are loaded."""

    def __init__(self, core: Inference) -> None:
        self.names = list(core.models)
        self.all: list[Model] = list(core.models.values())
        self.loaded: list[Model] = [model for model in self.all if model.batcher is not None]
        self.signatures: Mapping[str, Signature] = {
            model.name: model.engine_worker.engine.signature for model in self.loaded
        }
        # By model the inputs that a request must have: the masks of what is padded are made where missing.
        self.required = {model.name: [spec.name for spec in model.decoder.required] for model in self.loaded}

    @property
    def shown(self) -> Model | None:
        """The model that examples of answers are of."""
        return next((one for one in self.loaded if examples.has_example(self.signatures[one.name])), None)


# What may happen on any route: the connection's problems and the server's own.
ANYWHERE = ("bad-http", "headers-too-large", "internal", "method-not-allowed", "receive-timeout", "draining")
# What may happen wherever a body is read.
BODY = ("body-too-large", "bad-encoding", "unsupported-encoding", "not-json", "bad-request")
# What may become of rows, whichever resource brought them.
RUN = (
    "unknown-tensor", "duplicate-tensor", "missing-tensor", "bad-parameter", "wrong-shape", "wrong-datatype",
    "wrong-data", "too-many-rows", "queue-full", "run-failed", "starting", "load-failed", "abandoned",
    "engine-dead", "expired", "deadline-unreachable", "deadline-too-short", "execution-timeout",
    "unknown-model",
)  # fmt: skip
# Their answers say how to authenticate.
CHALLENGED = frozenset(("bad-authorization", "unauthenticated", "invalid-credentials", "forbidden"))

_X = "input 'x'"
_REFERENCE = {"model": "scores", "reference": "3f9c2a10"}
_EXAMPLES: dict[str, tuple[str, Json]] = {
    "bad-http": ("Invalid HTTP request received.", {}),
    "not-json": ("the body is not JSON: Input data was truncated", {}),
    "bad-request": ("not an infer request: Object missing required field `inputs`", {}),
    "unknown-tensor": ("the model has no input 'z'; its inputs are x", {"tensor": "z", "inputs": ["x"]}),
    "duplicate-tensor": ("input 'x' is given twice", {"tensor": "x"}),
    "missing-tensor": ("input 'x' is missing", {"tensor": "x"}),
    "bad-parameter": ("parameter 'triton_x' is reserved", {"parameter": "triton_x"}),
    "bad-binary": (
        "Inference-Header-Content-Length is 9999, the body has 82 bytes",
        {"header_length": 9999, "body_bytes": 82},
    ),
    "bad-encoding": ("the body is not one whole gzip stream", {}),
    "duplicate-id": ("two items have the id '1'", {"id": "1"}),
    "not-batchable": (
        "an item cannot have the header 'x-trace'",
        {"field": "headers", "allowed": ["accept", "content-type", "idempotency-key", "prefer"]},
    ),
    "bad-authorization": ("Authorization must be Bearer and one token", {}),
    "unauthenticated": ("this needs credentials", {}),
    "invalid-credentials": ("the token has expired", {}),
    "forbidden": (
        "this needs the permission infer for the model 'scores'",
        {"permission": "infer", "model": "scores"},
    ),
    "unknown-prediction": ("there is no prediction 'none', or none any more", {}),
    "unknown-request": ("there was no request 'none', or it is too long ago", {"id": "none"}),
    "unknown-version": (
        "model 'scores' has no version '9'; it has '1'",
        {"model": "scores", "version": "9", "versions": ["1"]},
    ),
    "unknown-model": ("there is no model 'none'", {"model": "none", "models": ["scores"]}),
    "not-found": ("there is nothing at /v2/x", {}),
    "method-not-allowed": ("/v2 takes GET, HEAD, got DELETE", {"allowed": ["GET", "HEAD"]}),
    "receive-timeout": ("the request did not arrive within 30 s", {}),
    "profile-running": ("somebody else records a profile now", {"retry_after_s": 60}),
    "cancelled": (
        "the prediction was cancelled before it was done",
        {"prediction": {"id": "pYk3", "status": "cancelled", "model": "scores"}},
    ),
    "body-too-large": (
        "the body has 90000000 bytes or more, the limit is 67108864",
        {"body_bytes": 90_000_000, "limit_bytes": 67_108_864},
    ),
    "too-many-rows": ("2000 rows can never be queued: the limit is 1024", {"rows": 2000, "limit": 1024}),
    "too-many-items": ("the batch has more than 256 items", {"limit": 256}),
    "unsupported-encoding": (
        "the body's encoding 'br' is not supported; gzip and deflate are",
        {"encoding": "br", "supported": ["gzip", "deflate"]},
    ),
    "unsupported-media-type": (
        "the body's Content-Type is 'text/plain'",
        {"supported": ["application/json", "multipart/form-data", "application/octet-stream"]},
    ),
    "headers-too-large": ("the headers have more than 65536 bytes", {}),
    "wrong-shape": (
        f"{_X} has shape [-1, 3] (-1: any), got [1, 2]",
        {"tensor": "x", "expected": [-1, 3], "actual": [1, 2]},
    ),
    "wrong-datatype": (
        f"{_X} is FP32, got 'INT64'",
        {"tensor": "x", "expected": "FP32", "actual": "INT64"},
    ),
    "wrong-data": (
        f"{_X} (FP32): shape [1, 3] has 3 elements, the data has 2",
        {"tensor": "x", "datatype": "FP32", "shape": [1, 3], "expected_elements": 3, "actual_elements": 2},
    ),
    "idempotency-mismatch": ("the Idempotency-Key came with another request before", {}),
    "queue-full": (
        "1024 rows wait, the limit is 1024",
        {"queued_rows": 1024, "limit": 1024, "retry_after_s": 1},
    ),
    "tenant-limit": (
        "tenant 'search-team' has 8 of 8 concurrent requests",
        {"tenant": "search-team", "what": "concurrent requests", "used": 8, "limit": 8, "retry_after_s": 1},
    ),
    "deadline-unreachable": (
        "the request has 20 ms and would need 50 ms",
        {"timeout_ms": 20.0, "needed_ms": 50.0, "retry_after_s": 0.03},
    ),
    "too-many-bad-tokens": (
        "too many tokens from this address had a wrong signature",
        {"retry_after_s": 0.05},
    ),
    "too-many-predictions": (
        "1000 kept predictions with 4096000 bytes are not finished yet",
        {"limit": 1000, "limit_bytes": 268_435_456, "retry_after_s": 1},
    ),
    "internal": ("the server failed on this request; its log says why", {}),
    "run-failed": ("the model failed on this request", _REFERENCE),
    "result-too-large": (
        "the answer has 300000000 bytes, more than could be kept",
        {"body_bytes": 300_000_000, "limit_bytes": 268_433_408},
    ),
    "starting": ("model 'scores' is being loaded", {"model": "scores", "retry_after_s": 1}),
    "keys-unavailable": ("the keys of the token's issuer are not to be had now", {"retry_after_s": 1}),
    "load-failed": ("model 'scores' could not be loaded", {"model": "scores"}),
    "draining": ("the server is about to stop", {"retry_after_s": 1}),
    "abandoned": ("the server stopped before the request was done", {"retry_after_s": 1}),
    "engine-dead": ("the engine of model 'scores' is unusable", _REFERENCE),
    "expired": ("the request could not be run within its timeout of 5 ms", {"timeout_ms": 5.0}),
    "deadline-too-short": (
        "the request has 1 ms, and its run alone takes 3 ms",
        {"timeout_ms": 1.0, "needed_ms": 3.0},
    ),
    "execution-timeout": (
        "model 'scores' did not finish within 1000 ms",
        {"model": "scores", "limit_ms": 1000.0},
    ),
}


def problem_examples(left_out: Collection[str] = ()) -> Json:
    """An example of each other kind by its slug, with the body that the server would write."""
    examples = {}
    for slug, kind in KINDS.items():
        if slug in left_out:
            continue
        detail, members = _EXAMPLES[slug]
        text = b"".join(Problem(slug, detail, **members).reply().body)
        examples[slug] = {"summary": kind.title, "value": msgspec.json.decode(text)}
    return examples


def problem_responses(slugs: Iterable[str]) -> Json:
    """Response objects by status, for a route on which these kinds, and those of any route, may happen."""
    by_status: dict[int, list[str]] = defaultdict(list)
    for slug in KINDS:
        if slug in {*slugs, *ANYWHERE}:
            by_status[KINDS[slug].status].append(slug)
    return {str(status): _response(slugs_of) for status, slugs_of in sorted(by_status.items())}


def _response(slugs: list[str]) -> Json:
    kinds = [KINDS[slug] for slug in slugs]
    types = {"type": {"enum": [f"/problems/{slug}" for slug in slugs]}}
    headers = []
    if any("retry_after_ms" in kind.members for kind in kinds):
        headers.append("Retry-After")
    if kinds[0].status == 405:
        headers.append("Allow")
    if not CHALLENGED.isdisjoint(slugs):
        headers.append("WWW-Authenticate")
    response: Json = {
        "description": "; ".join(kind.title for kind in kinds),
        "content": {
            PROBLEM_JSON.decode(): {
                "schema": {"allOf": [{"$ref": "#/components/schemas/Problem"}, {"properties": types}]},
                "examples": {slug: {"$ref": f"#/components/examples/{slug}"} for slug in slugs},
            }
        },
    }
    if headers:
        response["headers"] = {name: {"$ref": f"#/components/headers/{name}"} for name in headers}
    return response
