"""The V2 protocol's operations for the API's description, path by path as Starlette spells them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cobatch import __version__
from cobatch.server.api.routing import Needs
from cobatch.server.api.v2 import EXTENSIONS, config, index_entry, metadata, statistics
from cobatch.server.openapi import examples
from cobatch.server.openapi.document import (
    ACCEPT_ENCODING,
    BODY,
    JSON_LENGTH,
    OCTETS,
    RUN,
    Described,
    answer,
    header_refs,
    in_path,
    infer_body,
    operation,
)
from cobatch.server.openapi.schemas import ref

Json = dict[str, Any]
V2 = "Open Inference Protocol V2"
_SIGNS = ("unknown-model", "unknown-version", "not-found")


def v2_paths(models: Described) -> Json:
    """The protocol's."""
    name = in_path("name", "The model's name.", models.names)
    version = in_path("version", "The model's version.", sorted({model.version for model in models.all}))
    bases = (("", "/v2/models/{name}", [name]),
             ("OfVersion", "/v2/models/{name}/versions/{version}", [name, version]))  # fmt: skip
    paths: Json = {}
    for suffix, base, parameters in bases:
        for path, operations in _of_model(models, suffix, parameters).items():
            for described in operations.values():
                if suffix:
                    described["x-twin-of"] = described["operationId"].removesuffix(suffix)
            paths[base + path] = operations
    return _of_server(models) | paths


def _of_server(models: Described) -> Json:
    def server(id_: str) -> Json:
        example = {"name": "cobatch", "version": __version__, "extensions": EXTENSIONS}
        about = "Name, version and the extensions of the protocol that work."
        found = {"200": answer("The server's metadata.", "ServerMetadata", example)}
        return {"get": operation(id_, V2, "Server metadata", about, found, needs="known")}

    live = {
        "200": answer("The process is of use.", "Liveness", {"live": True}),
        "503": answer("An engine is unusable.", "Liveness", {"live": False, "dead_models": ["scores"]}),
    }
    ready = {
        "200": answer("All models are ready.", "Readiness", {"ready": True}),
        "503": answer("Some model is not.", "Readiness", {"ready": False}),
    }
    stats = {"200": answer("The figures.", "Statistics", _stats(models))}
    index = {"type": "array", "items": ref("IndexEntry")}
    entries = {"200": answer("One entry for each.", index, [index_entry(model) for model in models.all])}
    texts = {
        "live": "For a supervisor: 503 means that only a new process helps.",
        "ready": "For a load balancer: 503 while a model is loaded and while the server stops.",
        "stats": "Requests, batches and their times, since each model was loaded, as Triton has them.",
        "index": "Each model with its state. The body, if there is one, is not looked at.",
    }
    twin = server("getServerSlash")
    twin["get"]["x-twin-of"] = "getServer"
    return {
        "/v2": server("getServer"),
        "/v2/": twin,
        "/v2/health/live": {
            "get": operation("getLive", V2, "Is the process of use?", texts["live"], live, needs="open")
        },
        "/v2/health/ready": {
            "get": operation("getReady", V2, "Are all models ready?", texts["ready"], ready, needs="open")
        },
        "/v2/models/stats": {
            "get": operation("getAllStats", V2, "All models' statistics", texts["stats"], stats,
                             needs="admin")
        },
        "/v2/repository/index": {
            "post": operation("getIndex", V2, "The models that are served", texts["index"], entries,
                              needs="admin")
        },
    }  # fmt: skip


def _stats(models: Described) -> Json:
    return {"model_stats": [statistics(model) for model in models.loaded[:1]]}


def _of_model(models: Described, suffix: str, parameters: Sequence[Json]) -> Json:
    shown = models.shown
    not_loaded = (*_SIGNS, "starting", "load-failed")

    def get(id_: str, summary: str, text: str, schema: str, example: Any, needs: Needs = "read") -> Json:
        found = {"200": answer(f"{summary}.", schema, example)}
        described = operation(
            id_ + suffix, V2, summary, text, found,
            needs=needs, problems=not_loaded, parameters=parameters,
        )  # fmt: skip
        return {"get": described}

    ready = {
        status: answer(text, "ModelReadiness", shown and {"name": shown.name, "ready": status == "200"})
        for status, text in (("200", "It takes requests."), ("503", "It does not."))
    }
    about_ready = "Whether the model takes requests now."
    return {
        "": get("getModel" , "Model metadata", "Inputs and outputs; the first axis of each counts the rows.",
                "ModelMetadata", shown and metadata(shown)),
        "/ready": {
            "get": operation("getModelReady" + suffix, V2, "Is the model ready?", about_ready, ready,
                             needs="open", problems=_SIGNS, parameters=parameters)
        },
        "/config": get("getConfig", "Model configuration", "As Triton has it, where its clients look.",
                       "ModelConfiguration", shown and config(shown)),
        "/stats": get("getStats", "Model statistics", "Requests, batches and their times since loading.",
                      "Statistics", shown and _stats(models), "admin"),
        "/infer": {"post": _infer(models, suffix, parameters)},
    }  # fmt: skip


def _infer(models: Described, suffix: str, parameters: Sequence[Json]) -> Json:
    shown = models.shown
    example = shown and examples.infer_answer(shown.name, shown.version, models.signatures[shown.name])
    good = answer(
        "The outputs: in JSON, or where they were asked for as binary, JSON and then their bytes.",
        "InferResponse", example, "Server-Timing", "Inference-Header-Content-Length", "Content-Encoding",
    )  # fmt: skip
    good["content"][OCTETS] = {"schema": {"type": "string", "format": "binary"}}
    good["headers"]["Server-Timing"] = {**header_refs("Server-Timing")["Server-Timing"]}
    text = (
        "Rows of tensors in, rows of tensors out. Requests that come at about the same time share a batch. "
        "The body may be compressed (Content-Encoding gzip or deflate); its Content-Type is not looked at. "
        "`parameters`: `priority` (1 is the highest, 0 the default), `timeout` (microseconds in the queue), "
        "`usage` (true: the answer's parameters say where its time went), `binary_data_output`; "
        "an output's own `binary_data` goes before it."
    )
    return operation(
        "infer" + suffix, V2, "Infer", text, {"200": good},
        needs="infer", problems=(*BODY, *RUN, *_SIGNS, "bad-binary"),
        parameters=[*parameters, JSON_LENGTH, ACCEPT_ENCODING],
        body=infer_body(models.signatures),
    )  # fmt: skip
