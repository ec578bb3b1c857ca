"""The request headers of the native resource: Prefer (RFC 7240) and Idempotency-Key."""

from __future__ import annotations

from typing import NamedTuple

from starlette.requests import Request

from cobatch.server.http.problem import Problem

_MOST_KEY = 255


class Preferences(NamedTuple):
    """What the client would like: an answer at once and the result later; seconds to wait for it."""

    respond_async: bool
    wait_s: int | None


def preferences(request: Request) -> Preferences:
    """Preferences that are unknown or malformed are passed over, as the RFC asks; of two, the first holds."""
    found: dict[str, str] = {}
    for header in request.headers.getlist("prefer"):
        # No preference that is known here has a comma or a semicolon in its value.
        for item in header.split(","):
            name, _, value = item.partition(";")[0].partition("=")
            found.setdefault(name.strip().lower(), value.strip().strip('"'))
    wait = found.get("wait", "")
    wait_s = int(wait) if wait.isascii() and wait.isdigit() and len(wait) < 10 else None
    return Preferences("respond-async" in found, wait_s)


def idempotency_key(request: Request) -> str | None:
    """The key, as opaque text, or None. Raises Problem where it is none."""
    keys = request.headers.getlist("idempotency-key")
    if not keys:
        return None
    key = keys[0]
    if len(keys) > 1 or not 1 <= len(key) <= _MOST_KEY or not all(" " <= char <= "~" for char in key):
        raise Problem(
            "bad-parameter",
            f"Idempotency-Key must be one value of 1 to {_MOST_KEY} printable ASCII characters",
            parameter="Idempotency-Key",
        )
    return key
