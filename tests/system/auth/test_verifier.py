"""TokenVerifier and FetchedKeys with tokens and keys of a real issuer (tests/support/auth/issuer.py)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Literal

import msgspec
import pytest

from cobatch.server.auth.jwks import FetchedKeys, KeysUnavailableError
from cobatch.server.auth.tokens import TokenVerifier
from cobatch.server.settings.auth import Algorithm
from tests.support.auth import issuer
from tests.support.auth.checking import checker, unwanted
from tests.support.auth.issuer import Client, Issuer

ALICE = Client("alice")


@pytest.fixture(scope="module")
def running() -> Iterator[Issuer]:
    with issuer.started(ALICE, alg="ES256") as running:
        yield running


@pytest.fixture
def issuing(running: Issuer) -> Issuer:
    running.reset()
    return running


# Tokens


@pytest.mark.parametrize("alg", ["RS256", "PS256", "ES256", "EdDSA"])
async def test_a_token_by_client_credentials_is_accepted(alg: Algorithm) -> None:
    client = Client("alice", scope="infer infer:double admin", claims={"team": {"name": "red"}})
    with issuer.started(client, alg=alg) as issuing:
        auth = issuing.auth()
        keys = FetchedKeys(auth.issuers[0], auth, unwanted)
        before = time.time()
        verified = await TokenVerifier(auth, {issuing.issuer: keys}).verify(
            issuing.token("alice", "infer infer:double")
        )
        assert verified.claims["scope"] == "infer infer:double"
        assert verified.claims["sub"] == verified.claims["client_id"] == "alice"
        assert verified.claims["team"] == {"name": "red"}
        assert verified.issuer is auth.issuers[0]
        assert (verified.key.kid, verified.key.algorithm) == (issuing.kid, alg)
        assert verified.expires_s == verified.claims["exp"] + auth.leeway_s >= before + 3600


async def test_a_token_expires_after_its_leeway(issuing: Issuer) -> None:
    token = issuing.token("alice", "infer")
    now_s = end_s = issuer.part(token, 1)["exp"] + 10.0
    checks = checker(issuing, wall=lambda: now_s)
    assert "expired" in (await checks.refused(token)).detail
    now_s = end_s - 0.001
    assert await checks.tenant(token) == "alice"


async def test_rfc9068_4_a_token_for_another_resource_is_refused(issuing: Issuer) -> None:
    error = await checker(issuing).refused(issuing.token("alice", "infer", "https://other.test/"))
    assert error.permanent
    assert "aud" in error.detail
    assert issuing.counts == issuer.RequestCounts(jwks=0, metadata=0, cut=0)


async def test_an_opaque_token_is_refused(issuing: Issuer) -> None:
    opaque = issuing.token("alice", resource=None)
    assert (await checker(issuing).refused(opaque)).permanent


async def test_a_changed_token_is_forged(issuing: Issuer) -> None:
    first, second = (issuing.token("alice", "infer").split(".") for _ in range(2))
    error = await checker(issuing).refused(".".join([*first[:2], second[2]]))
    assert error.forged
    assert error.permanent


async def test_keys_of_one_issuer_do_not_check_tokens_of_another(issuing: Issuer) -> None:
    with issuer.started(ALICE, alg="ES256") as other:
        # Both issuers use the same kid.
        assert issuing.kid == other.kid
        checks = checker(issuing)
        assert await checks.tenant(issuing.token("alice"))
        error = await checks.refused(other.token("alice"))
        assert "iss" in error.detail
        theirs, ours = other.token("alice").split("."), issuing.token("alice").split(".")
        assert (await checks.refused(".".join([*ours[:2], theirs[2]]))).forged


async def test_rfc8725_3_1_an_algorithm_that_is_not_configured_is_refused(issuing: Issuer) -> None:
    checks = checker(issuing, algorithms=("RS256", "PS256", "EdDSA"))
    assert "alg" in (await checks.refused(issuing.token("alice"))).detail
    assert issuing.jwks_requests == 0


# Finding the keys


@pytest.mark.parametrize("path", ["", "/realms/red"])
@pytest.mark.parametrize("discovery", ["openid", "oauth"])
async def test_metadata_leads_to_the_keys(path: str, discovery: Literal["openid", "oauth"]) -> None:
    with issuer.started(ALICE, alg="ES256", path=path, discovery=discovery) as issuing:
        checks = checker(issuing)
        assert await checks.tenant(issuing.token("alice")) == "alice"
        assert await checks.tenant(issuing.token("alice")) == "alice"
        assert issuing.counts == issuer.RequestCounts(jwks=1, metadata=1, cut=0)


async def test_a_configured_jwks_url_needs_no_metadata(issuing: Issuer) -> None:
    checks = checker(issuing, jwks_url=issuing.jwks_url)
    assert await checks.tenant(issuing.token("alice")) == "alice"
    assert issuing.counts == issuer.RequestCounts(jwks=1, metadata=0, cut=0)


async def test_rfc8414_3_3_metadata_must_name_the_configured_issuer(
    issuing: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    auth = issuing.auth()
    almost = msgspec.structs.replace(issuing.settings(), issuer=f"{issuing.issuer}/")
    keys = FetchedKeys(almost, auth, unwanted)
    with caplog.at_level(logging.WARNING, "cobatch.auth"), pytest.raises(KeysUnavailableError):
        await keys.find(issuing.kid, "ES256")
    assert "another issuer" in caplog.text
    assert issuing.jwks_requests == 0
