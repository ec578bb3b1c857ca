"""FetchedKeys while a real issuer (tests/support/auth/issuer.py) rotates its keys or is down."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Literal

import pytest

from cobatch.server.auth.jwks import FetchedKeys, KeysUnavailableError
from cobatch.server.auth.keys import Key
from cobatch.server.auth.tokens import TokenVerifier
from cobatch.server.settings.auth import Algorithm
from tests.support.auth import issuer
from tests.support.auth.checking import COOLDOWN_S, checker, unwanted
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


# Rotation


@pytest.mark.parametrize("alg", ["ES256", "PS256"])
async def test_rotation_with_overlap(issuing: Issuer, alg: Algorithm) -> None:
    checks = checker(issuing)
    old = issuing.token("alice")
    old_key = await checks.key(old)
    new_kid = issuing.rotate(alg)
    new = issuing.token("alice")
    # Within the cool-down nothing is fetched, although the issuer has the key.
    checks.now_s += COOLDOWN_S - 0.001
    error = await checks.refused(new)
    assert not error.permanent
    assert not error.forged
    assert issuing.jwks_requests == 1
    # Afterwards the first new token starts a fetch, and the old key keeps its object.
    checks.now_s += 0.001
    new_key = await checks.key(new)
    assert (new_key.kid, new_key.algorithm) == (new_kid, alg)
    assert await checks.key(old) is old_key
    assert await checks.key(new) is new_key
    assert issuing.jwks_requests == 2
    assert checks.withdrawn == []


async def test_a_dropped_key_is_withdrawn_with_the_next_fetch(issuing: Issuer) -> None:
    checks = checker(issuing)
    old, old_kid = issuing.token("alice"), issuing.kid
    assert await checks.tenant(old)
    issuing.rotate()
    issuing.drop()
    # Nothing has been fetched yet, so the dropped key is still trusted.
    checks.now_s += COOLDOWN_S
    assert await checks.tenant(old)
    assert await checks.tenant(issuing.token("alice"))
    assert checks.withdrawn == [old_kid]
    error = await checks.refused(old)
    assert not error.forged
    assert issuing.jwks_requests == 2


async def test_the_refresh_withdraws_a_dropped_key(issuing: Issuer) -> None:
    auth = issuing.auth(jwks_refresh_s=0.01)
    withdrawn: asyncio.Queue[Key] = asyncio.Queue()
    keys = FetchedKeys(auth.issuers[0], auth, withdrawn.put_nowait)
    verifier = TokenVerifier(auth, {issuing.issuer: keys})
    await keys.start()
    try:
        old = await verifier.verify(issuing.token("alice"))
        issuing.rotate()
        issuing.drop()
        async with asyncio.timeout(issuer.DEADLINE_S):
            assert await withdrawn.get() is old.key
        assert (await verifier.verify(issuing.token("alice"))).key.kid == issuing.kid
    finally:
        await keys.stop()


async def test_requests_with_a_new_kid_share_one_fetch(issuing: Issuer) -> None:
    checks = checker(issuing)
    old = issuing.token("alice")
    assert await checks.tenant(old)
    issuing.rotate()
    issuing.hold()
    checks.now_s += COOLDOWN_S
    waiting = [asyncio.create_task(checks.tenant(issuing.token("alice"))) for _ in range(20)]
    await asyncio.to_thread(issuing.wait_for_jwks_requests, 2)
    # Tokens with known keys do not wait, and a cancelled request does not cancel the others' fetch.
    assert await checks.tenant(old) == "alice"
    waiting[0].cancel()
    issuing.up()
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(outcomes[0], asyncio.CancelledError)
    assert outcomes[1:] == ["alice"] * 19
    assert issuing.jwks_requests == 2


# Outage


@pytest.mark.parametrize("how", ["closed", "unavailable"])
async def test_known_keys_stay_valid_through_an_outage(
    issuing: Issuer, how: Literal["closed", "unavailable"]
) -> None:
    checks = checker(issuing, jwks_url=issuing.jwks_url)
    old = issuing.token("alice")
    assert await checks.tenant(old)
    issuing.rotate()
    new = issuing.token("alice")
    issuing.down(how)

    def requests() -> int:
        return issuing.counts.jwks - 1 + issuing.counts.cut

    for attempts in (1, 2):
        checks.now_s += COOLDOWN_S
        for _ in range(5):
            assert not (await checks.refused(new)).permanent
            assert await checks.tenant(old) == "alice"
        assert requests() == attempts
    issuing.up()
    assert not (await checks.refused(new)).permanent
    checks.now_s += COOLDOWN_S
    assert await checks.tenant(new) == "alice"
    assert requests() == 3
    assert checks.withdrawn == []


async def test_keys_become_stale_in_a_long_outage(issuing: Issuer) -> None:
    checks = checker(issuing)
    token = issuing.token("alice")
    assert await checks.tenant(token)
    issuing.down()
    checks.now_s += 86_400.0 - 0.001
    assert await checks.tenant(token)
    checks.now_s += 0.001
    for _ in range(2):
        with pytest.raises(KeysUnavailableError) as error:
            await checks.tenant(token)
        assert error.value.retry_after_s >= 1
    assert checks.withdrawn == [issuing.kid]
    assert not checks.keys.ready
    issuing.up()
    checks.now_s += COOLDOWN_S
    assert await checks.tenant(token) == "alice"
    assert checks.keys.ready


async def test_an_issuer_that_is_down_at_the_start(issuing: Issuer) -> None:
    checks = checker(issuing)
    token = issuing.token("alice")
    issuing.down()
    with pytest.raises(KeysUnavailableError):
        await checks.tenant(token)
    issuing.up()
    with pytest.raises(KeysUnavailableError):
        await checks.tenant(token)
    checks.now_s += COOLDOWN_S
    assert await checks.tenant(token) == "alice"


async def test_stop_does_not_wait_for_the_issuer(issuing: Issuer) -> None:
    auth = issuing.auth()
    keys = FetchedKeys(auth.issuers[0], auth, unwanted)
    issuing.hold()
    await keys.start()
    await asyncio.to_thread(issuing.wait_for_jwks_requests, 1)
    await keys.stop()
    assert not keys.ready
