"""Is this a token of one of our issuers, for us, and valid now? RFC 7519, RFC 8725, RFC 9068.

All that is cheap comes first, so that a signature is checked only of a token that would otherwise be
good. Nothing in a token chooses how it is checked: the algorithm is the key's, the key is one of the
issuer's, and `jku`, `x5u`, `jwk`, `x5c` are not looked at. Whatever was written into a token, what comes
of it is claims or a TokenError. PyJWT checks signatures; claims are checked here, where the clock can be
given and types are held to (PyJWT takes `exp` as text or as true).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jwt

from cobatch.server.auth.credentials import header_and_claims
from cobatch.server.auth.jwks import FetchedKeys, StaticKeys
from cobatch.server.auth.keys import MAX_KID, Key
from cobatch.server.settings.auth import AuthSettings, Issuer

_ACCESS_TOKEN = frozenset({"at+jwt", "application/at+jwt"})
# What issuers write that do not know RFC 9068. Not just anything: the types of other kinds of token
# (logout+jwt, secevent+jwt) are there to keep them from being taken for this one (RFC 8725, 3.11).
_UNTYPED = frozenset({"", "jwt", "application/jwt"})
_ID_TOKEN_CLAIMS = ("nonce", "at_hash", "c_hash")  # OpenID Connect Core, 2 and 3.3.2.11
_TIMES = ("exp", "nbf", "iat")
_TEXTS = ("iss", "sub", "client_id", "jti")
_LATEST = 2**53  # beyond it a float is no exact second any more
_MAX_NAME = 256
_JWS = jwt.PyJWS(
    ["RS256", "PS256", "ES256", "EdDSA", "HS256"],
    {"verify_signature": True, "enforce_minimum_key_length": True},
)


class TokenError(Exception):
    """The token is refused. `detail` is for the caller and quotes nothing of the token.

    `remember`: it will not become good later. `forged`: a signature was checked, at its cost, and is wrong.
    """

    def __init__(self, detail: str, *, remember: bool = True, forged: bool = False) -> None:
        super().__init__(detail)
        self.detail = detail
        self.remember = remember
        self.forged = forged


class Verified(NamedTuple):
    """A good token's claims. `expires_s`: since the epoch, leeway included."""

    claims: dict[str, Any]
    issuer: Issuer
    key: Key
    expires_s: float


