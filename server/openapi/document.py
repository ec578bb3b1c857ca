"""The OpenAPI document: operations.json, completed for the loaded models and the settings of `[auth]`.

operations.json is an OpenAPI document with extensions, which are replaced here:

* `x-needs` is the permission that the route demands (`server.api.routing.Needs`). It becomes `security`, its
  sentence of `x-needs-sentences` in the description, and the problems of authentication.
* `x-problems` are the kinds of problems that the operation answers with. They become responses.
* `x-problem-examples` has the detail and the members of one example per kind, which becomes a whole body.

Parameters are references to `components.parameters`, which are resolved here.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from cobatch import __version__
from cobatch.server.api.oauth import metadata_document, metadata_path
from cobatch.server.api.profile import DEFAULT_S, LIMIT_S
from cobatch.server.api.routing import Needs
from cobatch.server.auth.authenticator import Authenticator
from cobatch.server.auth.credentials import WELL_KNOWN
from cobatch.server.http.problem import KINDS, PROBLEM_JSON, Problem
from cobatch.server.inference.service import Inference
from cobatch.server.openapi.examples import LoadedModels, add_examples
from cobatch.server.openapi.pipelines import add_pipelines
from cobatch.server.openapi.schemas import raw_options, schemas
from cobatch.server.predictions.content import JSON

Json = dict[str, Any]

_TEMPLATE = Path(__file__).with_name("operations.json").read_bytes()
_MODEL = "/v2/models/{name}"

# Every route can answer with these: problems of the connection and of the server itself.
ANYWHERE = (
    "bad-http", "body-memory", "headers-too-large", "internal", "method-not-allowed",
    "receive-timeout", "draining", "unsupported-transfer-coding",
)  # fmt: skip
_CREDENTIALS = ("bad-authorization", "unauthenticated", "invalid-credentials")
_TOKENS = ("too-many-bad-tokens", "keys-unavailable")
# Every route that demands credentials can answer with these.
GUARDED = (*_CREDENTIALS, *_TOKENS)
# A server without [auth] never answers with these.
AUTH_KINDS = frozenset((*GUARDED, "forbidden", "tenant-limit"))
# Their responses have WWW-Authenticate.
_CHALLENGED = frozenset((*_CREDENTIALS, "forbidden"))
_RATE_LIMIT = ("RateLimit-Policy", "RateLimit")


def describe(inference: Inference) -> Json:
    """Return the OpenAPI document for the models that are loaded now."""
    document: Json = msgspec.json.decode(_TEMPLATE)
    document["info"]["version"] = __version__
    models = LoadedModels(inference)
    components = document["components"]
    components["schemas"] = schemas(components["schemas"], models.signatures, models.required)
    add_pipelines(document["paths"], components["schemas"], inference.pipelines.values())
    _add_access(document, inference.auth)
    parameters = _parameters(components.pop("parameters"), models)
    add_examples({one["operationId"]: one for _, _, one in operations_in(document)}, models)
    _add_versions(document["paths"])
    sentences = document.pop("x-needs-sentences")
    for _, _, operation in operations_in(document):
        if "parameters" in operation:
            names = [one["$ref"].rpartition("/")[2] for one in operation["parameters"]]
            operation["parameters"] = [parameters[name] for name in names]
        _complete(operation, inference.auth, sentences)
    left_out = AUTH_KINDS if inference.auth is None else ()
    components["examples"] = _problem_examples(document.pop("x-problem-examples"), left_out)
    return document


def operations_in(document: Json) -> Iterator[tuple[str, str, Json]]:
    """Yield path, method and operation."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def _parameters(parameters: Json, models: LoadedModels) -> Json:
    """Complete the parameters with model names, versions, and the schemas of the query's options."""
    versions = sorted({model.version for model in models.all})
    for name, values in (("model", [model.name for model in models.all]), ("version", versions)):
        if values:
            parameters[name]["schema"]["enum"] = values
            parameters[name]["example"] = values[0]
    parameters["seconds"]["schema"] |= {"maximum": LIMIT_S, "default": DEFAULT_S}
    for name, schema in raw_options().items():
        options = schema.get("anyOf", [schema])
        # A query carries text: objects cannot be written there, and null is the absent parameter.
        text = next(one for one in options if one.get("type") not in ("object", "null"))
        parameters[name]["schema"] = text
        if text["type"] == "array":
            parameters[name] |= {"style": "form", "explode": name != "shape"}
    return parameters


def _add_versions(paths: Json) -> None:
    """Add the operations of a model once more, under the path that names its version."""
    version = {"$ref": "#/components/parameters/version"}
    for path in [path for path in paths if path.startswith(_MODEL)]:
        paths[path.replace(_MODEL, f"{_MODEL}/versions/{{version}}")] = {
            method: operation
            | {
                "operationId": f"{operation['operationId']}OfVersion",
                "x-twin-of": operation["operationId"],
                "parameters": [operation["parameters"][0], version, *operation["parameters"][1:]],
            }
            for method, operation in paths[path].items()
        }


