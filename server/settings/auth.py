"""`[auth]` of the configuration file: issuers, tenants, rules for models, and the permissions.

It stands in the file only: it is a table of tables, and secrets do not belong in flags or variables. File
names are relative to the file's folder. A field's type limits its value; `_check_together` checks values
against each other, so that a mistake stops the start and not a client.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from cobatch.server.settings.describe import File, Text, about, pattern
from cobatch.server.settings.values import Errors, Table, is_loopback, unexpected, values_of

# `infer` is for all models, `infer:MODEL` for one; either includes reading the model's metadata, which every
# V2 client needs. `admin` reads statistics, metrics, the repository and the dashboard; it does not include
# `infer`.
INFER = "infer"
METADATA = "metadata"
ADMIN = "admin"
_PERMISSION = re.compile(r"infer|infer:[A-Za-z0-9][A-Za-z0-9._-]*|metadata|admin")

Algorithm = Literal["RS256", "PS256", "ES256", "EdDSA", "HS256"]
# They are put in front of tenants and subjects, and must not run into them.
IssuerName = Annotated[str, pattern(r"[^\s|]+", "text without spaces and |")]
Texts = Annotated[tuple[Text, ...], Meta(min_length=1)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Rate = Annotated[float, Meta(gt=0, le=1_000_000)]
Seconds = Annotated[float, Meta(gt=0, le=864_000)]

# RFC 9068, 2.2: claims that an access token must have.
REQUIRED_CLAIMS = ("iss", "exp", "aud", "sub", "client_id", "iat", "jti")


class Issuer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[auth.issuers]]`: an issuer whose tokens are accepted, and the keys that verify them.

    At most one of `jwks_url`, `key_files` and `secret_file` is set; without any, the JWKS is found through
    the issuer's metadata (RFC 8414, OpenID Connect Discovery).
    """

    issuer: Annotated[IssuerName, about("the issuer's identifier, a token's `iss`")]
    name: Annotated[IssuerName, about("short name, for logs and tenants", default="the issuer")] = ""
    jwks_url: Annotated[str, about("address of its keys", default="found through the issuer's metadata")] = ""
    key_files: Annotated[tuple[File, ...], about("files with its keys: PEM public keys or JWK sets")] = ()
    secret_file: Annotated[File, about("file with the secret of HS256, at least 32 bytes")] = ""
    algorithms: Annotated[
        tuple[Algorithm, ...], Meta(min_length=1), about("algorithms that tokens may be signed with")
    ] = ("RS256", "PS256", "ES256", "EdDSA")
    require_typ: Annotated[bool, about("require `typ: at+jwt`, which some issuers do not set")] = True
    required_claims: Annotated[tuple[Text, ...], about("claims that a token must have")] = REQUIRED_CLAIMS
    tenant_claim: Annotated[Text, about("claim that names the tenant")] = "sub"
    permission_claims: Annotated[Texts, about("claims that hold the permissions")] = ("scope",)
    permissions: Annotated[
        dict[Text, Texts],
        about("permissions that a value of those claims grants", default="values that are permissions count"),
    ] = {}


class TenantRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[auth.tenants]]`: limits of one tenant, of a class of tenants, or of all others.

    The first rule that fits applies. A rule with neither `tenant` nor `scope` fits all.
    """

    tenant: Annotated[str, about("tenant that the rule is for")] = ""
    scope: Annotated[str, about("value of the permission claims, or of an API key's scopes")] = ""
    max_concurrent: Annotated[Count | None, about("requests accepted and not answered yet")] = None
    max_queue_rows: Annotated[Count | None, about("rows in the queues of all models")] = None
    requests_per_s: Annotated[Rate | None, about("sustained rate of requests, per second")] = None
    weight: Annotated[float, Meta(ge=0.001, le=1000), about("share beside other busy tenants")] = 1.0
    burst: Annotated[Count | None, about("requests in one burst", default="one second's")] = None


class ModelRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[[auth.models]]`: tenants that may call a model; they need the permission as well."""

    model: Annotated[Text, about("the model's name")]
    tenants: Annotated[tuple[Text, ...], about("tenants that may call it")] = ()
    scopes: Annotated[tuple[Text, ...], about("values of the permission claims that may call it")] = ()


class AuthSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[auth]`. Without it every client is anonymous, and the server listens on loopback only."""

    issuers: Annotated[tuple[Issuer, ...], about("accepted issuers, as `[[auth.issuers]]`")] = ()
    tenants: Annotated[tuple[TenantRule, ...], about("limits of tenants, as `[[auth.tenants]]`")] = ()
    models: Annotated[tuple[ModelRule, ...], about("access to a model, as `[[auth.models]]`")] = ()
    audience: Annotated[
        tuple[Text, ...],
        Meta(extra={"separator": ""}),
        about("names of this server, or one as text; a token's `aud` must have one of them"),
    ] = ()
    resource: Annotated[str, about("address for clients (RFC 9728)", default="a URL in `audience`")] = ""
    api_keys_file: Annotated[File, about("file of API keys")] = ""
    leeway_s: Annotated[float, Meta(ge=0, le=300), about("allowed difference between clocks")] = 10.0
    max_token_bytes: Annotated[int, Meta(ge=256, le=65536), about("largest token")] = 8192
    remembered_tokens: Annotated[int, Meta(ge=0, le=10**7), about("verified tokens to remember")] = 20_000
    jwks_refresh_s: Annotated[Seconds, about("time between fetches of an issuer's keys")] = 300.0
    jwks_cooldown_s: Annotated[Seconds, about("shortest time between fetches for an unknown `kid`")] = 10.0
    jwks_stale_s: Annotated[Seconds, about("time to use keys whose issuer is unreachable")] = 86_400.0
    rate_limit_headers: Annotated[bool, about("send RateLimit headers")] = False


