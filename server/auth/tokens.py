"""Validation of access tokens: RFC 7519, RFC 8725, RFC 9068.

Cheap checks come first, so a signature is checked only for a token that is good otherwise. Nothing in a token
chooses how it is checked: the algorithm belongs to the key, the key to the issuer, and `jku`, `x5u`, `jwk`,
`x5c` are ignored. Any token leads to claims or to a TokenError. PyJWT checks signatures; claims are checked
here, with a given clock and strict types (PyJWT accepts `exp` as text or as true).
"""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jwt

from cobatch.server.auth.credentials import header_and_claims
from cobatch.server.auth.jwks import KeySource
from cobatch.server.auth.keys import MAX_KID, Key
from cobatch.server.auth.principal import MAX_NAME, is_name
from cobatch.server.auth.throttle import Clock
from cobatch.server.settings.auth import AuthSettings, Issuer

_ACCESS_TOKEN = frozenset({"at+jwt", "application/at+jwt"})
# The types of issuers that predate RFC 9068. Types of other tokens (logout+jwt, secevent+jwt) stay refused,
# since they exist to prevent this confusion (RFC 8725, 3.11).
_UNTYPED = frozenset({"", "jwt", "application/jwt"})
_ID_TOKEN_CLAIMS = ("nonce", "at_hash", "c_hash")  # OpenID Connect Core, 2 and 3.3.2.11
_REFUSED_MEMBERS = {
    "crit": "crit, and no extension is supported",  # RFC 7515, 4.1.11
    "b64": "b64 (RFC 7797), which is not supported",
    "cty": "cty: nested tokens are not supported",
}
_TIMES = ("exp", "nbf", "iat")
_TEXTS = ("iss", "sub", "client_id", "jti")
_MAX_TIME_S = 2**53  # a float represents every second up to here exactly
_JWS = jwt.PyJWS(
    ["RS256", "PS256", "ES256", "EdDSA", "HS256"],
    {"verify_signature": True, "enforce_minimum_key_length": True},
)


class TokenError(Exception):
    """A refused token. `detail` is for the client and quotes nothing of the token.

    `permanent`: the token cannot become valid later. `forged`: its signature was checked and is wrong.
    """

    def __init__(self, detail: str, *, permanent: bool = True, forged: bool = False) -> None:
        super().__init__(detail)
        self.detail = detail
        self.permanent = permanent
        self.forged = forged


class VerifiedToken(NamedTuple):
    """A valid token's claims. `expires_s`: seconds since the epoch, leeway included."""

    claims: dict[str, Any]
    issuer: Issuer
    key: Key
    expires_s: float


