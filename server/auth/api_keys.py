"""API keys, for clients that cannot do OAuth: a file of hashes, compared in constant time.

A key is `cb_ID_SECRET`. The ID finds the entry and may appear in logs. The secret is 32 random bytes in
base64url, and the file holds only its SHA-256. Slow, salted hashes protect secrets that can be guessed
(NIST SP 800-63B-3, 5.1.2.2 requires them below 112 bits of entropy); they are pointless for 256 random bits
and would give attackers a way to keep the server busy.

    [[keys]]
    id = "ab2cd3ef4gh5"
    sha256 = "64 hex digits: of the text SECRET, in ASCII"
    tenant = "search-team"
    scopes = ["infer", "metadata"]  # permissions, and names of tenant classes
    name = "nightly job"            # optional: the key's user
    expires = 2027-01-31            # optional: a date (its start, in UTC), or a date with a time

The file is read at the start, and again on SIGHUP.
"""

import base64
import hashlib
import hmac
import json
import math
import re
import secrets
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import msgspec

from cobatch.server.auth.principal import MAX_NAME, is_name
from cobatch.server.settings.auth import Texts, is_permission
from cobatch.server.settings.describe import Text, pattern
from cobatch.server.settings.values import (
    Errors,
    Given,
    Reader,
    SettingsError,
    Table,
    read_toml,
    suggestion,
)

_SHAPE = re.compile(r"cb_([a-z2-7]{12})_([A-Za-z0-9_-]{43})")
# RFC 6749, 3.3: the characters of a scope.
_SCOPE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A table of the file, as far as types go."""

    id: Annotated[str, pattern("[a-z2-7]{12}", "12 of the letters a to z and digits 2 to 7")]
    sha256: Annotated[str, pattern("[0-9A-Fa-f]{64}", "64 hex digits, of the secret's SHA-256")]
    tenant: Text
    scopes: Texts
    name: str = ""
    expires: Any = None


class _File(msgspec.Struct, frozen=True):
    keys: tuple[_Entry, ...] = ()


class ApiKey(NamedTuple):
    """A checked entry. `expires_s`: seconds since the epoch, infinite for a key that never expires."""

    id: str
    tenant: str
    scopes: tuple[str, ...]
    expires_s: float
    digest: bytes


# Unknown IDs are compared with this entry, malformed keys with this secret: a miss costs as much as a hit,
# one SHA-256 of 43 bytes and one comparison in constant time.
_NO_KEY = ApiKey("", "", (), -math.inf, bytes(32))
_NO_SECRET = "_" * 43


class ApiKeys:
    """The keys of one file."""

    def __init__(self, keys: Mapping[str, ApiKey]) -> None:
        self._keys = keys

    @classmethod
    def read(cls, path: Path, source: str = "") -> Self:
        """Read the keys of a file, which is named in `source`. Raises SettingsError."""
        return cls.parse(read_toml(path, "auth.api_keys_file", source), f"file {path}")

    @classmethod
    def parse(cls, document: Mapping[str, object], source: str) -> Self:
        """Check a TOML document; `source` names its origin in messages. Raises SettingsError."""

        def hint(name: str, known: Iterable[str]) -> str:
            return "; expected [[keys]] only" if "keys" in known else suggestion(name, known)

        errors = Errors()
        file = Reader(source, Path(), errors, hint).table("", document, _File)
        keys: dict[str, ApiKey] = {}
        for table in file["keys"].value if "keys" in file else ():
            with errors:
                key = _api_key(table)
                if key.id in keys:
                    raise SettingsError(f"{table['id'].key}: {key.id} is the ID of two keys ({source})")
                keys[key.id] = key
        errors.raise_any()
        return cls(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, key_id: str) -> ApiKey | None:
        """Return the entry of an ID."""
        return self._keys.get(key_id)

    def find(self, presented: str, now_s: float) -> ApiKey | None:
        """Return a presented key's entry; None if it is unknown, malformed or expired."""
        match = _SHAPE.fullmatch(presented)
        key_id, secret = match.groups() if match is not None else ("", _NO_SECRET)
        key = self._keys.get(key_id, _NO_KEY)
        same = hmac.compare_digest(_digest(secret), key.digest)
        return key if same and now_s < key.expires_s else None


def mint(
    tenant: str, scopes: Sequence[str], name: str = "", expires: datetime | date | None = None
) -> tuple[str, str]:
    """Make a key; return it, and its table for the file. Raises SettingsError if that would be refused."""
    key_id = base64.b32encode(secrets.token_bytes(8)).decode().lower()[:12]
    secret = secrets.token_urlsafe(32)
    fields = {
        "id": toml_string(key_id),
        "sha256": toml_string(_digest(secret).hex()),
        "tenant": toml_string(tenant),
        "scopes": f"[{', '.join(map(toml_string, scopes))}]",
        "name": toml_string(name) if name else "",
        "expires": "" if expires is None else expires.isoformat(),
    }
    entry = "".join(f"{field} = {value}\n" for field, value in fields.items() if value)
    ApiKeys.parse(tomllib.loads(f"[[keys]]\n{entry}"), "the new key")
    return f"cb_{key_id}_{secret}", f"[[keys]]\n{entry}"


def toml_string(text: str) -> str:
    """Write the text as a TOML basic string, with its quotes."""
    # JSON's escapes are valid in TOML; only DEL has to be escaped in addition.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("ascii")).digest()


def _api_key(table: Table) -> ApiKey:
    for name in ("tenant", "name"):
        if name in table and table[name].value:
            _check(table[name], is_name, f"at most {MAX_NAME} printable characters")
    return ApiKey(
        id=table["id"].value,
        tenant=table["tenant"].value,
        scopes=_scopes(table["scopes"]),
        expires_s=_expires_s(table["expires"]) if "expires" in table else math.inf,
        digest=bytes.fromhex(table["sha256"].value),
    )


def _check(given: Given, accepts: Callable[[str], object], expected: str) -> None:
    if not accepts(given.value):
        raise given.unexpected(expected)


def _scopes(given: Given) -> tuple[str, ...]:
    scopes: tuple[str, ...] = given.value
    for scope in scopes:
        _check(given._replace(value=scope), _SCOPE.fullmatch, "single words, without quotes and backslashes")
    if not any(map(is_permission, scopes)):
        # A key with tenant classes alone would be known and then refused everything.
        expected = "a permission among them: infer, infer:MODEL, metadata, admin"
        raise given.refused(f"expected {expected}; got {', '.join(scopes)}")
    return scopes


def _expires_s(given: Given) -> float:
    value = given.value
    if not isinstance(value, date):
        raise given.unexpected("a date or a date with a time, without quotes: 2027-01-31T12:00:00Z")
    moment = value if isinstance(value, datetime) else datetime.combine(value, time.min)
    # A time without an offset is UTC, so that it means the same on every machine.
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
