"""The operations of pipelines: one for each, with its own request and answer."""

from collections.abc import Iterable
from typing import Any

from cobatch.server.inference.served import ServedPipeline

Json = dict[str, Any]

_TEMPLATE = "/v1/models/{name}/infer"
_ANY = "*/*"


def add_pipelines(paths: Json, pipelines: Iterable[ServedPipeline]) -> Json:
    """Put an operation of each pipeline that is loaded in place of the template; return their schemas.

    Schemas of one name in two pipelines must be alike, or the second one's get the pipeline's name before it.
    """
    template = paths.pop(_TEMPLATE)["post"]
    schemas: Json = {}
    for pipeline in pipelines:
        content = pipeline.content
        if content is None:
            continue
        request = _own(content.request_schema, schemas, pipeline.name)
        answer = _own(content.answer_schema, schemas, pipeline.name)
        operation = {
            **template,
            "operationId": f"call-{pipeline.name}",
            "summary": content.summary or f"Call {pipeline.name}",
            "parameters": template["parameters"][1:],
            "requestBody": {"required": True, "content": _content(content.accepts or (_ANY,), request)},
        }
        success = template["responses"]["200"]
        returns = (content.returns or _ANY,)
        operation["responses"] = {"200": success | {"content": _content(returns, answer)}}
        paths[_TEMPLATE.replace("{name}", pipeline.name)] = {"post": operation}
    return schemas


def _content(types: Iterable[str], schema: Json | None) -> Json:
    octets = {"type": "string"}
    return {one: {"schema": schema if schema is not None and "json" in one else octets} for one in types}


def _own(schema: Json | None, schemas: Json, pipeline: str) -> Json | None:
    """Move a schema's definitions to `schemas`; return it."""
    if schema is None:
        return None
    schema = dict(schema)
    renamed = {}
    for name, definition in schema.pop("$defs", {}).items():
        if schemas.get(name, definition) == definition:
            schemas[name] = definition
        else:
            renamed[f"#/components/schemas/{name}"] = f"#/components/schemas/{pipeline}.{name}"
            schemas[f"{pipeline}.{name}"] = definition
    return _with(schema, renamed) if renamed else schema


def _with(value: Any, renamed: dict[str, str]) -> Any:
    """Return a schema with other references."""
    match value:
        case dict():
            return {
                key: renamed.get(one, one) if key == "$ref" else _with(one, renamed)
                for key, one in value.items()
            }
        case list():
            return [_with(one, renamed) for one in value]
    return value
