"""Where a request's credential stands: RFC 6750, 2. One header, one credential.

A signed token's three parts, read strictly: one reading of each token, or none.

What two readers could take for different things is refused, or a proxy and this server might disagree on
whose token it is: members that are there twice, other alphabets, numbers that are none.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
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


_COMPACT = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")


def header_and_claims(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the token says of itself, to be believed only once its signature is checked. Raises ValueError.

    RFC 7515, 3.1 and 7.1: three parts, and here none of them may be empty.
    """
    found = _COMPACT.fullmatch(token)
    if found is None:
        raise ValueError("the token is not a signed JWT: three parts in base64url with dots between")
    header, claims, signature = found.groups()
    _decoded(signature, "signature")
    return _object(header, "header"), _object(claims, "payload")


def _decoded(part: str, name: str) -> bytes:
    """RFC 7515, 2: no padding, and (RFC 4648, 3.5) one text only for the same bytes."""
    if len(part) % 4 != 1:
        data = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
        if base64.urlsafe_b64encode(data).rstrip(b"=") == part.encode():
            return data
    raise ValueError(f"the token's {name} is not base64url")


def _object(part: str, name: str) -> dict[str, Any]:
    """RFC 7515, 4 and RFC 7519, 4: an object, and no member twice, at any level."""
    data = _decoded(part, name)
    try:
        text = data.decode()
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
        if "\\u" in text:
            # An escape can write half a surrogate pair, which no output could encode.
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise ValueError(f"the token's {name} is not JSON, or has a member twice") from None
    if not isinstance(value, dict):
        raise ValueError(f"the token's {name} is not a JSON object")  # noqa: TRY004 - it is of the token, not of us
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a member is there twice")
    return made


def _no_constant(text: str) -> Any:
    raise ValueError("NaN and Infinity are not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value
