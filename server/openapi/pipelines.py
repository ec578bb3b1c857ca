"""The operations of pipelines: one for each, with its own request and answer."""

from collections.abc import Iterable
from typing import Any

from cobatch.server.inference.served import ServedPipeline

Json = dict[str, Any]

_TEMPLATE = "/v1/models/{name}/infer"
_ANY = "*/*"
_REFERENCE = "#/components/schemas/"


def add_pipelines(paths: Json, schemas: Json, pipelines: Iterable[ServedPipeline]) -> None:
    """Put an operation of each pipeline that is loaded in place of the template, and add their schemas.

    Schemas of one name must be alike, or the later ones get the pipeline's name before it.
    """
    template = paths.pop(_TEMPLATE)["post"]
    for pipeline in pipelines:
        content = pipeline.content
        if content is None:
            continue
        request = _own(content.request_schema, schemas, f"{pipeline.name}.request")
        answer = _own(content.answer_schema, schemas, f"{pipeline.name}.answer")
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


def _content(types: Iterable[str], schema: Json | None) -> Json:
    octets = {"type": "string"}
    return {one: {"schema": schema if schema is not None and "json" in one else octets} for one in types}


def _own(schema: Json | None, schemas: Json, owner: str) -> Json | None:
    """Move a schema's definitions to `schemas`; return it. All are renamed if one differs there."""
    if schema is None:
        return None
    schema = dict(schema)
    own = schema.pop("$defs", {})
    if any(schemas.get(name, definition) != definition for name, definition in own.items()):
        renamed = {_REFERENCE + name: f"{_REFERENCE}{owner}.{name}" for name in own}
        own = {f"{owner}.{name}": _with(definition, renamed) for name, definition in own.items()}
        schema = _with(schema, renamed)
    schemas |= own
    return schema


def _with(value: Any, renamed: dict[str, str]) -> Any:
    """Return a schema with other references."""
    match value:
        case dict():
            return {
                key: renamed.get(one, one) if key == "$ref" and isinstance(one, str) else _with(one, renamed)
                for key, one in value.items()
            }
        case list():
            return [_with(one, renamed) for one in value]
    return value
