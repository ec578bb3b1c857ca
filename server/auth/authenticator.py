"""From a credential to a principal: verified once, then cached.

A signature check costs more than all other work on a small request, so its result is cached by the SHA-256
of the token: a principal until the token expires or its key is withdrawn, a permanent refusal for a minute.
Both caches are bounded and drop their oldest entry. API keys cost one hash and are looked up each time.

The time of a lookup leaks nothing, since the digest of an unknown token cannot be approached byte by byte.
No token is stored here; the fast path does keep the bytes of recent header blocks (edge/header_cache.py).
"""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakSet

from cobatch.server.auth.api_keys import ApiKeys
from cobatch.server.auth.credentials import Challenges, Credential, Headers, bearer_token, credential_in
from cobatch.server.auth.jwks import FetchedKeys, KeySource, KeysUnavailableError, StaticKeys
from cobatch.server.auth.keys import Key, configured_keys
from cobatch.server.auth.principal import Principal
from cobatch.server.auth.tenants import Tenants
from cobatch.server.auth.throttle import Clock, SignatureThrottle
from cobatch.server.auth.tokens import TokenError, TokenVerifier, VerifiedToken, claim_at
from cobatch.server.http.problem import Problem
from cobatch.server.settings.auth import AuthSettings, Issuer, is_permission, server_url

# The outcomes of authentication, as the metric labels them.
RESULTS = (
    *("verified", "remembered", "key"),
    *("missing", "invalid", "forged", "refused-again", "unknown-key", "throttled", "keys-unavailable"),
)
_REFUSAL_TTL_S = 60.0
_MAX_REFUSALS = 4096