class TokenVerifier:
    """`keys` has each issuer's by its `iss`; `clock` is the wall clock, which tokens' times are in."""

    def __init__(
        self,
        auth: AuthSettings,
        keys: Mapping[str, StaticKeys | FetchedKeys],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._auth = auth
        self._keys = keys
        self._clock = clock
        self._issuers = {issuer.issuer: issuer for issuer in auth.issuers}
        self._audience = frozenset(auth.audience)

    async def verify(self, token: str, may_check: Callable[[], None] = lambda: None) -> Verified:
        """The token's claims. `may_check` is called right before a signature is checked, and may raise.

        Raises TokenError, KeysUnavailableError, and what `may_check` raises.
        """
        if len(token) > self._auth.max_token_bytes:
            raise TokenError(f"the token has more than {self._auth.max_token_bytes} bytes")
        try:
            header, claims = header_and_claims(token)
        except ValueError as error:
            raise TokenError(str(error)) from None
        _check_header(header)
        issuer = self._issuer_of(claims)
        algorithm = header["alg"]
        if algorithm not in issuer.algorithms:
            raise TokenError("the token's alg is not one that is taken from its issuer")
        _check_type(header, claims, issuer)
        self._check_claims(claims, issuer)
        expires_s = self._check_times(claims)
        kid = header.get("kid")
        key = await self._keys[issuer.issuer].find(kid, algorithm)
        if key is None or key.algorithm != algorithm:
            # Later there may be one: a new key is noticed when the cool-down is over.
            raise TokenError("the issuer has no key with the token's kid and alg", remember=False)
        self._check_times(claims)  # once more: the keys may have been long in coming
        may_check()
        _check_signature(token, key)
        return Verified(claims, issuer, key, expires_s)

    def _issuer_of(self, claims: dict[str, Any]) -> Issuer:
        """RFC 9068, 4: `iss` must be an issuer's name exactly."""
        name = claims.get("iss")
        issuer = self._issuers.get(name) if isinstance(name, str) else None
        if issuer is None:
            raise TokenError("the token's iss is not an issuer that is trusted here")
        return issuer

    def _check_claims(self, claims: dict[str, Any], issuer: Issuer) -> None:
        """All but times. RFC 9068, 2.2 and 4; RFC 7519, 4.1."""
        for name in issuer.required_claims:
            if claim_at(claims, name) is None:
                raise TokenError(f"the token has no {name}")
        for name in _TEXTS:
            if name in claims and not isinstance(claims[name], str):
                raise TokenError(f"the token's {name} is not text")
        audience = claims.get("aud")
        named = [audience] if isinstance(audience, str) else audience
        if not isinstance(named, list) or not all(isinstance(one, str) for one in named):
            raise TokenError("the token's aud is neither text nor a list of texts")
        if self._audience.isdisjoint(named):
            raise TokenError("the token's aud is not this server")
        for name in (issuer.tenant_claim, *(["sub"] if "sub" in claims else [])):
            if not _is_name(claim_at(claims, name)):
                raise TokenError(f"the token's {name} is not 1 to {_MAX_NAME} printable characters")

    def _check_times(self, claims: dict[str, Any]) -> float:
        """RFC 7519, 4.1.4 to 4.1.6, with leeway. A token without an end is refused; gives that end."""
        for name in _TIMES:
            value = claims.get(name)
            # Of JSON's numbers Python makes int, float and, for true, a bool, which is an int.
            if name in claims and (
                isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > _LATEST
            ):
                raise TokenError(f"the token's {name} is not a time in seconds")
        if "exp" not in claims:
            raise TokenError("the token has no exp")
        now_s, leeway_s = self._clock(), self._auth.leeway_s
        expires_s = float(claims["exp"]) + leeway_s
        if expires_s <= now_s:
            raise TokenError("the token has expired")
        for name in ("nbf", "iat"):
            if claims.get(name, 0) > now_s + leeway_s:
                raise TokenError(f"the token is not valid yet: its {name} is in the future", remember=False)
        return expires_s


def claim_at(claims: Mapping[str, Any], name: str) -> Any:
    """A claim by its name, or by a path with dots into claims that are objects; None if it is not there."""
    if name in claims:
        return claims[name]
    found: Any = claims
    for part in name.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def _is_name(value: object) -> bool:
    """Fit for logs and metrics: no control characters, no invisible ones, no halves of surrogates."""
    return isinstance(value, str) and 0 < len(value) <= _MAX_NAME and value.isprintable()


def _check_header(header: dict[str, Any]) -> None:
    if not isinstance(header.get("alg"), str):
        raise TokenError("the token's header has no alg")
    if "crit" in header:
        # RFC 7515, 4.1.11: we understand no extension, so none may be critical.
        raise TokenError("the token's header has crit, and no extension is supported")
    if "b64" in header:
        raise TokenError("the token's header has b64 (RFC 7797), which is not supported")
    if "cty" in header:
        raise TokenError("the token's header has cty: nested tokens are not taken")
    if "kid" in header and not (isinstance(header["kid"], str) and len(header["kid"]) <= MAX_KID):
        raise TokenError(f"the token's kid is not a text of at most {MAX_KID} characters")


def _check_type(header: dict[str, Any], claims: dict[str, Any], issuer: Issuer) -> None:
    """RFC 9068, 4: an access token; RFC 8725, 3.11 and 3.12: and nothing else of the same issuer."""
    kind = header.get("typ", "")
    kind = kind.lower() if isinstance(kind, str) else "?"
    if kind in _ACCESS_TOKEN:
        return
    if issuer.require_typ:
        raise TokenError("the token's typ is not at+jwt: not an access token")
    if kind not in _UNTYPED:
        raise TokenError("the token's typ is of another kind of token, not of an access token")
    # Claims of the same name in Keycloak's and Cognito's tokens say what kind of token they are.
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
