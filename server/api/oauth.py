"""GET /.well-known/oauth-protected-resource: the issuers whose tokens this server accepts (RFC 9728)."""

from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cobatch.server.api.routing import guarded, json
from cobatch.server.auth.authenticator import Authenticator
from cobatch.server.auth.credentials import WELL_KNOWN
from cobatch.server.inference.service import Inference
from cobatch.server.settings.auth import ADMIN, INFER, METADATA


def metadata_path(auth: Authenticator) -> str:
    """Return the metadata's path: the well-known part, then the resource's own path (RFC 9728, 3.1)."""
    return WELL_KNOWN + urlsplit(auth.challenges.resource).path.rstrip("/")


def metadata_document(auth: Authenticator) -> dict[str, Any]:
    """Return the metadata. `resource` is exactly the identifier that clients use (RFC 9728, 3.3)."""
    return {
        "resource": auth.challenges.resource,
        "authorization_servers": [issuer.issuer for issuer in auth.settings.issuers],
        "scopes_supported": [INFER, METADATA, ADMIN],
        "bearer_methods_supported": ["header"],
        "resource_name": "cobatch",
    }


def auth_routes(inference: Inference) -> list[Route]:
    """Return the route, or none where the server does not know its own address."""
    auth = inference.auth
    if auth is None or not auth.challenges.resource:
        return []
    document = metadata_document(auth)

    async def metadata(_: Request) -> Response:
        return json(document)

    return [Route(metadata_path(auth), guarded(inference, "open", metadata), methods=["GET"])]
