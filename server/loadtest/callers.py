"""Who calls: shares of the load with a credential, a priority, a deadline and rows of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cobatch.server.loadtest.errors import UsageError

_KEYS = ("name", "share", "rows", "priority", "deadline_ms", "token_file", "api_key_file")


@dataclass(frozen=True)
class Caller:
    """Requests that are alike. `share`: its part of all, beside the other callers'; `headers`: who it is."""

    name: str = "all"
    share: float = 1.0
    rows: int = 1
    priority: int = 0
    deadline_ms: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, int]:
        """Of each request: the protocol's, as far as they say something."""
        found = {"priority": self.priority} if self.priority else {}
        if self.deadline_ms is not None:
            found["timeout"] = max(1, round(self.deadline_ms * 1000))
        return found


def callers(texts: Sequence[str], default: Caller) -> list[Caller]:
    """One for each `name=a,share=2,...`; `default` has what they do not say. Raises UsageError."""
    found = [_caller(text, default, number) for number, text in enumerate(texts)] or [default]
    if len({one.name for one in found}) < len(found):
        raise UsageError("--tenant: two have the same name")
    return found


def _caller(text: str, default: Caller, number: int) -> Caller:
    given: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or key.strip() not in _KEYS:
            raise UsageError(f"--tenant: expected KEY=VALUE with a key of {', '.join(_KEYS)}, got {part!r}")
        given[key.strip()] = value.strip()
    name = given.get("name", f"tenant {number + 1}")
    headers = dict(default.headers)
    for key, credential in (("token_file", bearer), ("api_key_file", api_key)):
        if key in given:
            # One credential: another one of the default's would be a request with two.
            headers = {
                header: value
                for header, value in headers.items()
                if header not in ("Authorization", "X-API-Key")
            }
            headers |= credential(secret(given[key]))
    try:
        found = replace(
            default,
            name=name,
            share=float(given.get("share", default.share)),
            rows=int(given.get("rows", default.rows)),
            priority=int(given.get("priority", default.priority)),
            deadline_ms=float(given["deadline_ms"]) if "deadline_ms" in given else default.deadline_ms,
            headers=headers,
        )
    except ValueError as error:
        raise UsageError(f"--tenant {text}: {error}") from None
    if not (found.share > 0 and found.rows > 0 and found.priority >= 0):
        raise UsageError(f"--tenant {text}: share and rows must be more than 0, priority at least 0")
    if found.deadline_ms is not None and not found.deadline_ms > 0:
        raise UsageError(f"--tenant {text}: deadline_ms must be more than 0")
    return found


def secret(path: str | Path) -> str:
    """What a file holds, without the line's end. Raises UsageError."""
    try:
        found = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from None
    if not found or not found.isascii() or not found.isprintable():
        raise UsageError(f"{path}: expected one line of ASCII text")
    return found


def bearer(token: str) -> dict[str, str]:
    """The header that a token travels in."""
    return {"Authorization": f"Bearer {token}"}


def api_key(key: str) -> dict[str, str]:
    """The header that an API key travels in."""
    return {"X-API-Key": key}
