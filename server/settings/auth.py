"""What a caller may: `infer` (all models), `infer:MODEL`, `metadata`, `admin`.

`admin` reads statistics, metrics, the repository and the dashboard; it does not include `infer`. Whoever
may infer with a model may read that model's metadata too, for no V2 client works without it.

`[auth]` of the configuration file: who may call.

Only in the file: it is a table of tables, and secrets do not belong into flags or variables. Files are
relative to the configuration's folder. What a value must be stands in its field; what several of them
must be together is checked by `read_auth`, so that a mistake stops the start and not a caller.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from cobatch.server.settings.values import (
    Given,
    SettingsError,
    Table,
    check_table,
    fields_of,
    refused,
    values_of,
)

INFER = "infer"
METADATA = "metadata"
ADMIN = "admin"
_PERMISSION = re.compile(r"infer|infer:[A-Za-z0-9][A-Za-z0-9._-]*|metadata|admin")


def is_permission(text: str) -> bool:
    """Whether the word is one of ours."""
    return _PERMISSION.fullmatch(text) is not None


Algorithm = Literal["RS256", "PS256", "ES256", "EdDSA", "HS256"]
Text = Annotated[str, Meta(min_length=1)]
Texts = Annotated[tuple[Text, ...], Meta(min_length=1)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Seconds = Annotated[float, Meta(gt=0, le=864_000)]

# RFC 9068, 2.2: what an access token must have.
REQUIRED_CLAIMS = ("iss", "exp", "aud", "sub", "client_id", "iat", "jti")


class Issuer(msgspec.Struct, frozen=True, kw_only=True):
    """`[[auth.issuers]]`: whose tokens are taken, and the keys that they are checked with.

    Of `jwks_url`, `key_files` and `secret_file` at most one is set; where none is, the JWKS is found
    through the issuer's own metadata (RFC 8414, OpenID Connect Discovery).
    """

    issuer: Text
    name: str = ""  # short, for logs and tenants of several issuers; default: the issuer itself
    jwks_url: str = ""
    key_files: tuple[Text, ...] = ()  # PEM public keys, or JWK sets
    secret_file: str = ""  # HS256's, at least 32 bytes
    algorithms: Annotated[tuple[Algorithm, ...], Meta(min_length=1)] = ("RS256", "PS256", "ES256", "EdDSA")
    # RFC 9068, 2.1. False takes access tokens of issuers that do not set it ("JWT", or nothing).
    require_typ: bool = True
    required_claims: tuple[Text, ...] = REQUIRED_CLAIMS
    tenant_claim: Text = "sub"
    permission_claims: Texts = ("scope",)
    # Where set: what a value in those claims permits. Where not, values that are permissions are taken.
    permissions: dict[Text, Texts] = {}


class TenantRule(msgspec.Struct, frozen=True, kw_only=True):
    """`[[auth.tenants]]`: limits of one tenant, of a class of tenants, or of all others.

    The first rule that fits holds. `tenant` names one; `scope` is a value of the token's permission
    claims or an API key's scope; a rule with neither fits all.
    """

    tenant: str = ""
    scope: str = ""
    max_concurrent: Count | None = None  # requests that are accepted and not answered yet
    max_queue_rows: Count | None = None  # rows that wait for an engine, over all models
    requests_per_s: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    weight: Annotated[float, Meta(ge=0.001, le=1000)] = 1.0  # its part beside other busy tenants
    burst: Count | None = None  # requests at once, beyond the rate; default: one second's, at least 1


class ModelRule(msgspec.Struct, frozen=True, kw_only=True):
    """`[[auth.models]]`: who may call a model, beside having the permission for it."""

    model: Text
    tenants: tuple[Text, ...] = ()  # one of these
    scopes: tuple[Text, ...] = ()  # or with one of these values in the token's permission claims


class AuthSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`[auth]`. Without it everybody is anonymous, and the server listens on loopback only."""

    issuers: tuple[Issuer, ...] = ()
    tenants: tuple[TenantRule, ...] = ()
    models: tuple[ModelRule, ...] = ()
    audience: tuple[Text, ...] = ()  # one of these must be in a token's `aud`
    resource: str = ""  # this server's address for its clients, RFC 9728; default: an audience that is a URL
    api_keys_file: str = ""
    leeway_s: Annotated[float, Meta(ge=0, le=300)] = 10.0  # clocks differ
    max_token_bytes: Annotated[int, Meta(ge=256, le=65536)] = 8192
    remembered_tokens: Annotated[int, Meta(ge=0, le=10**7)] = 20_000
    jwks_refresh_s: Seconds = 300.0  # how often keys are fetched anew
    jwks_cooldown_s: Seconds = 10.0  # an unknown `kid` asks for them no more often
    jwks_stale_s: Seconds = 86_400.0  # how long keys serve on when the issuer cannot be reached
    rate_limit_headers: bool = False


_TABLES: dict[str, type[msgspec.Struct]] = {"issuers": Issuer, "tenants": TenantRule, "models": ModelRule}


def read_auth(document: object, folder: Path, source: str) -> AuthSettings:
    """`[auth]` as it stands in the file, checked. Raises SettingsError."""
    if not isinstance(document, dict):
        raise refused("auth", "a table", document, source)
    document = dict(document)
    if isinstance(document.get("audience"), str):
        document["audience"] = [document["audience"]]
    tables = {name: document.pop(name, []) for name in _TABLES}
    fields = {name: kind for name, kind in fields_of(AuthSettings).items() if name not in _TABLES}
    given = check_table("auth", document, fields, source)
    if "api_keys_file" in given:
        given["api_keys_file"] = _beside(given["api_keys_file"], folder)
    built: dict[str, Any] = values_of(given)
    for name, struct in _TABLES.items():
        built[name] = _structs(f"auth.{name}", tables[name], struct, folder, source)
    auth = AuthSettings(**built)
    _check_together(auth, source)
    return auth