def is_permission(text: str) -> bool:
    """Return True if the word is a permission."""
    return _PERMISSION.fullmatch(text) is not None


def build_auth(table: Table, source: str, errors: Errors) -> AuthSettings:
    """Build `[auth]` from its values, and check them against each other; refusals go to `errors`."""
    for issuer in table["issuers"].value if "issuers" in table else ():
        issuer.setdefault("name", issuer["issuer"])
    auth = msgspec.convert(values_of(table), AuthSettings)
    if not errors.under("auth"):
        errors += [f"{message} ({source})" for message in _conflicts(auth)]
    return auth


def _conflicts(auth: AuthSettings) -> Iterator[str]:
    """Yield the conflicts between fields."""
    if not auth.issuers and not auth.api_keys_file:
        yield "auth: needs [[auth.issuers]] or api_keys_file, or no client could call"
    if auth.issuers and not auth.audience:
        why = "the name of this server in a token's aud; without it any token of the issuer would do"
        yield f"auth.audience: missing; expected {why}"
    if (url := server_url(auth)) and not _origin(url):
        key = "resource" if auth.resource else "audience"
        yield unexpected(f"auth.{key}", "an http:// or https:// address", url)
    for index, issuer in enumerate(auth.issuers):
        yield from _issuer_conflicts(f"auth.issuers[{index}]", issuer)
        for other in auth.issuers[:index]:
            if issuer.issuer == other.issuer or issuer.name == other.name:
                yield f"auth.issuers[{index}]: {issuer.name!r} is there twice"
    for index, rule in enumerate(auth.tenants):
        yield from _tenant_conflicts(f"auth.tenants[{index}]", rule, auth)
    for index, rule_ in enumerate(auth.models):
        if not rule_.tenants and not rule_.scopes:
            yield f"auth.models[{index}]: needs tenants or scopes"


def _tenant_conflicts(where: str, rule: TenantRule, auth: AuthSettings) -> Iterator[str]:
    if rule.tenant and rule.scope:
        yield f"{where}: tenant and scope together; give one"
    if rule.tenant and len(auth.issuers) > 1 and "|" not in rule.tenant and not auth.api_keys_file:
        names = ", ".join(issuer.name for issuer in auth.issuers)
        form = "with several issuers a tenant is ISSUER'S NAME|TENANT"
        yield f"{where}.tenant: {form}; the issuers are {names}"
    if rule.burst is not None and rule.requests_per_s is None:
        yield f"{where}.burst: needs requests_per_s"


def _issuer_conflicts(where: str, issuer: Issuer) -> Iterator[str]:
    for claim, permissions in issuer.permissions.items():
        for permission in permissions:
            if not is_permission(permission):
                expected = "permissions: infer, infer:MODEL, metadata, admin"
                yield unexpected(f"{where}.permissions.{claim}", expected, permission)
    sources = [name for name in ("jwks_url", "key_files", "secret_file") if getattr(issuer, name)]
    if len(sources) > 1:
        yield f"{where}: {' and '.join(sources)} together; give one"
    symmetric = issuer.algorithms == ("HS256",)
    if "HS256" in issuer.algorithms and not symmetric:
        # RFC 8725, 3.1: one key, one algorithm.
        yield f"{where}.algorithms: HS256 only alone, as algorithms = ['HS256']"
    elif len(sources) < 2 and symmetric != bool(issuer.secret_file):
        yield f"{where}: HS256 needs secret_file, and only HS256 has one"
    # Without a source of keys, they are looked for at the issuer's own address.
    url = issuer.jwks_url or ("" if sources else issuer.issuer)
    if url and not is_safe_url(url):
        key = "jwks_url" if issuer.jwks_url else "issuer"
        yield unexpected(f"{where}.{key}", "an https:// URL, or http:// on loopback", url)


def server_url(auth: AuthSettings) -> str:
    """Return the address of this server for clients, "" if it has none."""
    urls = (name for name in auth.audience if name.startswith(("https://", "http://")))
    return auth.resource or next(urls, "")


def is_safe_url(url: str) -> bool:
    """Return True if keys may be fetched from there: over TLS, or from this machine."""
    scheme, host = _origin(url) or ("", "")
    return scheme == "https" or (scheme == "http" and is_loopback(host))


def _origin(url: str) -> tuple[str, str] | None:
    """Return scheme and host of an HTTP address without credentials; None for any other text."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        usable = parts.username is None and host != "" and parts.port != 0
    except ValueError:
        return None
    return (parts.scheme, host) if usable and parts.scheme in ("http", "https") else None
