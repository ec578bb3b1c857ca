"""From a credential to a principal: remembered, or verified and then remembered.

To check a signature costs more than all other work on a small request, so what came of a token is
remembered by a digest of the header that brought it: a principal until the token expires or its key is
withdrawn, a refusal that time will not mend for a minute. Both are bounded in number, the oldest goes
first. API keys are looked up each time, since that costs a digest only.

The digest, not the token, is the key here. (The fast path does keep the bytes of recent header blocks,
tokens included, in this process's memory: server/edge/fast_path.py.) A look-up's time tells nothing, since
SHA-256 of what one does not know cannot be approached byte by byte.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakSet

from cobatch.server.auth.api_keys import ApiKeys
from cobatch.server.auth.challenges import Challenges
from cobatch.server.auth.credentials import Credential, token_of
from cobatch.server.auth.jwks import FetchedKeys, KeysUnavailableError, StaticKeys
from cobatch.server.auth.keys import Key, load_key_files, load_secret
from cobatch.server.auth.principal import Principal
from cobatch.server.auth.tenants import Tenants
from cobatch.server.auth.throttle import Failures
from cobatch.server.auth.tokens import TokenError, TokenVerifier, Verified, claim_at
from cobatch.server.http.problem import Problem
from cobatch.server.settings.auth import AuthSettings, Issuer, is_permission

# What comes of a credential that is looked at: who it is, from memory or not, or why nobody.
RESULTS = (
    *("verified", "remembered", "key"),
    *("missing", "invalid", "forged", "refused-again", "unknown-key", "throttled", "keys-unavailable"),
)
_REFUSED_S = 60.0
_REFUSALS = 4096
KeySource = StaticKeys | FetchedKeys


class Authenticator:
    """Of one process. Reads key files when it is made: raises SettingsError.

    `wall_clock` is `time.time`, which tokens' times are in.
    """

    def __init__(
        self,
        settings: AuthSettings,
        *,
        wall_clock: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self.challenges = Challenges(resource_of(settings))
        self.tenants = Tenants(settings.tenants, clock)
        self.failures = Failures(clock)
        self._clock = clock
        self._now = wall_clock
        self._rules = {rule.model: rule for rule in settings.models}
        self._named_scopes = {rule.scope for rule in settings.tenants}
        self._named_scopes.update(scope for rule in settings.models for scope in rule.scopes)
        self._keys: dict[str, KeySource] = {one.issuer: self._source(one) for one in settings.issuers}
        self._verifier = TokenVerifier(settings, self._keys, wall_clock)
        self._api_keys = ApiKeys.read(Path(settings.api_keys_file)) if settings.api_keys_file else None
        self._remembered: dict[bytes, Principal] = {}
        self._of_api_key: dict[str, Principal] = {}
        self._refused: dict[bytes, tuple[str, float]] = {}  # why, and until when
        self._vouched: dict[Key, WeakSet[Principal]] = {}
        # How often credentials were looked at, by what came of it. The fast path does not ask again for
        # header blocks that it knows.
        self.results: Counter[str] = Counter(dict.fromkeys(RESULTS, 0))
        self.on_ready: Callable[[], None] = lambda: None  # called when an issuer's keys are there

    def _source(self, issuer: Issuer) -> KeySource:
        if issuer.secret_file:
            return StaticKeys([load_secret(Path(issuer.secret_file))])
        if issuer.key_files:
            return StaticKeys(load_key_files([Path(name) for name in issuer.key_files], issuer.algorithms))
        return FetchedKeys(issuer, self.settings, self._withdraw, on_ready=self._tell_ready)

    def _tell_ready(self) -> None:
        self.on_ready()

    async def start(self) -> None:
        """Begin to fetch keys; does not wait for them."""
        for source in self._keys.values():
            await source.start()

    async def stop(self) -> None:
        """End the fetching."""
        for source in self._keys.values():
            await source.stop()

    @property
    def ready(self) -> bool:
        """Whether anybody's credentials could be checked."""
        return self._api_keys is not None or any(source.ready for source in self._keys.values())

    def recall(self, credential: Credential | None) -> Principal | Problem | None:
        """What is known without checking a signature; None: ask `authenticate`."""
        if credential is None:
            self.results["missing"] += 1
            return self.challenges.missing()
        if credential.is_key:
            return self._by_api_key(credential.value)
        digest = _digest(credential)
        principal = self._remembered.get(digest)
        if principal is not None:
            if principal.expires_s > self._now():
                self.results["remembered"] += 1
                return principal
            del self._remembered[digest]
        refused = self._refused.get(digest)
        if refused is not None and refused[1] > self._clock():
            self.results["refused-again"] += 1
            return self.challenges.invalid_token(refused[0])
        return None

    async def authenticate(self, credential: Credential | None, address: str) -> Principal:
        """Who this is. `address` is the client's, which pays for forged tokens. Raises Problem."""
        known = self.recall(credential)
        if isinstance(known, Principal):
            return known
        if known is not None:
            raise known
        assert credential is not None
        token = self._token_in(credential)
        try:
            verified = await self._verifier.verify(token, lambda: self._check_failures(address))
        except TokenError as error:
            self.results["forged" if error.forged else "invalid"] += 1
            if error.forged:
                self.failures.charge(address)
            if error.remember:
                until_s = self._clock() + _REFUSED_S
                _keep(self._refused, _digest(credential), (error.detail, until_s), _REFUSALS)
            raise self.challenges.invalid_token(error.detail) from None
        except KeysUnavailableError as error:
            self.results["keys-unavailable"] += 1
            detail = "the keys of the token's issuer are not to be had now"
            raise Problem("keys-unavailable", detail, retry_after_s=error.retry_after_s) from None
        self.results["verified"] += 1
        principal = self._principal(verified)
        self._vouched.setdefault(verified.key, WeakSet()).add(principal)
        _keep(self._remembered, _digest(credential), principal, self.settings.remembered_tokens)
        return principal

    def _token_in(self, credential: Credential) -> str:
        try:
            return token_of(credential.value, self.challenges)
        except Problem:
            self.results["invalid"] += 1
            raise

    def _check_failures(self, address: str) -> None:
        wait_s = self.failures.wait_s(address)
        if wait_s > 0:
            self.results["throttled"] += 1
            detail = "too many tokens from this address had a wrong signature"
            raise Problem("too-many-bad-tokens", detail, retry_after_s=wait_s)

    def _by_api_key(self, presented: bytes) -> Principal | Problem:
        found = None
        if self._api_keys is not None:
            found = self._api_keys.find(presented.decode("latin-1"), self._now())
        self.results["unknown-key" if found is None else "key"] += 1
        if found is None:
            return self.challenges.invalid_token("the API key is not known, or it has expired")
        principal = self._of_api_key.get(found.id)
        if principal is None:
            values = frozenset(found.scopes)
            principal = self._of_api_key[found.id] = Principal(
                self.tenants.of(found.tenant, values),
                f"key {found.id}",
                permissions=frozenset(filter(is_permission, values)),
                values=values,
                expires_s=found.expires_s,
                rules=self._rules,
            )
        return principal

    def _principal(self, verified: Verified) -> Principal:
        claims, issuer = verified.claims, verified.issuer
        # Only what means something here: a token may be full of others' scopes.
        found = _values(claims, issuer.permission_claims)
        values = frozenset(
            v for v in found if v in issuer.permissions or v in self._named_scopes or is_permission(v)
        )
        if issuer.permissions:
            granted = frozenset(p for value in values for p in issuer.permissions.get(value, ()))
        else:
            granted = frozenset(filter(is_permission, values))
        name = claim_at(claims, issuer.tenant_claim)
        if len(self._keys) > 1:
            # Two issuers may both know a "bob". An issuer's name has no "|", so this is no third one's.
            name = f"{issuer.name}|{name}"
        return Principal(
            self.tenants.of(name, values),
            # A token without sub is its tenant's: told apart from a sub of the same text.
            f"token {issuer.issuer} {'sub ' + claims['sub'] if 'sub' in claims else 'tenant ' + name}",
            permissions=granted,
            values=values,
            expires_s=verified.expires_s,
            rules=self._rules,
        )

    def _withdraw(self, key: Key) -> None:
        """The issuer does not vouch for this key any more, nor for what it signed."""
        for principal in self._vouched.pop(key, ()):
            principal.expires_s = 0.0


