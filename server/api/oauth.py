"""GET /.well-known/oauth-protected-resource: where clients learn whom to ask for a token (RFC 9728)."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cobatch.server.api.routing import guarded, json
from cobatch.server.auth.challenges import WELL_KNOWN
from cobatch.server.inference.service import Inference
from cobatch.server.settings.auth import ADMIN, INFER, METADATA


def auth_routes(core: Inference) -> list[Route]:
    """The route, where the server knows its own address; none without."""
    auth = core.auth
    if auth is None or not auth.challenges.resource:
        return []
    # `resource` must be exactly what the client asked about (RFC 9728, 3.3).
    document = {
        "resource": auth.challenges.resource,
        "authorization_servers": [issuer.issuer for issuer in auth.settings.issuers],
        "scopes_supported": [INFER, METADATA, ADMIN],
        "bearer_methods_supported": ["header"],
        "resource_name": "cobatch",
    }

    async def metadata(_: Request) -> Response:
        return json(document)

    path = urlsplit(auth.challenges.resource).path.rstrip("/")
    return [Route(WELL_KNOWN + path, guarded(core, "open", metadata), methods=["GET"])]
