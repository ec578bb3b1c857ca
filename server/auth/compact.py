"""A signed token's three parts, read strictly: one reading of each token, or none.

What two readers could take for different things is refused, or a proxy and this server might disagree on
whose token it is: members that are there twice, other alphabets, numbers that are none.
"""

from __future__ import annotations

import base64
import json
import math
import re
from typing import Any

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
