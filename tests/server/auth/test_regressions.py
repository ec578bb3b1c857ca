"""Regression tests for findings of a security review."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cobatch.server.auth.authenticator import Authenticator
from cobatch.server.auth.credentials import AUTHORIZATION
from cobatch.server.auth.principal import Principal
from cobatch.server.auth.throttle import SignatureThrottle
from tests.support.auth import tokens
from tests.support.auth.protected import (
    SIGNER,
    Protected,
    batch,
    bearer,
    get_as,
    infer,
    item,
    protected,
    settings_in,
    token,
)
from tests.support.fronts.linked import WAYS
from tests.support.http.serving import GATE, data_of, gate, post, rows_of

ALL = pytest.mark.parametrize("path", WAYS)
GZIP = {"Accept-Encoding": "gzip"}


@pytest.fixture(params=WAYS)
def packing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Protected]:
    """Run a server that compresses every answer."""
    with protected(request.param, tmp_path, server={"compress_min_bytes": 0}) as running:
        yield running


def test_a_compressed_refusal_is_the_only_answer(packing: Protected) -> None:
    """While a thread compressed the refusal, the request was served as if it had been accepted."""
    for _ in range(3):
        with packing.served.connect() as client:
            for _ in range(3):
                client.send(gate(1, headers=GZIP))
                answer = client.answer()
                assert answer.status == 401
            client.send(infer(token(scope="metadata"), 1, **GZIP))
            assert client.answer().status == 403
            client.send(infer(token(), 1))
            assert data_of(client.answer()) == [2]
    assert packing.served.batcher().counters.accepted == 3


@ALL
def test_a_large_body_does_not_count_as_framing(path: str, tmp_path: Path) -> None:
    """On the fast path, the body's later chunks counted as headers: 431."""
    with protected(path, tmp_path) as running:
        padded = rows_of(1) | {"parameters": {"padding": ["x" * 16_000] * 200}}
        for _ in range(2):
            assert data_of(running.ask(post(GATE, padded, bearer(token())))) == [2]


@ALL
def test_a_refused_body_is_dropped_and_the_connection_stays_open(path: str, tmp_path: Path) -> None:
    with protected(path, tmp_path) as running, running.served.connect() as client:
        padded = rows_of(1) | {"parameters": {"padding": "x" * (1 << 20)}}
        assert client.ask(post(GATE, padded)).status == 401
        assert data_of(client.ask(infer(token(), 4))) == [8]


@ALL
def test_all_spellings_of_one_token_share_a_cache_entry(path: str, tmp_path: Path) -> None:
    with protected(True, tmp_path) as running:
        good = token()
        for spaces in range(1, 10):
            for scheme in ("Bearer", "bearer", "BEARER"):
                header = {"Authorization": f"{scheme}{' ' * spaces}{good}"}
                assert data_of(running.ask(gate(1, headers=header))) == [2]
        assert len(running.auth._cache) == 1


def test_scopes_without_meaning_here_are_dropped(tmp_path: Path) -> None:
    with protected(True, tmp_path) as running:
        good = token(scope="infer " + " ".join(f"x{n}" for n in range(500)))
        assert data_of(running.infer(good, 1)) == [2]
        recalled = running.auth.lookup([(AUTHORIZATION, f"Bearer {good}".encode())])
        assert isinstance(recalled, Principal)
        assert recalled.values == {"infer"}


def test_an_attack_from_many_addresses_does_not_throttle_new_addresses() -> None:
    now_s = 0.0
    throttle = SignatureThrottle(lambda: now_s)
    attackers = [f"2001:db8:{n:x}::1" for n in range(200)]
    for address in attackers:
        throttle.charge(address)
    for step in range(20_000):
        now_s = step / 5000
        address = attackers[step % len(attackers)]
        if throttle.wait_s(address) == 0:
            throttle.charge(address)
        assert throttle.wait_s("192.0.2.7") == 0
    assert any(throttle.wait_s(address) > 0 for address in attackers)


def test_a_token_without_sub_differs_from_a_sub_that_equals_its_tenant(tmp_path: Path) -> None:
    auth, _ = settings_in(tmp_path)
    relaxed = tuple(
        type(one)(
            issuer=one.issuer,
            name=one.name,
            key_files=one.key_files,
            tenant_claim="org",
            required_claims=("iss", "exp", "aud"),
        )
        for one in auth.issuers
    )
    authenticator = Authenticator(
        type(auth)(issuers=relaxed, audience=auth.audience), wall_clock=lambda: tokens.NOW_S
    )
    subjects = set()
    for claims in ({"org": "bob", "sub": None}, {"org": "other", "sub": "bob"}):
        signed = SIGNER.token(claims)
        principal = asyncio.run(
            authenticator.authenticate([(AUTHORIZATION, f"Bearer {signed}".encode())], b"", "")
        )
        subjects.add(principal.subject)
    assert len(subjects) == 2


@ALL
def test_a_batch_without_any_permission_is_refused_before_its_body(path: str, tmp_path: Path) -> None:
    with protected(path, tmp_path) as running:
        whole = batch(token(scope="nothing"), item())
        head = whole[: whole.index(b"\r\n\r\n") + 4]
        with running.served.connect() as client:
            client.send(head)
            assert (client.answer()).slug == "forbidden"


@ALL
def test_a_token_in_an_items_url_is_refused(path: str, tmp_path: Path) -> None:
    with protected(True, tmp_path) as running:
        answer = running.ask(batch(token(), item("/v2?access_token=SECRET", "GET")))
        assert b"SECRET" not in answer.body.replace(b'"id":"/v2?access_token=SECRET"', b"")
        assert answer.json["responses"][0]["status"] == 400


@ALL
@pytest.mark.parametrize("target", ["/batch%0A", GATE + "%0A"])
def test_an_encoded_line_end_is_not_found(path: str, target: str, tmp_path: Path) -> None:
    with protected(path, tmp_path) as running:
        assert running.ask(post(target, rows_of(1), bearer(token()))).slug == "not-found"


@ALL
def test_unauthenticated_clients_do_not_learn_versions(path: str, tmp_path: Path) -> None:
    with protected(path, tmp_path) as running:
        target = "/v2/models/gate/versions/9/ready"
        answer = running.ask(f"GET {target} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
        assert answer.slug == "unknown-version"
        assert "versions" not in answer.json
        assert running.ask(get_as(token(), "/v2/models/gate/versions/9")).json["versions"] == ["1"]
