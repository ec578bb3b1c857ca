"""Refused credentials: problem and `WWW-Authenticate` challenge (RFC 6750, 3).

No refusal repeats the credential. Where the server knows its own URL, each challenge links to its metadata
(RFC 9728, 5.1).
"""

from __future__ import annotations

from urllib.parse import urlsplit

from cobatch.server.http.problem import Problem

WELL_KNOWN = "/.well-known/oauth-protected-resource"


class Challenges:
    """Makes the refusals of a server with the identifier `resource` (RFC 9728), "" if it has none."""

    def __init__(self, resource: str = "") -> None:
        self.resource = resource
        self._metadata = ""
        if resource:
            parts = urlsplit(resource)
            # RFC 9728, 3.1: the well-known part goes between host and path.
            self._metadata = f"{parts.scheme}://{parts.netloc}{WELL_KNOWN}{parts.path.rstrip('/')}"

    def missing(self) -> Problem:
        """No credentials. RFC 6750, 3.1: the challenge has no error code."""
        return Problem("unauthenticated", "credentials are required", headers=self._challenge())

    def invalid_request(self, detail: str) -> Problem:
        """Malformed credentials, or two of them."""
        return Problem("bad-authorization", detail, headers=self._challenge("invalid_request", detail))

    def invalid_token(self, detail: str) -> Problem:
        """A token or key that is not accepted. `detail` must not quote the credential."""
        return Problem("invalid-credentials", detail, headers=self._challenge("invalid_token", detail))

    def insufficient_scope(self, permission: str, detail: str, model: str | None = None) -> Problem:
        """An authenticated client without the permission."""
        headers = self._challenge("insufficient_scope", detail, permission)
        problem = Problem("forbidden", detail, headers=headers, permission=permission)
        if model is not None:
            problem.members["model"] = model
        return problem

    def _challenge(
        self, error: str | None = None, detail: str = "", scope: str | None = None
    ) -> tuple[tuple[bytes, bytes]]:
        parameters = {"error": error, "error_description": detail if error else None, "scope": scope}
        parameters["resource_metadata"] = self._metadata or None
        pairs = [f'{name}="{_quotable(text)}"' for name, text in parameters.items() if text is not None]
        return ((b"www-authenticate", f"Bearer {', '.join(pairs)}".strip().encode()),)


def _quotable(text: str) -> str:
    """Keep printable ASCII without quotes and backslashes (RFC 6750, 3)."""
    return "".join(c if " " <= c <= "~" and c not in '"\\' else "'" for c in text)
