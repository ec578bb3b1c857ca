"""API keys, for clients that cannot do OAuth: a file of hashes, and a comparison in constant time.

A key is `cb_ID_SECRET`. The ID finds the entry and is no secret; it may stand in logs. The secret is 32
random bytes in base64url, and the file holds its SHA-256 alone. One round of a fast hash is right for it:
slow, salted hashes make up for secrets that people think of and that can be guessed (NIST SP 800-63B-3,
5.1.2.2: of look-up secrets, those with less than 112 bits of entropy need salt and a password's hash).
Nobody guesses 256 bits, and a slow hash here would be a way to keep the server busy.

    [[keys]]
    id = "ab2cd3ef4gh5"
    sha256 = "64 hex digits: of the text SECRET, in ASCII"
    tenant = "search-team"
    scopes = ["infer", "metadata"]  # the permissions among them permit; others name classes of tenants
    name = "nightly job"            # optional: who has it
    expires = 2027-01-31            # optional: a date (when it begins, in UTC), or a date with a time

The file is read once, at the start.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from cobatch.server.settings.auth import is_permission
from cobatch.server.settings.values import (
    Given,
    SettingsError,
    Table,
    check_table,
    fields_of,
    read_toml,
    refused,
)

_SHAPE = re.compile(r"cb_([a-z2-7]{12})_([A-Za-z0-9_-]{43})")
_ID = re.compile(r"[a-z2-7]{12}")
_SHA256 = re.compile(r"[0-9A-Fa-f]{64}")
# RFC 6749, 3.3: what a scope may be made of.
_SCOPE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]+")
_LONGEST_NAME = 256


class _Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A table of the file, as far as types go."""

    id: Annotated[str, Meta(min_length=1)]
    sha256: Annotated[str, Meta(min_length=1)]
    tenant: Annotated[str, Meta(min_length=1)]
    scopes: Annotated[tuple[Annotated[str, Meta(min_length=1)], ...], Meta(min_length=1)]
    name: str = ""
    expires: Any = None


class ApiKey(NamedTuple):
    """An entry of the file. `expires_s`: seconds since the epoch, infinite where it never does."""

    id: str
    tenant: str
    scopes: tuple[str, ...]
    expires_s: float
    digest: bytes


# What a key is compared with whose ID nobody has; even its secret would be of no use.
_NOBODY = ApiKey("", "", (), -math.inf, bytes(32))
_NO_SECRET = "_" * 43


class ApiKeys:
    """The keys of one file."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._keys = {key.id: key for key in keys}

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """The keys in a file. Raises SettingsError."""
        return cls.parse(read_toml(path, "auth.api_keys_file"), f"file {path}")

    @classmethod
    def parse(cls, document: Mapping[str, object], source: str) -> ApiKeys:
        """The keys in a TOML document; `source` says where it is from. Raises SettingsError."""
        for name in document:
            if name != "keys":
                raise SettingsError(f"{name}: unknown key; expected [[keys]] only ({source})")
        listed = document.get("keys", [])
        if not isinstance(listed, list):
            raise refused("keys", "an array of tables, written [[keys]]", listed, source)
        found: dict[str, int] = {}
        keys = []
        for index, table in enumerate(listed):
            key = _key(f"keys[{index}]", table, source)
            if key.id in found:
                raise SettingsError(f"keys[{index}].id: {key.id} is keys[{found[key.id]}]'s too ({source})")
            found[key.id] = index
            keys.append(key)
        return cls(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, presented: str, now_s: float) -> ApiKey | None:
        """The entry of a key as it came from a client; None if it is unknown, malformed or expired.

        The work is the same for all of them: one SHA-256 of 43 bytes and one comparison in constant time.
        """
        match = _SHAPE.fullmatch(presented)
        name, secret = match.groups() if match is not None else ("", _NO_SECRET)
        key = self._keys.get(name, _NOBODY)
        same = hmac.compare_digest(_digest(secret), key.digest)
        return key if same and now_s < key.expires_s else None


def mint(
    tenant: str, scopes: Sequence[str], name: str = "", expires: datetime | date | None = None
) -> tuple[str, str]:
    """A new key: the key itself, for its user, and the table with its hash, for the file.

    Raises SettingsError where the file would be refused with it.
    """
    made = base64.b32encode(secrets.token_bytes(8)).decode().lower()[:12]
    secret = secrets.token_urlsafe(32)
    entry: dict[str, Any] = {
        "id": made,
        "sha256": _digest(secret).hex(),
        "tenant": tenant,
        "scopes": list(scopes),
        "name": name,
    }
    ApiKeys.parse({"keys": [entry]}, "the new key")
    lines = ["[[keys]]"]
    lines += [f"{field} = {toml_string(entry[field])}" for field in ("id", "sha256", "tenant")]
    lines.append(f"scopes = [{', '.join(map(toml_string, scopes))}]")
    if name:
        lines.append(f"name = {toml_string(name)}")
    if expires is not None:
        lines.append(f"expires = {expires.isoformat()}")
    return f"cb_{made}_{secret}", "".join(f"{line}\n" for line in lines)


def toml_string(text: str) -> str:
    """The text as a TOML basic string, in its quotes."""
    # JSON's escapes are TOML's too; only DEL, which TOML wants escaped, JSON lets pass.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("ascii")).digest()


def _key(where: str, table: object, source: str) -> ApiKey:
    given = check_table(where, table, fields_of(_Entry), source)
    for field in msgspec.structs.fields(_Entry):
        if field.required and field.name not in given:
            raise SettingsError(f"{where}.{field.name}: missing ({source})")
    _check(given["id"], _ID, "12 of the letters a to z and digits 2 to 7")
    _check(given["sha256"], _SHA256, "64 hex digits, of the secret's SHA-256")
    for name in ("tenant", "name"):
        if name in given and not (
            given[name].value.isprintable() and len(given[name].value) <= _LONGEST_NAME
        ):
            expected = f"at most {_LONGEST_NAME} printable characters"
            raise refused(given[name].key, expected, given[name].value, source)
    return ApiKey(
        id=given["id"].value,
        tenant=given["tenant"].value,
        scopes=_scopes(given),
        expires_s=_expires_s(given),
        digest=bytes.fromhex(given["sha256"].value),
    )


def _check(given: Given, pattern: re.Pattern[str], expected: str) -> None:
    if pattern.fullmatch(given.value) is None:
        raise refused(given.key, expected, given.value, given.source)


def _scopes(given: Table) -> tuple[str, ...]:
    scopes: tuple[str, ...] = given["scopes"].value
    key, source = given["scopes"].key, given["scopes"].source
    for scope in scopes:
        if _SCOPE.fullmatch(scope) is None:
            raise refused(key, "single words, without quotes and backslashes", scope, source)
    if not any(map(is_permission, scopes)):
        # With classes alone it would be known, and refused everything.
        expected = "a permission among them: infer, infer:MODEL, metadata, admin"
        raise SettingsError(f"{key}: expected {expected}; got {', '.join(scopes) or 'none'} ({source})")
    return scopes


def _expires_s(given: Table) -> float:
    if "expires" not in given:
        return math.inf
    value = given["expires"].value
    if not isinstance(value, date):
        expected = "a date or a date with a time, without quotes: 2027-01-31T12:00:00Z"
        raise refused(given["expires"].key, expected, value, given["expires"].source)
    moment = value if isinstance(value, datetime) else datetime.combine(value, time.min)
    # Without an offset it means the same on every machine: UTC.
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()