class TokenVerifier:
    """Verifies tokens with `keys`, by issuer. `clock` is the wall clock, in seconds."""

    def __init__(self, auth: AuthSettings, keys: Mapping[str, KeySource], clock: Clock = time.time) -> None:
        self._auth = auth
        self._keys = keys
        self._clock = clock
        self._issuers = {issuer.issuer: issuer for issuer in auth.issuers}
        self._audience = frozenset(auth.audience)

    async def verify(self, token: str, before_check: Callable[[], None] = lambda: None) -> VerifiedToken:
        """Return the token's claims. `before_check` runs right before the signature check.

        Raises TokenError, KeysUnavailableError, and the exceptions of `before_check`.
        """
        if len(token) > self._auth.max_token_bytes:
            raise TokenError(f"the token has more than {self._auth.max_token_bytes} bytes")
        try:
            header, claims = header_and_claims(token)
        except ValueError as error:
            raise TokenError(str(error)) from None
        _check_header(header)
        name = claims.get("iss")
        # RFC 9068, 4: the name equals `iss` exactly.
        issuer = self._issuers.get(name) if isinstance(name, str) else None
        if issuer is None:
            raise TokenError("the token's iss is not a trusted issuer")
        algorithm = header["alg"]
        if algorithm not in issuer.algorithms:
            raise TokenError("the token's alg is not accepted from its issuer")
        _check_type(header, claims, issuer)
        self._check_claims(claims, issuer)
        expires_s = self._check_times(claims)
        key = await self._keys[issuer.issuer].find(header.get("kid"), algorithm)
        if key is None or key.algorithm != algorithm:
            # Not permanent: the key may appear with the next fetch.
            raise TokenError("the issuer has no key with the token's kid and alg", permanent=False)
        self._check_times(claims)  # again, since fetching the keys may have taken long
        before_check()
        _check_signature(token, key)
        return VerifiedToken(claims, issuer, key, expires_s)

    def _check_claims(self, claims: dict[str, Any], issuer: Issuer) -> None:
        """Check all claims except times. RFC 9068, 2.2 and 4; RFC 7519, 4.1."""
        for name in issuer.required_claims:
            if claim_at(claims, name) is None:
                raise TokenError(f"the token has no {name}")
        for name in _TEXTS:
            if name in claims and not isinstance(claims[name], str):
                raise TokenError(f"the token's {name} is not text")
        audience = claims.get("aud")
        names = [audience] if isinstance(audience, str) else audience
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TokenError("the token's aud is neither text nor a list of texts")
        if self._audience.isdisjoint(names):
            raise TokenError("the token's aud is not this server")
        for name in (issuer.tenant_claim, *(["sub"] if "sub" in claims else [])):
            if not is_name(claim_at(claims, name)):
                raise TokenError(f"the token's {name} is not 1 to {MAX_NAME} printable characters")

    def _check_times(self, claims: dict[str, Any]) -> float:
        """Check RFC 7519, 4.1.4 to 4.1.6, with leeway; return the time at which the token expires."""
        for name in _TIMES:
            # A bool is an int, but not a time.
            value = claims.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MAX_TIME_S:
                raise TokenError(f"the token's {name} is not a time in seconds")
        if "exp" not in claims:
            raise TokenError("the token has no exp")
        now_s, leeway_s = self._clock(), self._auth.leeway_s
        expires_s = float(claims["exp"]) + leeway_s
        if expires_s <= now_s:
            # Not permanent: a clock that was ahead may be set back.
            raise TokenError("the token has expired", permanent=False)
        for name in ("nbf", "iat"):
            if claims.get(name, 0) > now_s + leeway_s:
                raise TokenError(f"the token is not valid yet: its {name} is in the future", permanent=False)
        return expires_s


def claim_at(claims: Mapping[str, Any], name: str) -> Any:
    """Return a claim by its name, or by a dotted path into nested objects; None if absent."""
    if name in claims:
        return claims[name]
    value: Any = claims
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _check_header(header: dict[str, Any]) -> None:
    if not isinstance(header.get("alg"), str):
        raise TokenError("the token's header has no alg")
    for name, refusal in _REFUSED_MEMBERS.items():
        if name in header:
            raise TokenError(f"the token's header has {refusal}")
    if "kid" in header and not (isinstance(header["kid"], str) and len(header["kid"]) <= MAX_KID):
        raise TokenError(f"the token's kid is not a text of at most {MAX_KID} characters")


def _check_type(header: dict[str, Any], claims: dict[str, Any], issuer: Issuer) -> None:
    """Accept access tokens (RFC 9068, 4) and no other token of the issuer (RFC 8725, 3.11 and 3.12)."""
    kind = header.get("typ", "")
    kind = kind.lower() if isinstance(kind, str) else "?"
    if kind in _ACCESS_TOKEN:
        return
    if issuer.require_typ:
        raise TokenError("the token's typ is not at+jwt: not an access token")
    if kind not in _UNTYPED:
        raise TokenError("the token's typ is of another kind of token, not of an access token")
    # Keycloak and Cognito write the kind of token into these claims.
    kinds = claims.get("typ", "Bearer"), claims.get("token_use", "access")
    if kinds[0] in ("ID", "Refresh", "Offline", "Logout") or kinds[1] != "access":
        raise TokenError("the token is not an access token")
    if any(name in claims for name in _ID_TOKEN_CLAIMS):
        raise TokenError("the token is an ID token, not an access token")


def _check_signature(token: str, key: Key) -> None:
    try:
        _JWS.decode(token, key.material, [key.algorithm])
    except jwt.InvalidSignatureError:
        raise TokenError("the token's signature is wrong", forged=True) from None
    except jwt.PyJWTError:
        raise TokenError("the token cannot be checked") from None
