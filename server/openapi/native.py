"""The operations beside the V2 protocol's, for the API's description: predictions, batch, the server."""

from __future__ import annotations

from typing import Any

from cobatch.server.openapi import examples
from cobatch.server.openapi.document import (
    ACCEPT_ENCODING,
    BODY,
    IDEMPOTENCY_KEY,
    JSON,
    RUN,
    Described,
    answer,
    in_path,
    in_query,
    operation,
    prediction_body,
    prefer,
)
from cobatch.server.openapi.schemas import option_schemas, ref

Json = dict[str, Any]
V1 = "Predictions"
BATCH = "Batch"
ABOUT = "About"


def native_paths(models: Described) -> Json:
    """The native resource's."""
    shown = models.shown
    done = shown and examples.prediction_answer(shown.name, models.signatures[shown.name])
    started = {"id": "kQ0vR1mXbq8sWc3LtZ5dYg6h", "status": "queued", "model": (shown or models.all[0]).name}
    later = answer("It will be made.", "Prediction", started, "Location", "Preference-Applied")
    later["links"] = {
        "get": {"operationId": "getPrediction", "parameters": {"id": "$response.body#/id"}},
        "cancel": {"operationId": "cancelPrediction", "parameters": {"id": "$response.body#/id"}},
    }
    now = ("The prediction.", "Prediction", done)
    text = (
        "Inputs by name: nested lists, or bytes in base64 with dtype and shape. Or a form with a part for "
        "each input, or one tensor as raw bytes or .npy with the options in the query (`shape`, `outputs`, "
        "`deadline_ms`, `priority`, `top_k`). The body may be compressed (Content-Encoding)."
    )
    make = operation(
        "predict", V1, "Make a prediction", text,
        {"200": answer(*now, "Server-Timing", "Content-Encoding", "Preference-Applied"), "202": later},
        needs="infer",
        problems=(*BODY, *RUN, "not-found", "unsupported-media-type", "idempotency-mismatch", "cancelled",
                  "too-many-predictions", "result-too-large"),
        parameters=[
            in_path("name", "The model's name.", models.names),
            prefer("`respond-async`: answer 202 at once, or after `wait=N` seconds.", "respond-async"),
            IDEMPOTENCY_KEY,
            ACCEPT_ENCODING,
            *in_query(option_schemas(), "RawOptions"),
        ],
        body=prediction_body(models.signatures),
    )  # fmt: skip
    of_one = in_path("id", "The prediction's id.", example=started["id"])
    wait = prefer("`wait=N`: answer when it is finished, at the latest after N seconds.", "wait=1")
    found = answer(*now, "Cache-Control", "Content-Encoding", "Preference-Applied")
    gone = answer("The prediction as it is now.", "Prediction", started | {"status": "cancelled"},
                  "Cache-Control", "Content-Encoding")  # fmt: skip
    problems = ("unknown-prediction", "not-found")
    return {
        "/v1/models/{name}/predictions": {"post": make},
        "/v1/predictions/{id}": {
            "get": operation("getPrediction", V1, "A prediction as it is now", "Of those that are kept.",
                             {"200": found}, needs="known", problems=problems,
                             parameters=[of_one, wait, ACCEPT_ENCODING]),
            "delete": operation("cancelPrediction", V1, "Cancel a prediction",
                                "Harmless where it is finished: the answer says what became of it.",
                                {"200": gone}, needs="known", problems=problems,
                                parameters=[of_one, ACCEPT_ENCODING]),
        },
    }  # fmt: skip


def batch_path(models: Described) -> Json:
    """POST /batch."""
    items: list[Json] = [{"id": "about", "method": "GET", "url": "/v2"}]
    shown = models.shown
    if shown is not None:
        predict = f"/v1/models/{shown.name}/predictions"
        body = examples.prediction(models.signatures[shown.name])
        items.append({"id": "predict", "method": "POST", "url": predict, "body": body})
    refused = {"type": "/problems/not-batchable", "title": "The request cannot be an item of a batch",
               "status": 400,
               "detail": "'/batch' cannot be asked for in a batch", "field": "url"}  # fmt: skip
    answers = [
        {
            "id": "about",
            "status": 200,
            "headers": {"content-type": JSON, "x-request-id": "a49bc15c-r5.0"},
            "body": {"name": "cobatch"},
        },
        {
            "id": "odd",
            "status": 400,
            "headers": {"content-type": "application/problem+json", "x-request-id": "a49bc15c-r5.1"},
            "body": refused,
        },
    ]
    text = (
        "Many requests in one call: infer, predictions, metadata and health. All of them enter the queue "
        "together. Each has its own status and body; one that fails does not fail the call."
    )
    example = {"summary": "Two requests", "value": {"requests": items}}
    return {
        "/batch": {
            "post": operation(
                "batch", BATCH, "Many requests in one call", text,
                {"200": answer("All answers.", "BatchResponse", {"responses": answers}, "Content-Encoding")},
                needs="known",
                problems=(*BODY, "duplicate-id", "too-many-items", "forbidden", "tenant-limit"),
                parameters=[ACCEPT_ENCODING],
                body={JSON: {"schema": ref("BatchRequest"), "examples": {"two": example}}},
            )
        }
    }  # fmt: skip


def about_paths() -> Json:
    """What the server says of itself."""

    def page(text: str, *media: str) -> Json:
        return {
            "200": {"description": text, "content": {one: {"schema": {"type": "string"}} for one in media}}
        }

    both = ("text/plain", "text/html")
    slug = in_path("slug", "The last part of a problem's `type`.", example="queue-full")
    document = {"200": answer("OpenAPI 3.1.", {"type": "object", "required": ["openapi"]}, None)}
    return {
        "/openapi.json": {
            "get": operation("getOpenApi", ABOUT, "This description", "For programs.", document,
                             needs="metadata")
        },
        "/docs": {
            "get": operation("getDocs", ABOUT, "This description as a page", "For people.",
                             page("The page.", "text/html"), needs="metadata")
        },
        "/problems": {
            "get": operation("getProblems", ABOUT, "All kinds of problems", "HTML for browsers, else text.",
                             page("The list.", *both), needs="open")
        },
        "/problems/{slug}": {
            "get": operation("getProblem", ABOUT, "One kind of problem", "What it means and what to do.",
                             page("The page.", *both), needs="open", problems=("not-found",),
                             parameters=[slug])
        },
    }  # fmt: skip