class Authenticator:
    """Authenticates the requests of one process. Reads key files when created; raises SettingsError.

    `wall_clock` is compared with the times in tokens, `clock` is monotonic; both in seconds.
    """

    def __init__(
        self, settings: AuthSettings, *, wall_clock: Clock = time.time, clock: Clock = time.monotonic
    ) -> None:
        self.settings = settings
        self.challenges = Challenges(server_url(settings))
        self.tenants = Tenants(settings.tenants, clock)
        self.throttle = SignatureThrottle(clock)
        self._clock = clock
        self._now = wall_clock
        self._rules = {rule.model: rule for rule in settings.models}
        model_scopes = [scope for rule in settings.models for scope in rule.scopes]
        self._named_scopes = {rule.scope for rule in settings.tenants}.union(model_scopes)
        self._keys: dict[str, KeySource] = {}
        for issuer in settings.issuers:
            keys = configured_keys(issuer)
            self._keys[issuer.issuer] = (
                StaticKeys(keys, issuer.name, self._withdraw)
                if keys
                else FetchedKeys(issuer, settings, self._withdraw)
            )
        self._fetched = [source for source in self._keys.values() if isinstance(source, FetchedKeys)]
        self._verifier = TokenVerifier(settings, self._keys, wall_clock)
        keys_file = settings.api_keys_file
        self._api_keys = ApiKeys.read(Path(keys_file)) if keys_file else ApiKeys({})
        self._api_key_principals: dict[str, Principal] = {}  # by the key's ID
        self._cache: dict[bytes, Principal] = {}
        self._refusals: dict[bytes, tuple[str, float]] = {}  # detail, and the end of its time to live
        self._principals_by_key: dict[Key, WeakSet[Principal]] = {}
        # Header blocks in the fast path's cache are not counted again.
        self.results: Counter[str] = Counter(dict.fromkeys(RESULTS, 0))

    async def start(self, on_ready: Callable[[], None]) -> None:
        """Start to fetch keys, without waiting for them. Call `on_ready` when an issuer's keys arrive."""
        for source in self._fetched:
            await source.start(on_ready)

    async def stop(self) -> None:
        for source in self._fetched:
            await source.stop()

    @property
    def ready(self) -> bool:
        """True once any credential can be checked."""
        return bool(self.settings.api_keys_file) or any(source.ready for source in self._keys.values())

    def reloads(self) -> dict[str, Callable[[], Awaitable[None]]]:
        """Return functions that read files of keys again, by a name for the log.

        Each raises SettingsError, and keeps the old keys. Principals of keys that are gone or changed expire.
        """
        reloads: dict[str, Callable[[], Awaitable[None]]] = {
            f"keys of issuer {issuer.name}": partial(self._reload_issuer, issuer)
            for issuer in self.settings.issuers
            if issuer.key_files or issuer.secret_file
        }
        return reloads | ({"API keys": self._reload_api_keys} if self.settings.api_keys_file else {})

    async def _reload_issuer(self, issuer: Issuer) -> None:
        self._keys[issuer.issuer].replace(await asyncio.to_thread(configured_keys, issuer))

    async def _reload_api_keys(self) -> None:
        fresh = await asyncio.to_thread(ApiKeys.read, Path(self.settings.api_keys_file))
        for key_id, principal in list(self._api_key_principals.items()):
            if fresh.get(key_id) != self._api_keys.get(key_id):
                principal.expires_s = 0.0
                del self._api_key_principals[key_id]
        self._api_keys = fresh

    def lookup(self, headers: Headers) -> Principal | Problem | None:
        """Return the result for a request without a query; None if `authenticate` has to check a token."""
        try:
            return self._lookup(credential_in(headers, b"", self.challenges))
        except Problem as problem:
            return problem.with_traceback(None)  # its frames refer to the connection, which keeps the problem

    def _lookup(self, credential: Credential | None) -> Principal | Problem | None:
        if credential is None:
            self.results["missing"] += 1
            return self.challenges.missing()
        if credential.is_key:
            return self._by_api_key(credential.value)
        digest = _token_digest(credential)
        principal = self._cache.get(digest)
        if principal is not None:
            if principal.expires_s > self._now():
                self.results["remembered"] += 1
                return principal
            del self._cache[digest]
        refusal = self._refusals.get(digest)
        if refusal is not None and refusal[1] > self._clock():
            self.results["refused-again"] += 1
            return self.challenges.problem("invalid-credentials", refusal[0])
        return None

    async def authenticate(self, headers: Headers, query: bytes, address: str) -> Principal:
        """Return the principal of a request. Raises Problem, and charges `address` for a forged token."""
        credential = credential_in(headers, query, self.challenges)
        known = self._lookup(credential)
        if isinstance(known, Principal):
            return known
        if known is not None:
            try:
                raise known
            finally:
                del known  # it refers to this frame
        assert credential is not None
        verified = await self._verify(credential, address)
        principal = self._token_principal(verified)
        self._principals_by_key.setdefault(verified.key, WeakSet()).add(principal)
        _store(self._cache, _token_digest(credential), principal, self.settings.remembered_tokens)
        return principal

    async def _verify(self, credential: Credential, address: str) -> VerifiedToken:
        try:
            token = bearer_token(credential.value, self.challenges)
        except Problem:
            self.results["invalid"] += 1
            raise
        try:
            verified = await self._verifier.verify(token, lambda: self._check_throttle(address))
        except TokenError as error:
            self.results["forged" if error.forged else "invalid"] += 1
            if error.forged:
                self.throttle.charge(address)
            if error.permanent:
                refusal = error.detail, self._clock() + _REFUSAL_TTL_S
                _store(self._refusals, _token_digest(credential), refusal, _MAX_REFUSALS)
            raise self.challenges.problem("invalid-credentials", error.detail) from None
        except KeysUnavailableError as error:
            self.results["keys-unavailable"] += 1
            raise Problem("keys-unavailable", str(error), retry_after_s=error.retry_after_s) from None
        self.results["verified"] += 1
        return verified

    def _check_throttle(self, address: str) -> None:
        wait_s = self.throttle.wait_s(address)
        if wait_s > 0:
            self.results["throttled"] += 1
            detail = "too many tokens from this address had a wrong signature"
            raise Problem("too-many-bad-tokens", detail, retry_after_s=wait_s)

    def _by_api_key(self, presented: bytes) -> Principal | Problem:
        key = self._api_keys.find(presented.decode("latin-1"), self._now())
        self.results["unknown-key" if key is None else "key"] += 1
        if key is None:
            return self.challenges.problem("invalid-credentials", "the API key is unknown or expired")
        principal = self._api_key_principals.get(key.id)
        if principal is None:
            values = frozenset(key.scopes)
            tenant = self.tenants.of(key.tenant, values)
            permissions = frozenset(filter(is_permission, values))
            principal = Principal(tenant, f"key {key.id}", permissions, key.expires_s, self._rules, values)
            self._api_key_principals[key.id] = principal
        return principal

    def _token_principal(self, token: VerifiedToken) -> Principal:
        claims, issuer = token.claims, token.issuer
        # Scopes meant for other services are dropped: a token may carry hundreds.
        values = frozenset(
            value
            for value in _claim_values(claims, issuer.permission_claims)
            if value in issuer.permissions or value in self._named_scopes or is_permission(value)
        )
        if issuer.permissions:
            permissions = frozenset(p for value in values for p in issuer.permissions.get(value, ()))
        else:
            permissions = frozenset(filter(is_permission, values))
        tenant = claim_at(claims, issuer.tenant_claim)
        if len(self._keys) > 1:
            # Two issuers may each have a "bob". An issuer's name contains no "|", so the pair is unambiguous.
            tenant = f"{issuer.name}|{tenant}"
        # The prefix keeps a token without sub apart from a sub that equals its tenant.
        subject = f"token {issuer.issuer} {'sub ' + claims['sub'] if 'sub' in claims else 'tenant ' + tenant}"
        account = self.tenants.of(tenant, values)
        return Principal(account, subject, permissions, token.expires_s, self._rules, values)

    def _withdraw(self, key: Key) -> None:
        """Expire all principals whose tokens this key signed; its issuer no longer publishes it.

        Another key may be there under its name, so tokens with a wrong signature are checked again.
        """
        self._refusals.clear()
        for principal in self._principals_by_key.pop(key, ()):
            principal.expires_s = 0.0


def _claim_values(claims: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    """Return the words of text claims (RFC 6749, 3.3) and the texts of list claims."""
    values: list[str] = []
    for claim in (claim_at(claims, name) for name in names):
        items = claim.split() if isinstance(claim, str) else claim if isinstance(claim, list) else ()
        values += [item for item in items if isinstance(item, str)]
    return values


def _token_digest(credential: Credential) -> bytes:
    """Hash the token without its scheme, so that all spellings of `Bearer` share one cache entry."""
    value = credential.value
    if value[:7] != b"Bearer " or value[7:8] == b" " or value[-1:] == b" ":
        scheme, _, token = value.strip().partition(b" ")
        if scheme.lower() != b"bearer":
            return hashlib.sha256(b"other " + value).digest()
        return hashlib.sha256(token.strip()).digest()
    return hashlib.sha256(value[7:]).digest()


def _store(cache: dict[bytes, Any], digest: bytes, value: Any, limit: int) -> None:
    """Add an entry and drop the oldest one where the cache is full; with limit 0 nothing is stored."""
    if len(cache) >= limit > 0:
        del cache[next(iter(cache))]
    if limit:
        cache[digest] = value
