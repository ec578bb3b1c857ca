"""What a server says of a request, and of its scheduler, in the API's description."""

from __future__ import annotations

from typing import Any

from cobatch.server.api.profile import DEFAULT_S, MOST_S
from cobatch.server.openapi.document import answer, in_path, operation
from cobatch.server.openapi.native import ABOUT

Json = dict[str, Any]

_COUNT: Json = {"type": "integer", "minimum": 0}
_TEXT: Json = {"type": "string"}
_BATCH: Json = {
    "type": "object",
    "required": ["number", "rows", "reason", "why", "compute_us"],
    "properties": {
        "number": _COUNT,
        "rows": _COUNT,
        "requests": {"type": ["integer", "null"], "description": "null where it is not known any more"},
        "reason": _TEXT,
        "why": _TEXT,
        "engine": _COUNT,
        "slot": _COUNT,
        "compute_us": _COUNT,
        "tenants": {"type": "object", "additionalProperties": _COUNT, "description": "rows of each"},
    },
}
_WAIT: Json = {"type": "object", "properties": {"batch": _COUNT, "rows": _COUNT, "us": _COUNT}}
_EXPLAINED: Json = {
    "type": "object",
    "required": ["id", "status", "time", "times_us", "in_words"],
    "properties": {
        "id": _TEXT,
        "method": _TEXT,
        "path": _TEXT,
        "model": _TEXT,
        "tenant": _TEXT,
        "status": _COUNT,
        "problem": _TEXT,
        "rows": _COUNT,
        "time": {"type": "string", "format": "date-time"},
        "times_us": {
            "type": "object",
            "required": ["total"],
            "additionalProperties": _COUNT,
            "description": "queue, pack, wait_for_engine, compute and answer, one after another, and total",
        },
        "batches": {"type": "array", "items": _BATCH},
        "waited_for": {"type": "array", "items": _WAIT, "description": "runs before its own"},
        "in_words": {"type": "array", "items": _TEXT},
    },
}
_EXAMPLE: Json = {
    "id": "8c1f20ab-3e7.12",
    "model": "scores",
    "status": 200,
    "rows": 1,
    "time": "2026-11-24T20:00:00.000+00:00",
    "times_us": {"queue": 310, "pack": 12, "wait_for_engine": 9, "compute": 840, "answer": 35, "total": 1206},
    "batches": [
        {
            "number": 999,
            "rows": 16,
            "requests": 16,
            "reason": "idle",
            "why": "the engine was idle, so nothing was to be gained by waiting",
            "engine": 0,
            "slot": 1,
            "compute_us": 840,
        }
    ],
    "waited_for": [{"batch": 998, "rows": 16, "us": 300}],
    "in_words": [
        "It took 1.21 ms: queue 0.31, pack 0.01, wait for engine 0.01, compute 0.84, answer 0.04 (ms)."
    ],
}


def seeing_paths() -> Json:
    """GET /v1/requests/ID and POST /v1/profile."""
    seconds: Json = {
        "name": "seconds",
        "in": "query",
        "description": "How long to record.",
        "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": MOST_S, "default": DEFAULT_S},
        "example": 0.01,
    }
    trace: Json = {
        "type": "object",
        "required": ["traceEvents"],
        "properties": {"traceEvents": {"type": "array", "items": {"type": "object"}}},
    }
    explained = answer("What is known of it.", _EXPLAINED, _EXAMPLE, "Cache-Control")
    recorded = answer("Chrome's Trace Event Format, for ui.perfetto.dev.", trace, None, "Cache-Control")
    return {
        "/v1/requests/{id}": {
            "get": operation(
                "explainRequest", ABOUT, "Where a recent request's time went",
                "Of the last requests: which batch it rode in, in which company, why that left when it did, "
                "and what the request waited for.",
                {"200": explained},
                needs="admin",
                problems=("unknown-request", "not-found"),
                parameters=[in_path("id", "An answer's X-Request-Id.", example="8c1f20ab-3e7.12")],
            )
        },
        "/v1/profile": {
            "post": operation(
                "recordProfile", ABOUT, "Record what the scheduler does",
                "Begins to answer at once, and ends when the time is over: batches on the event loop, on the "
                "engines' threads and in their slots, and what waited meanwhile.",
                {"200": recorded},
                needs="admin",
                problems=("bad-parameter", "profile-running"),
                parameters=[seconds],
            )
        },
    }  # fmt: skip
