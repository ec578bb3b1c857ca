"""Where a request's credential stands: RFC 6750, 2. One header, one credential."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import unquote_plus

from cobatch.server.auth.challenges import Challenges

AUTHORIZATION = b"authorization"
API_KEY = b"x-api-key"
# RFC 6750, 2.1: b68token.
_TOKEN = re.compile(rb"[A-Za-z0-9\-._~+/]+=*")


class Credential(NamedTuple):
    """A header's value as it came; `is_key` says that it is X-API-Key's, else it is Authorization's."""

    value: bytes
    is_key: bool


def credential_in(
    headers: Sequence[tuple[bytes, bytes]], query: bytes, challenges: Challenges
) -> Credential | None:
    """The one credential of a request, None where there is none. Raises Problem for two."""
    found = [(name, value) for name, value in headers if name in (AUTHORIZATION, API_KEY)]
    if names_token(query):
        # Addresses end in logs and histories.
        raise challenges.invalid_request("a token does not belong in the query: send Authorization")
    if len(found) > 1:
        raise challenges.invalid_request("two credentials in one request: send one header, once")
    return Credential(found[0][1], found[0][0] == API_KEY) if found else None


def names_token(query: bytes) -> bool:
    """Whether a query has a token in it, as RFC 6750, 2.3 would."""
    if b"access_token" not in query and b"%" not in query:
        return False
    return any(
        unquote_plus(pair.partition("=")[0]) == "access_token" for pair in query.decode("latin-1").split("&")
    )


def token_of(authorization: bytes, challenges: Challenges) -> str:
    """The token of `Authorization: Bearer TOKEN`. Raises Problem."""
    scheme, _, rest = authorization.strip().partition(b" ")
    if scheme.lower() != b"bearer":
        # RFC 9110, 11.6.1: a scheme that is not offered is like no credentials.
        raise challenges.missing()
    token = rest.strip()
    if _TOKEN.fullmatch(token) is None:
        raise challenges.invalid_request("Authorization must be Bearer and one token")
    return token.decode("ascii")
