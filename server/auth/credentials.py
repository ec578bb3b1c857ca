"""Credentials in a request and their refusals (RFC 6750, 2 and 3), and the strict parser of compact JWTs.

One request carries one credential, in one header. Whatever two parsers could read in two ways is refused, or
a proxy and this server might disagree on the owner of a token: a second credential, duplicate JSON members,
other alphabets, non-JSON numbers. No refusal repeats the credential.
"""

import base64
import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import unquote_plus, urlsplit

from cobatch.server.http.problem import Problem

Headers = Sequence[tuple[bytes, bytes]]

AUTHORIZATION = b"authorization"
API_KEY = b"x-api-key"
WELL_KNOWN = "/.well-known/oauth-protected-resource"
# RFC 6750, 3.1: the error of a challenge, by the problem's kind; without credentials it has none.
_ERRORS = {
    "unauthenticated": None,
    "bad-authorization": "invalid_request",
    "invalid-credentials": "invalid_token",
    "forbidden": "insufficient_scope",
}
# RFC 6750, 3: parameters are printable ASCII without quotes and backslashes.
_UNQUOTABLE = re.compile(r"[^ !#-\[\]-~]")
# RFC 6750, 2.1: b68token.
_TOKEN = re.compile(rb"[A-Za-z0-9\-._~+/]+=*")
_COMPACT = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")


class Challenges:
    """Makes the refusals of a server with the identifier `resource` (RFC 9728), "" if it has none."""

    def __init__(self, resource: str = "") -> None:
        self.resource = resource
        self._metadata: str | None = None
        if resource:
            parts = urlsplit(resource)
            # RFC 9728, 3.1: the well-known part goes between host and path.
            self._metadata = f"{parts.scheme}://{parts.netloc}{WELL_KNOWN}{parts.path.rstrip('/')}"

    def problem(self, slug: str, detail: str, **members: Any) -> Problem:
        """Return a refusal, whose challenge links to the metadata (RFC 9728, 5.1)."""
        error = _ERRORS[slug]
        parameters = {
            "error": error,
            "error_description": detail if error else None,
            "scope": members.get("permission"),
            "resource_metadata": self._metadata,
        }
        given = {name: _UNQUOTABLE.sub("'", text) for name, text in parameters.items() if text is not None}
        pairs = ", ".join(f'{name}="{text}"' for name, text in given.items())
        challenge = f"Bearer {pairs}".strip().encode()
        return Problem(slug, detail, headers=((b"www-authenticate", challenge),), **members)

    def missing(self) -> Problem:
        """Return the refusal of a request without credentials."""
        return self.problem("unauthenticated", "credentials are required")


class Credential(NamedTuple):
    """A header's raw value: of X-API-Key if `is_key`, else of Authorization."""

    value: bytes
    is_key: bool


def credential_in(headers: Headers, query: bytes, challenges: Challenges) -> Credential | None:
    """Return a request's only credential, None if it has none. Raises Problem for two."""
    found = [(name, value) for name, value in headers if name in (AUTHORIZATION, API_KEY)]
    if names_token(query):
        # URLs end up in logs and browser histories.
        raise challenges.problem(
            "bad-authorization", "a token in the query is refused: send the Authorization header"
        )
    if len(found) > 1:
        raise challenges.problem("bad-authorization", "two credentials in one request: send one header, once")
    return Credential(found[0][1], found[0][0] == API_KEY) if found else None


def names_token(query: bytes) -> bool:
    """Report whether a query string contains an access token (RFC 6750, 2.3)."""
    if b"access_token" not in query and b"%" not in query:
        return False
    return any(
        unquote_plus(pair.partition("=")[0]) == "access_token" for pair in query.decode("latin-1").split("&")
    )


def bearer_token(authorization: bytes, challenges: Challenges) -> str:
    """Return the token of `Authorization: Bearer TOKEN`. Raises Problem."""
    scheme, _, rest = authorization.strip().partition(b" ")
    if scheme.lower() != b"bearer":
        # RFC 9110, 11.6.1: a scheme that is not offered counts as no credentials.
        raise challenges.missing()
    token = rest.strip()
    if _TOKEN.fullmatch(token) is None:
        raise challenges.problem("bad-authorization", "Authorization must be Bearer and one token")
    return token.decode("ascii")


def header_and_claims(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parse the header and claims of a token (RFC 7515, 7.1), unverified. Raises ValueError."""
    match = _COMPACT.fullmatch(token)
    if match is None:
        raise ValueError("the token is not a signed JWT: three parts in base64url, separated by dots")
    header, claims, signature = match.groups()
    _decode(signature, "signature")
    return _decode_object(header, "header"), _decode_object(claims, "payload")


def _decode(part: str, name: str) -> bytes:
    """Decode base64url without padding (RFC 7515, 2), in its canonical form only (RFC 4648, 3.5)."""
    if len(part) % 4 != 1:
        data = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
        if base64.urlsafe_b64encode(data).rstrip(b"=") == part.encode():
            return data
    raise ValueError(f"the token's {name} is not base64url")


def _decode_object(part: str, name: str) -> dict[str, Any]:
    """Decode a JSON object without duplicate members at any level (RFC 7515, 4; RFC 7519, 4)."""
    data = _decode(part, name)
    try:
        text = data.decode()
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_finite, parse_float=_finite)
        if "\\u" in text:
            # An escape can write half of a surrogate pair, which no output could encode.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise ValueError(f"the token's {name} is not JSON, or has a member twice") from None
    if not isinstance(value, dict):
        raise ValueError(f"the token's {name} is not a JSON object")  # noqa: TRY004 - the token is at fault
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate member")
    return members


def _finite(text: str) -> float:
    """Refuse numbers that JSON has not: NaN, Infinity and those out of range."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("number out of range")
    return value