def resource_of(settings: AuthSettings) -> str:
    """This server's identifier for clients (RFC 9728), "" where the settings have none."""
    audiences = [name for name in settings.audience if name.startswith(("https://", "http://"))]
    return settings.resource or (audiences[0] if audiences else "")


def _values(claims: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    """What the claims grant: the words of a text (RFC 6749, 3.3), or the texts of a list."""
    values: list[str] = []
    for name in names:
        claim = claim_at(claims, name)
        if isinstance(claim, str):
            values += claim.split()
        elif isinstance(claim, list):
            values += [one for one in claim if isinstance(one, str)]
    return values


def _digest(credential: Credential) -> bytes:
    """Of the token alone: one token is one, however the scheme before it is written."""
    value = credential.value
    if value[:7] != b"Bearer " or value[7:8] == b" " or value[-1:] == b" ":
        scheme, _, token = value.strip().partition(b" ")
        if scheme.lower() != b"bearer":
            return hashlib.sha256(b"other " + value).digest()
        return hashlib.sha256(token.strip()).digest()
    return hashlib.sha256(value[7:]).digest()


def _keep(store: dict[bytes, Any], digest: bytes, value: Any, most: int) -> None:
    """Remember, and forget the oldest where there are too many."""
    if len(store) >= most > 0:
        del store[next(iter(store))]
    if most:
        store[digest] = value