def _add_access(document: Json, auth: Authenticator | None) -> None:
    """Keep of security schemes, headers and OAuth metadata those parts that the settings provide."""
    components, paths = document["components"], document["paths"]
    schemes, headers = components.pop("securitySchemes"), components["headers"]
    metadata = paths.pop(WELL_KNOWN)
    if auth is None:
        del headers["WWW-Authenticate"]
    if auth is None or not auth.settings.rate_limit_headers:
        for name in _RATE_LIMIT:
            del headers[name]
    if auth is None:
        return
    schemes["bearer"]["description"] = schemes["bearer"]["description"].format(
        issuers=", ".join(issuer.issuer for issuer in auth.settings.issuers),
        audiences=" or ".join(auth.settings.audience),
    )
    components["securitySchemes"] = {name: schemes[name] for name in _scheme_names(auth)}
    if auth.challenges.resource:
        metadata["get"]["responses"]["200"]["content"][JSON]["example"] = metadata_document(auth)
        paths[metadata_path(auth)] = metadata


def _scheme_names(auth: Authenticator) -> list[str]:
    return ["bearer"] * bool(auth.settings.issuers) + ["apiKey"] * bool(auth.settings.api_keys_file)


def _complete(operation: Json, auth: Authenticator | None, sentences: dict[Needs, str]) -> None:
    """Replace `x-needs` and `x-problems` by security, a sentence and responses."""
    needs: Needs = operation.pop("x-needs")
    slugs = set(operation.pop("x-problems", ()))
    if auth is None:
        slugs -= AUTH_KINDS
    else:
        operation["description"] += f" {sentences[needs]}"
    guard = None if needs == "open" else auth
    if guard is not None:
        operation["security"] = [{name: []} for name in _scheme_names(guard)]
        slugs.update(_CREDENTIALS, _TOKENS if guard.settings.issuers else ())
        slugs.update(["forbidden"] if needs != "known" else (), ["tenant-limit"] if needs == "infer" else ())
    operation["responses"] = responses = _merged(operation["responses"], _problem_responses(slugs))
    if guard is not None and guard.settings.rate_limit_headers:
        for status, response in responses.items():
            if status != "401":  # then the tenant is unknown, and so are its limits
                response["headers"] = response.get("headers", {}) | _refs(_RATE_LIMIT)


def _refs(headers: Iterable[str]) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in headers}


def _merged(answers: Json, problems: Json) -> Json:
    """Join responses; a status with a body of its own can have a problem as well."""
    for status in answers.keys() & problems.keys():
        own, problem = answers[status], problems[status]
        problem["description"] = f"{own['description']} Or: {problem['description']}"
        problem["content"] = own["content"] | problem["content"]
    return dict(sorted((answers | problems).items()))


def _problem_examples(examples: Json, left_out: Collection[str]) -> Json:
    """Return an example of each kind of problem by its slug, with the body that the server would write."""
    result = {}
    for slug, kind in KINDS.items():
        if slug not in left_out:
            text = b"".join(Problem(slug, **examples[slug]).reply().body)
            result[slug] = {"summary": kind.title, "value": msgspec.json.decode(text)}
    return result


def _problem_responses(slugs: Collection[str]) -> Json:
    """Return responses by status for a route that answers with these kinds, and with those of any route."""
    by_status: dict[int, list[str]] = defaultdict(list)
    for slug, kind in KINDS.items():
        if slug in slugs or slug in ANYWHERE:
            by_status[kind.status].append(slug)
    return {str(status): _problem_response(status, by_status[status]) for status in sorted(by_status)}


def _problem_response(status: int, slugs: list[str]) -> Json:
    kinds = [KINDS[slug] for slug in slugs]
    types = {"type": {"enum": [f"/problems/{slug}" for slug in slugs]}}
    media = {
        "schema": {"allOf": [{"$ref": "#/components/schemas/Problem"}, {"properties": types}]},
        "examples": {slug: {"$ref": f"#/components/examples/{slug}"} for slug in slugs},
    }
    sent = {
        "Retry-After": any("retry_after_ms" in kind.members for kind in kinds),
        "Allow": status == 405,
        "WWW-Authenticate": not _CHALLENGED.isdisjoint(slugs),
    }
    headers = _refs(name for name, is_sent in sent.items() if is_sent)
    description = "; ".join(kind.title for kind in kinds)
    response = {"description": description, "content": {PROBLEM_JSON.decode(): media}}
    return response | ({"headers": headers} if headers else {})
