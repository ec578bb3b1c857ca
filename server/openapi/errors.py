"""What goes wrong, for the API's description: an example of each kind, and answers made of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import msgspec

from cobatch.server.http.problem import PROBLEM_JSON, Problem
from cobatch.server.http.problem_kinds import KINDS

Json = dict[str, Any]

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
