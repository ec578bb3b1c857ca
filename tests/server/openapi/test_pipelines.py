"""Schemas of pipelines in the description: names that several pipelines, or the server, have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from cobatch.server.openapi.pipelines import add_pipelines
from cobatch.server.pipelines.call import Described

REFERENCE = "#/components/schemas/"
PAGE = {"type": "object", "properties": {"url": {"type": "string"}}}
OTHER = {"type": "object", "properties": {"number": {"type": "integer"}}}
BOOK = {"type": "object", "properties": {"page": {"$ref": REFERENCE + "Page"}, "$ref": {"type": "string"}}}


def defined(name: str, **definitions: Any) -> dict[str, Any]:
    return {"$ref": REFERENCE + name, "$defs": definitions}


def pipeline(name: str, request: Any, answer: Any = None) -> Any:
    content = Described(
        accepts=("application/json",),
        returns="application/json",
        streamed=False,
        concurrent=True,
        summary="",
        request_schema=request,
        answer_schema=answer,
    )
    return SimpleNamespace(name=name, content=content)


def added(schemas: dict[str, Any], *pipelines: Any) -> dict[str, dict[str, Any]]:
    """Return the schema of each pipeline's request."""
    paths: dict[str, Any] = {
        "/v1/models/{name}/infer": {"post": {"parameters": [{}], "responses": {"200": {}}}}
    }
    add_pipelines(paths, schemas, pipelines)
    contents = [path["post"]["requestBody"]["content"] for path in paths.values()]
    return {
        one.name: content["application/json"]["schema"]
        for one, content in zip(pipelines, contents, strict=True)
    }


def test_alike_schemas_are_shared() -> None:
    schemas: dict[str, Any] = {}
    requests = added(
        schemas, pipeline("a", defined("Page", Page=PAGE)), pipeline("b", defined("Page", Page=PAGE))
    )
    assert schemas == {"Page": PAGE}
    assert requests["a"] == requests["b"] == {"$ref": REFERENCE + "Page"}


def test_a_schema_of_the_server_stays() -> None:
    schemas: dict[str, Any] = {"Problem": PAGE}
    requests = added(schemas, pipeline("a", defined("Problem", Problem=OTHER)))
    assert schemas == {"Problem": PAGE, "a.request.Problem": OTHER}
    assert requests["a"] == {"$ref": REFERENCE + "a.request.Problem"}


def test_schemas_around_a_renamed_one_refer_to_it() -> None:
    schemas: dict[str, Any] = {"Page": PAGE}
    added(schemas, pipeline("a", defined("Book", Book=BOOK, Page=OTHER)))
    assert schemas["a.request.Page"] == OTHER
    assert schemas["a.request.Book"]["properties"] == {
        "page": {"$ref": REFERENCE + "a.request.Page"},
        "$ref": {"type": "string"},
    }


def test_request_and_answer_may_have_schemas_of_one_name() -> None:
    schemas: dict[str, Any] = {"Page": {}}
    added(schemas, pipeline("a", defined("Page", Page=PAGE), defined("Page", Page=OTHER)))
    assert (schemas["a.request.Page"], schemas["a.answer.Page"]) == (PAGE, OTHER)
