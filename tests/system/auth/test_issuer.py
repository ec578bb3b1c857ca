"""The real issuer of tests/support/auth/issuer.py by itself, as other tests rely on it."""

from __future__ import annotations

import queue
import threading
import time
import urllib.error

import pytest

from cobatch.server.settings.auth import REQUIRED_CLAIMS, Algorithm
from tests.support.auth import issuer
from tests.support.auth.issuer import Client

ALICE = Client("alice", scope="infer metadata", claims={"team": "red"})
BOB = Client("bob", scope="infer:double")


def test_rfc9068_2_contents_of_its_tokens() -> None:
    before = int(time.time())
    with issuer.started(ALICE, BOB) as issuing:
        token = issuing.token("alice", "infer")
        header, claims = issuer.part(token, 0), issuer.part(token, 1)
        assert header == {"typ": "at+jwt", "alg": "RS256", "kid": issuing.kid}
        assert set(REQUIRED_CLAIMS) <= set(claims)
        assert claims["iss"] == issuing.issuer
        assert claims["aud"] == issuer.RESOURCE
        # RFC 9068, 2.2: without a resource owner the subject is the client.
        assert claims["sub"] == claims["client_id"] == "alice"
        assert claims["scope"] == "infer"
        assert claims["team"] == "red"
        assert claims["iat"] >= before
        assert claims["exp"] == claims["iat"] + 3600
        other = issuer.part(issuing.token("bob", "infer:double", "https://other.test/"), 1)
        assert other["aud"] == "https://other.test/"
        assert other["jti"] != claims["jti"]
        assert "scope" not in issuer.part(issuing.token("alice"), 1)


def test_it_refuses_scopes_of_other_clients() -> None:
    with issuer.started(ALICE, BOB, alg="ES256") as issuing:
        with pytest.raises(issuer.Refused, match="invalid_scope"):
            issuing.token("bob", "infer")
        assert "." not in issuing.token("alice", "infer", resource=None)


@pytest.mark.parametrize("alg", ["RS256", "PS256", "ES256", "EdDSA"])
def test_it_rotates(alg: Algorithm) -> None:
    with issuer.started(ALICE, alg="ES256") as issuing:
        old = issuing.kid
        new = issuing.rotate(alg)
        assert [key["kid"] for key in issuing.jwks()] == [new, old]
        assert issuer.part(issuing.token("alice", "infer"), 0) == {"typ": "at+jwt", "alg": alg, "kid": new}
        issuing.drop()
        (key,) = issuing.jwks()
        assert (key["kid"], key["alg"], key["use"]) == (new, alg, "sig")
        assert not {"d", "p", "q", "dp", "dq", "qi"} & set(key)
        assert issuing.jwks_requests == 2


def test_it_goes_down_and_comes_up() -> None:
    with issuer.started(ALICE, alg="ES256") as issuing:
        for how in ("closed", "unavailable"):
            issuing.down(how)
            with pytest.raises(OSError):  # noqa: PT011 - of several kinds
                issuing.jwks()
            issuing.up()
            assert issuing.jwks()
        assert issuing.counts == issuer.RequestCounts(jwks=3, metadata=0, cut=1)


def test_a_path_is_part_of_its_name() -> None:
    with issuer.started(ALICE, alg="ES256", path="/realms/red") as issuing:
        assert issuing.issuer.endswith("/realms/red")
        metadata = issuer.get(f"{issuing.issuer}/.well-known/openid-configuration")
        assert metadata["issuer"] == issuing.issuer
        assert metadata["jwks_uri"] == issuing.jwks_url
        assert issuing.jwks()
        assert issuer.part(issuing.token("alice", "infer"), 1)["iss"] == issuing.issuer
        assert issuing.counts == issuer.RequestCounts(jwks=1, metadata=1, cut=0)


def test_its_metadata_may_be_at_the_location_of_rfc8414_3_1() -> None:
    with issuer.started(ALICE, alg="ES256", path="/realms/red", discovery="oauth") as issuing:
        with pytest.raises(urllib.error.HTTPError, match="404") as refused:
            issuer.get(f"{issuing.issuer}/.well-known/openid-configuration")
        refused.value.close()
        root = issuing.issuer.removesuffix("/realms/red")
        metadata = issuer.get(f"{root}/.well-known/oauth-authorization-server/realms/red")
        assert (metadata["issuer"], metadata["jwks_uri"]) == (issuing.issuer, issuing.jwks_url)


def test_it_can_delay_its_keys() -> None:
    with issuer.started(ALICE, alg="ES256") as issuing:
        issuing.hold()
        answers: queue.SimpleQueue[int] = queue.SimpleQueue()
        asking = threading.Thread(target=lambda: answers.put(len(issuing.jwks())))
        asking.start()
        issuing.wait_for_jwks_requests(1)
        assert issuing.token("alice")
        assert answers.empty()
        issuing.up()
        assert answers.get(timeout=issuer.DEADLINE_S) == 1
        asking.join(issuer.DEADLINE_S)


def test_reset_restores_its_first_state() -> None:
    with issuer.started(ALICE, alg="ES256") as issuing:
        (before,) = issuing.jwks()
        issuing.rotate("EdDSA")
        issuing.down()
        issuing.reset()
        assert issuing.counts == issuer.RequestCounts(jwks=0, metadata=0, cut=0)
        (after,) = issuing.jwks()
        assert (after["kid"], after["alg"]) == (before["kid"], before["alg"])
        assert after["x"] != before["x"]
        assert issuer.part(issuing.token("alice"), 0)["kid"] == after["kid"]
