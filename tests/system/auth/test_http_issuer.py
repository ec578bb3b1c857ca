"""A server with a real issuer (tests/support/auth/issuer.py): rotation, outages, unknown kids."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

from cobatch.server.settings.schema import ModelSettings
from tests.support.auth import issuer
from tests.support.auth.issuer import Client, Issuer
from tests.support.auth.protected import get_as, infer, predict
from tests.support.auth.tokens import as_json, b64
from tests.support.http.serving import DEADLINE_S, Answer, GatedEngine, Served, data_of, get, serve

CLIENTS = (Client("alice"), Client("bob", scope="infer:other metadata", claims={"team": "red"}))


@pytest.fixture(scope="module")
def issuing_process() -> Iterator[Issuer]:
    with issuer.started(*CLIENTS, alg="ES256") as running:
        yield running


@pytest.fixture
def issuing(issuing_process: Issuer) -> Issuer:
    issuing_process.reset()
    return issuing_process


@pytest.fixture(params=["fast", "asgi"])
def fast(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "fast")


@contextlib.contextmanager
def serving(fast: bool, issuing: Issuer, *, ready: bool = True, **auth: Any) -> Iterator[Served]:
    """Run a server for this issuer's tokens. Only unknown kids make it fetch keys again."""
    model = ModelSettings(path="gate", max_batch_size=4)
    settings = issuing.auth(**{"jwks_cooldown_s": 0.0, "jwks_refresh_s": 864_000.0, **auth})
    with serve(fast, (model,), engines={"gate": GatedEngine()}, ready=ready, auth=settings) as served:
        yield served


def refused(answer: Answer) -> str:
    assert (answer.status, answer.slug) == (401, "invalid-credentials")
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]
    return str(answer.json["detail"])


def test_tokens_by_client_credentials(fast: bool, issuing: Issuer) -> None:
    with serving(fast, issuing) as served:
        alice, bob = issuing.token("alice", "infer"), issuing.token("bob", "infer:other metadata")
        for _ in range(3):
            assert data_of(served.ask(infer(alice, 2))) == [4]
        assert served.ask(predict(alice)).status == 200
        assert served.ask(infer(bob)).slug == "forbidden"
        assert served.ask(get_as(bob, "/v2/models/gate")).status == 200
        for other in (
            issuing.token("alice", "infer", "https://other.test/"),
            issuing.token("alice", resource=None),
        ):
            refused(served.ask(infer(other)))
        assert issuing.jwks_requests == 1


def test_rotation(fast: bool, issuing: Issuer) -> None:
    with serving(fast, issuing) as served, served.connect() as client:
        old = infer(issuing.token("alice", "infer"))
        for _ in range(2):
            assert client.ask(old).status == 200
        issuing.rotate()
        # Both keys are published; the first token with the new one makes the server fetch it.
        new = infer(issuing.token("alice", "infer"))
        assert client.ask(new).status == 200
        assert client.ask(old).status == 200
        issuing.rotate()
        issuing.drop()
        # Nothing has been fetched yet, so both withdrawn keys are still trusted.
        assert client.ask(old).status == client.ask(new).status == 200
        assert client.ask(infer(issuing.token("alice", "infer"))).status == 200
        for withdrawn in (old, new):
            assert "no key" in refused(client.ask(withdrawn))
        assert issuing.jwks_requests >= 3


def test_an_outage(fast: bool, issuing: Issuer) -> None:
    with serving(fast, issuing) as served:
        seen, unseen = (issuing.token("alice", "infer") for _ in range(2))
        assert served.ask(infer(seen)).status == 200
        issuing.rotate()
        rotated = issuing.token("alice", "infer")
        issuing.down()
        # Known keys stay valid, also for tokens not seen before; a new key has to wait for the issuer.
        for known in (seen, unseen):
            assert served.ask(infer(known)).status == 200
        refused(served.ask(infer(rotated)))
        issuing.up()
        assert served.ask(infer(rotated)).status == 200


def test_an_outage_longer_than_the_keys_are_valid(fast: bool, issuing: Issuer) -> None:
    with serving(fast, issuing, jwks_cooldown_s=864_000.0) as served:
        good = issuing.token("alice", "infer")
        assert served.ask(infer(good)).status == 200
        issuing.down()
        assert served.inference.auth is not None
        keys: Any = served.inference.auth._keys[issuing.issuer]
        with mock.patch.object(keys, "_stale_s", 0.0):
            served.call(keys._drop_stale)
        answer = served.ask(infer(good))
        assert (answer.status, answer.slug) == (503, "keys-unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        assert served.ask(get("/v2/health/ready")).status == 503
        assert served.ask(get("/v2/health/live")).status == 200


def test_an_issuer_that_is_down_at_the_start(fast: bool, issuing: Issuer) -> None:
    good = issuing.token("alice", "infer")
    issuing.down("unavailable")
    with mock.patch("cobatch.server.auth.jwks._RETRY_S", 0.01), serving(fast, issuing, ready=False) as served:
        answer = served.ask(infer(good))
        assert (answer.status, answer.slug) == (503, "keys-unavailable")
        assert served.ask(infer("x")).status == 401
        assert served.ask(infer("x").replace(b"Bearer x", b"Basic x")).slug == "unauthenticated"
        assert served.ask(get("/v2/health/ready")).status == 503
        assert not served.server.ready.is_set()
        issuing.up()
        # In the background, without a request.
        assert served.server.ready.wait(DEADLINE_S)
        assert served.ask(get("/v2/health/ready")).status == 200
        assert served.ask(infer(good)).status == 200


def test_rfc7517_a_flood_of_unknown_kids_costs_the_issuer_one_request(fast: bool, issuing: Issuer) -> None:
    with serving(fast, issuing, jwks_cooldown_s=864_000.0) as served:
        good = issuing.token("alice", "infer")
        _, claims, signature = good.split(".")
        text = issuer.part(good, 0)
        assert served.ask(infer(good)).status == 200
        requests = issuing.jwks_requests
        for n in range(50):
            unknown = b64(as_json({**text, "kid": f"../{n}"}))
            assert "no key" in refused(served.ask(infer(f"{unknown}.{claims}.{signature}")))
        assert issuing.jwks_requests == requests == 1
        assert served.ask(infer(good)).status == 200
        assert served.ask(infer(issuing.token("alice", "infer"))).status == 200
