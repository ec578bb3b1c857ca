"""Who may call, in the API's description; nothing of it where the server asks nobody who he is.

`server.openapi.parts.operation` leaves beside each operation what it needs and what may go wrong. From
that, and from the settings of `[auth]`, `complete` makes the rest of it.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from cobatch.server.api.routing import Needs
from cobatch.server.auth.authenticator import Authenticator
from cobatch.server.auth.challenges import WELL_KNOWN
from cobatch.server.openapi.errors import problem_responses
from cobatch.server.openapi.parts import answer, operation

Json = dict[str, Any]

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
