"""An issuer's keys: lookup, the time of fetches, rotation, outages and floods of unknown kids."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable

import pytest

from cobatch.server.auth.fetch import Fetched
from cobatch.server.auth.jwks import FetchedKeys, KeysUnavailableError, StaticKeys
from cobatch.server.auth.keys import Key
from cobatch.server.settings.auth import Issuer
from tests.support.auth.tokens import ISSUER, Signer, auth_settings, jwks, rsa_key, signer
from tests.support.virtual import loop as virtual

ALL = ("RS256", "PS256", "ES256", "EdDSA")
JWKS_URL = "https://issuer.test/jwks"


# Keys from files


async def test_static_keys() -> None:
    keys = StaticKeys([signer().key(), signer("ES256").key()])
    assert keys.ready
    assert (await keys.find("key-RS256", "RS256")) is keys.get("key-RS256", "RS256") is not None
    for kid, algorithm in (("key-RS256", "ES256"), ("unknown", "RS256"), (None, "EdDSA"), ("", "RS256")):
        assert await keys.find(kid, algorithm) is None


def test_a_key_without_a_kid_serves_any_unknown_kid() -> None:
    pem = Key(None, "RS256", signer().private.public_key())
    keys = StaticKeys([pem, signer(kid="named").key()])
    assert keys.get("issuers-own-name", "RS256") is pem
    named = keys.get("named", "RS256")
    assert named is not None
    assert named is not pem
    assert keys.get("named", "ES256") is None
    assert keys.get("issuers-own-name", "ES256") is None
    # Without a kid in the token two keys fit.
    assert keys.get(None, "RS256") is None


# Fetched keys, in virtual time


class FakeIssuer:
    """Publishes `keys`. A fetch takes `takes_s` and raises `error` if that is set."""

    def __init__(self, *keys: Signer) -> None:
        self.body = jwks(*keys)
        self.max_age_s: float | None = None
        self.takes_s = 0.0
        self.error: Exception | None = None
        self.calls: list[float] = []
        self.withdrawn: list[str | None] = []
        self.open = 0

    async def fetch(self, url: str) -> Fetched:
        assert url == JWKS_URL
        assert not self.open, "two fetches at once"
        self.open += 1
        try:
            self.calls.append(asyncio.get_running_loop().time())
            await asyncio.sleep(self.takes_s)
            if self.error is not None:
                raise self.error
            return Fetched(self.body, self.max_age_s)
        finally:
            self.open -= 1

    def keys(self, **auth: float) -> FetchedKeys:
        one = Issuer(issuer=ISSUER, name="test", jwks_url=JWKS_URL)
        clock = asyncio.get_running_loop().time
        return FetchedKeys(
            one,
            auth_settings(one, **auth),
            lambda key: self.withdrawn.append(key.kid),
            self.fetch,
            clock,
        )


def in_virtual_time(main: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await main()

    virtual.run(run())


async def start(issuer: FakeIssuer, **auth: float) -> FetchedKeys:
    """Start fetching and wait for the first keys."""
    keys = issuer.keys(**auth)
    await keys.start()
    assert await keys.find("first", "RS256") is not None
    return keys


def first() -> Signer:
    return signer(kid="first")


def second() -> Signer:
    return signer(kid="second")


def test_the_first_tokens_wait_for_the_first_keys() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        issuer.takes_s = 2.0
        keys = issuer.keys()
        assert not keys.ready
        await keys.start()
        await keys.start()  # the second call has no effect
        found = await asyncio.gather(*(keys.find("first", "RS256") for _ in range(10)))
        assert len(set(found)) == 1
        assert found[0] is not None
        assert keys.ready
        assert keys.get("first", "RS256") is found[0]
        assert issuer.calls == [0.0]
        await keys.stop()

    in_virtual_time(main)


def test_keys_are_fetched_without_start() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = issuer.keys()
        assert await keys.find("first", "RS256") is not None
        await keys.stop()

    in_virtual_time(main)


def test_rfc7517_4_5_by_kid_and_alg() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first(), second(), signer("ES256"))
        keys = await start(issuer)
        await asyncio.sleep(100)
        calls = len(issuer.calls)
        assert await keys.find("first", "PS256") is None
        assert await keys.find("first", "ES256") is None
        assert await keys.find(None, "RS256") is None  # two keys fit
        assert await keys.find(None, "EdDSA") is None  # no key fits
        only = await keys.find(None, "ES256")
        assert only is not None
        assert only.kid == "key-ES256"
        # Every kid was known, so nothing was fetched.
        assert len(issuer.calls) == calls
        await keys.stop()

    in_virtual_time(main)


def test_rotation_with_overlap() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = await start(issuer)
        old = keys.get("first", "RS256")
        await asyncio.sleep(20)
        issuer.body = jwks(second(), first())
        new = await keys.find("second", "RS256")
        assert new is not None
        assert new.material == second().private.public_key()
        # A key that stays keeps its object, since cached tokens refer to it.
        assert keys.get("first", "RS256") is old
        assert issuer.withdrawn == []
        issuer.body = jwks(second())
        await asyncio.sleep(300)
        assert keys.get("first", "RS256") is None
        assert keys.get("second", "RS256") is new
        assert issuer.withdrawn == ["first"]
        await keys.stop()

    in_virtual_time(main)


def test_new_material_under_an_old_kid_is_a_new_key() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = await start(issuer)
        old = keys.get("first", "RS256")
        issuer.body = jwks(Signer(second().private, "RS256", "first"))
        await asyncio.sleep(300)
        new = keys.get("first", "RS256")
        assert new is not None
        assert new is not old
        assert issuer.withdrawn == ["first"]
        await keys.stop()

    in_virtual_time(main)


def test_unknown_kids_cause_one_fetch_per_cool_down() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        issuer.takes_s = 0.5
        keys = await start(issuer, jwks_cooldown_s=10)
        good = keys.get("first", "RS256")
        names = (f"invented-{n}" for n in itertools.count())
        for _ in range(1000):
            assert await keys.find(next(names), "RS256") is None
            await asyncio.sleep(0.1)
            assert keys.get("first", "RS256") is good
        # 100 s, and some more in which fetches ran.
        spent_s = asyncio.get_running_loop().time()
        assert spent_s // 10 <= len(issuer.calls) <= spent_s // 10 + 1
        assert all(later - before >= 10 for before, later in itertools.pairwise(issuer.calls))
        assert issuer.withdrawn == []
        await keys.stop()

    in_virtual_time(main)


def test_an_unknown_kid_is_fetched_at_the_end_of_the_cool_down() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = await start(issuer, jwks_cooldown_s=10)
        issuer.body = jwks(first(), second())
        await asyncio.sleep(9.999)
        assert await keys.find("second", "RS256") is None
        assert len(issuer.calls) == 1
        await asyncio.sleep(0.001)
        assert await keys.find("second", "RS256") is not None
        assert len(issuer.calls) == 2
        await keys.stop()

    in_virtual_time(main)


def test_concurrent_unknown_kids_share_one_fetch() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = await start(issuer)
        await asyncio.sleep(20)
        issuer.body = jwks(first(), second())
        issuer.takes_s = 3.0
        waiting = [asyncio.create_task(keys.find("second", "RS256")) for _ in range(50)]
        waiting += [asyncio.create_task(keys.find(f"other-{n}", "RS256")) for n in range(50)]
        await asyncio.sleep(1)
        # Tokens with a known key do not wait.
        assert keys.get("first", "RS256") is await keys.find("first", "RS256")
        assert asyncio.get_running_loop().time() == 21.0
        found = await asyncio.gather(*waiting)
        assert all(key is not None and key.kid == "second" for key in found[:50])
        assert found[50:] == [None] * 50
        assert len(issuer.calls) == 2
        await keys.stop()

    in_virtual_time(main)


def test_a_cancelled_waiter_does_not_cancel_the_fetch() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = await start(issuer)
        await asyncio.sleep(20)
        issuer.body = jwks(first(), second())
        issuer.takes_s = 3.0
        cancelled, stays = (asyncio.create_task(keys.find("second", "RS256")) for _ in range(2))
        await asyncio.sleep(1)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert (await stays) is not None
        assert len(issuer.calls) == 2
        await keys.stop()

    in_virtual_time(main)


def test_keys_are_refreshed_in_the_background() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = await start(issuer, jwks_refresh_s=300)
        await asyncio.sleep(3000)
        gaps = [later - before for before, later in itertools.pairwise(issuer.calls)]
        assert len(gaps) >= 10
        # A little early, with jitter.
        assert all(270 <= gap <= 300 for gap in gaps)
        assert len(set(gaps)) > 1
        assert issuer.withdrawn == []
        await keys.stop()
        calls = len(issuer.calls)
        await asyncio.sleep(3000)
        assert len(issuer.calls) == calls

    in_virtual_time(main)


@pytest.mark.parametrize(
    ("max_age_s", "period_s"), [(100.0, 100.0), (1.0, 30.0), (0.0, 30.0), (86_400.0, 300.0), (None, 300.0)]
)
def test_max_age_shortens_the_interval_only(max_age_s: float | None, period_s: float) -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        issuer.max_age_s = max_age_s
        keys = await start(issuer, jwks_refresh_s=300)
        await asyncio.sleep(5 * period_s)
        gaps = [later - before for before, later in itertools.pairwise(issuer.calls)]
        assert all(0.9 * period_s <= gap <= period_s for gap in gaps)
        assert len(gaps) >= 4
        await keys.stop()

    in_virtual_time(main)


def test_keys_survive_an_outage_until_they_are_stale() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        issuer = FakeIssuer(first())
        keys = await start(issuer, jwks_stale_s=3600)
        issuer.error = OSError("down")
        await asyncio.sleep(3600 - 0.001)
        assert keys.ready
        assert await keys.find("first", "RS256") is not None
        assert issuer.withdrawn == []
        await asyncio.sleep(0.001)
        assert loop.time() == 3600
        # Cached tokens expire without a further request.
        await asyncio.sleep(0)
        assert issuer.withdrawn == ["first"]
        assert not keys.ready
        assert keys.get("first", "RS256") is None
        with pytest.raises(KeysUnavailableError) as caught:
            await keys.find("first", "RS256")
        assert 1.0 <= caught.value.retry_after_s <= 60.0
        # The keys return with the issuer.
        issuer.error = None
        await asyncio.sleep(60)
        assert await keys.find("first", "RS256") is not None
        assert keys.ready
        await keys.stop()

    in_virtual_time(main)


def test_keys_become_stale_on_time_between_fetches() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = issuer.keys(jwks_stale_s=60)
        assert await keys.find("first", "RS256") is not None
        # Without start() nothing runs in the background.
        await asyncio.sleep(60)
        assert not keys.ready
        assert issuer.withdrawn == ["first"]
        await keys.stop()

    in_virtual_time(main)


def test_keys_are_refreshed_before_they_are_stale() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = await start(issuer, jwks_stale_s=60, jwks_refresh_s=300)
        await asyncio.sleep(1000)
        assert keys.ready
        assert issuer.withdrawn == []
        await keys.stop()

    in_virtual_time(main)


def test_failed_fetches_back_off_exponentially() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        issuer.error = OSError("down")
        keys = issuer.keys()
        await keys.start()
        await asyncio.sleep(600)
        gaps = [later - before for before, later in itertools.pairwise(issuer.calls)]
        for gap, most in zip(gaps, [1, 2, 4, 8, 16, 32, *[60] * 20], strict=False):
            assert 0.9 * most <= gap <= most
        assert len(gaps) > 10
        issuer.error = None
        await asyncio.sleep(60)
        assert keys.ready
        # A success resets the backoff.
        issuer.error = OSError("down")
        before = len(issuer.calls)
        await asyncio.sleep(305)
        assert len(issuer.calls) - before >= 3
        await keys.stop()

    in_virtual_time(main)


def test_without_keys_clients_get_a_retry_time() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        issuer.error = OSError("down")
        keys = issuer.keys()
        await keys.start()
        for _ in range(200):
            with pytest.raises(KeysUnavailableError) as caught:
                await keys.find("first", "RS256")
            assert 1.0 <= caught.value.retry_after_s <= 60.0
            await asyncio.sleep(0.5)
        # 100 s: 7 or 8 of the backoff, and at most one per cool-down for requests.
        assert len(issuer.calls) <= 8 + 10
        await keys.stop()

    in_virtual_time(main)


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"{}", b'{"keys":[]}', b'{"keys":[{"kty":"RSA"}]}',
     jwks(Signer(rsa_key("weak", 1024), "RS256"))],
)  # fmt: skip
def test_a_jwk_set_without_a_usable_key_replaces_nothing(body: bytes) -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        keys = await start(issuer)
        good = keys.get("first", "RS256")
        issuer.body = body
        await asyncio.sleep(1000)
        assert keys.get("first", "RS256") is good
        assert issuer.withdrawn == []
        # It counts as a failure and is retried sooner than after 300 s.
        assert len(issuer.calls) > 10
        await keys.stop()

    in_virtual_time(main)


def test_failures_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def main() -> None:
        issuer = FakeIssuer(first())
        issuer.error = TimeoutError()
        keys = issuer.keys()
        await keys.start()
        await asyncio.sleep(0.5)
        issuer.error = None
        await asyncio.sleep(5)
        await keys.stop()

    in_virtual_time(main)
    assert "no keys of issuer test: TimeoutError" in caplog.text
    assert "are available again" in caplog.text


def test_an_unexpected_error_stops_neither_waiters_nor_refreshing() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: None)
        issuer = FakeIssuer(first())
        issuer.error = RuntimeError("a bug")
        keys = issuer.keys()
        await keys.start()
        with pytest.raises(KeysUnavailableError):
            await keys.find("first", "RS256")
        issuer.error = None
        await asyncio.sleep(5)
        assert keys.ready
        await keys.stop()

    in_virtual_time(main)


def test_stop_during_a_fetch() -> None:
    async def main() -> None:
        issuer = FakeIssuer(first())
        issuer.takes_s = 1000.0
        keys = issuer.keys()
        await keys.stop()  # before start
        await keys.start()
        waiting = asyncio.create_task(keys.find("first", "RS256"))
        await asyncio.sleep(1)
        await keys.stop()
        with pytest.raises(KeysUnavailableError):
            await waiting
        assert issuer.open == 0
        assert asyncio.get_running_loop().time() == 1.0
        await keys.stop()

    in_virtual_time(main)