def _structs(
    where: str, listed: object, struct: type[msgspec.Struct], folder: Path, source: str
) -> tuple[Any, ...]:
    if not isinstance(listed, list):
        raise refused(where, f"an array of tables, written [[{where}]]", listed, source)
    made = []
    for index, table in enumerate(listed):
        given = check_table(f"{where}[{index}]", table, fields_of(struct), source)
        needed = {"issuer": "issuers", "model": "models"}
        for key, of in needed.items():
            if where.endswith(of) and key not in given:
                raise SettingsError(f"{where}[{index}].{key}: missing ({source})")
        for key in ("key_files", "secret_file"):
            if key in given:
                given[key] = _beside(given[key], folder)
        made.append(struct(**_issuer_values(given) if struct is Issuer else values_of(given)))
    return tuple(made)


def _issuer_values(given: Table) -> dict[str, Any]:
    values = values_of(given)
    values.setdefault("name", values["issuer"])
    for key, permissions in values.get("permissions", {}).items():
        for permission in permissions:
            if not is_permission(permission):
                where = f"{given['permissions'].key}.{key}"
                expected = "permissions: infer, infer:MODEL, metadata, admin"
                raise refused(where, expected, permission, given["permissions"].source)
    return values


def _beside(given: Given, folder: Path) -> Given:
    """A file name, or several, relative to the configuration's folder."""
    value = given.value
    if isinstance(value, str):
        return given._replace(value=str(folder / value))
    return given._replace(value=tuple(str(folder / name) for name in value))


def _check_together(auth: AuthSettings, source: str) -> None:
    """What one field alone cannot say."""
    if not auth.issuers and not auth.api_keys_file:
        raise SettingsError(f"auth: needs [[auth.issuers]] or api_keys_file, or nobody could call ({source})")
    if auth.issuers and not auth.audience:
        why = "the name of this server in a token's aud, without which any token of the issuer would do"
        raise SettingsError(f"auth.audience: missing; expected {why} ({source})")
    for index, issuer in enumerate(auth.issuers):
        _check_issuer(f"auth.issuers[{index}]", issuer, source)
        for other in auth.issuers[:index]:
            if issuer.issuer == other.issuer or issuer.name == other.name:
                raise SettingsError(f"auth.issuers[{index}]: {issuer.name!r} is there twice ({source})")
    for index, rule in enumerate(auth.tenants):
        if rule.tenant and rule.scope:
            raise SettingsError(f"auth.tenants[{index}]: tenant and scope together; give one ({source})")
        if rule.tenant and len(auth.issuers) > 1 and "|" not in rule.tenant and not auth.api_keys_file:
            names = ", ".join(issuer.name for issuer in auth.issuers)
            what = "with several issuers a tenant is ISSUER'S NAME|TENANT"
            raise SettingsError(f"auth.tenants[{index}].tenant: {what}; the issuers are {names} ({source})")
        if rule.burst is not None and rule.requests_per_s is None:
            raise SettingsError(f"auth.tenants[{index}].burst: needs requests_per_s ({source})")
    for index, rule_ in enumerate(auth.models):
        if not rule_.tenants and not rule_.scopes:
            raise SettingsError(f"auth.models[{index}]: needs tenants or scopes ({source})")


def _check_issuer(where: str, issuer: Issuer, source: str) -> None:
    for key in ("issuer", "name"):
        if re.search(r"[\s|]", getattr(issuer, key)):
            # They stand before tenants and subjects, and must not run into them.
            raise refused(f"{where}.{key}", "text without spaces and |", getattr(issuer, key), source)
    ways = [name for name in ("jwks_url", "key_files", "secret_file") if getattr(issuer, name)]
    if len(ways) > 1:
        raise SettingsError(f"{where}: {' and '.join(ways)} together; give one ({source})")
    symmetric = issuer.algorithms == ("HS256",)
    if "HS256" in issuer.algorithms and not symmetric:
        # RFC 8725, 3.1: one key, one algorithm.
        raise SettingsError(f"{where}.algorithms: HS256 only alone, as algorithms = ['HS256'] ({source})")
    if symmetric != bool(issuer.secret_file):
        raise SettingsError(f"{where}: HS256 needs secret_file, and only HS256 has one ({source})")
    # Where keys come over the network, the issuer's name is where they are looked for.
    url = issuer.jwks_url or ("" if ways else issuer.issuer)
    if url and not is_safe_url(url):
        expected = "an https:// URL, or http:// on loopback"
        raise refused(f"{where}.{'jwks_url' if issuer.jwks_url else 'issuer'}", expected, url, source)


def is_safe_url(url: str) -> bool:
    """Whether keys may be fetched from there: over TLS, or from this machine."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        port_is_one = parts.port is None or parts.port > 0
    except ValueError:
        return False
    if parts.username is not None or not host or not port_is_one:
        return False
    if parts.scheme == "https":
        return True
    try:
        return parts.scheme == "http" and (host == "localhost" or ipaddress.ip_address(host).is_loopback)
    except ValueError:
        return False
