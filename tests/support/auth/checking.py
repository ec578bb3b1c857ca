"""FetchedKeys and TokenVerifier for a real issuer, with a clock that the test moves.

Only tokens with unknown kids fetch keys; the background refresh is not started.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from cobatch.server.auth.jwks import FetchedKeys
from cobatch.server.auth.keys import Key
from cobatch.server.auth.tokens import TokenError, TokenVerifier
from cobatch.server.settings.auth import AuthSettings
from tests.support.auth.issuer import Issuer

COOLDOWN_S = 10.0


class Checker:
    """Verifies the tokens of one issuer as the server does."""

    def __init__(self, auth: AuthSettings, wall: Callable[[], float] = time.time) -> None:
        (trusted,) = auth.issuers
        self.now_s = 1000.0
        self.withdrawn: list[str | None] = []
        self.keys = FetchedKeys(trusted, auth, self._withdraw, clock=lambda: self.now_s)
        self._verifier = TokenVerifier(auth, {trusted.issuer: self.keys}, wall)

    def _withdraw(self, key: Key) -> None:
        self.withdrawn.append(key.kid)

    async def key(self, token: str) -> Key:
        """Verify a valid token; return its key."""
        return (await self._verifier.verify(token)).key

    async def tenant(self, token: str) -> Any:
        """Verify a valid token; return its `sub`."""
        return (await self._verifier.verify(token)).claims["sub"]

    async def refused(self, token: str) -> TokenError:
        """Verify an invalid token; return the error."""
        with pytest.raises(TokenError) as error:
            await self._verifier.verify(token)
        assert not any(part in error.value.detail for part in token.split("."))
        return error.value


def checker(issuing: Issuer, *, wall: Callable[[], float] = time.time, **more: Any) -> Checker:
    """Return a Checker for this issuer, with more of its settings."""
    trusted = issuing.settings(**more)
    return Checker(issuing.auth(issuers=(trusted,), jwks_cooldown_s=COOLDOWN_S), wall)


def unwanted(key: Key) -> None:
    """Fail: passed to FetchedKeys where no key may be withdrawn."""
    raise AssertionError(f"{key} was withdrawn")
