"""The time of authentication: before the body and the queue, and again after a credential expired."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from unittest import mock

import pytest

from tests.support.auth.protected import Protected, get_as, infer, protected, token
from tests.support.auth.tokens import ISSUER
from tests.support.fronts.linked import WAYS
from tests.support.http.serving import DEADLINE_S, GATE, data_of, gate, get, post, rows_of


@pytest.fixture(scope="module", params=WAYS)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Protected]:
    folder = tmp_path_factory.mktemp("auth")
    with protected(request.param, folder, keys={"job": ("infer",)}) as running:
        yield running


def head_of(request: bytes, *more: str) -> bytes:
    """Return a request's headers without its body."""
    head = request[: request.index(b"\r\n\r\n") + 2]
    return head + "".join(f"{line}\r\n" for line in more).encode() + b"\r\n"


@pytest.mark.parametrize("expect", [(), ("Expect: 100-continue",)])
@pytest.mark.parametrize("where", [GATE, "/batch", "/v1/models/gate/predictions", "/v2/models/none/infer"])
def test_refused_before_the_body_is_read(running: Protected, where: str, expect: tuple[str, ...]) -> None:
    cases = [
        (post(where, rows_of(1)), 401),
        (post(where, rows_of(1), {"Authorization": "Bearer a b"}), 400),
        (post(where, rows_of(1), {"Authorization": "Bearer x"}), 401),
        (post(where, rows_of(1), {"X-API-Key": "x"}), 401),
    ]
    if where != "/batch":
        cases.append((post(where, rows_of(1), {"Authorization": f"Bearer {token(scope='admin')}"}), 403))
    for request, status in cases:
        with running.served.connect() as client:
            # The first answer is not "100 Continue".
            assert client.ask(head_of(request, *expect)).status == status


def test_an_accepted_request_gets_100_continue(running: Protected) -> None:
    request = infer(token(), 4)
    with running.served.connect() as client:
        assert client.ask(head_of(request, "Expect: 100-continue")).status == 100
        assert data_of(client.ask(request[request.index(b"\r\n\r\n") + 4 :])) == [8]


def test_a_connection_survives_refusals(running: Protected) -> None:
    with running.served.connect() as client:
        assert client.ask(gate(1)).status == 401
        assert data_of(client.ask(infer(token(), 2))) == [4]
        assert client.ask(gate(1)).status == 401
        assert client.ask(infer(token(scope="admin"), 2)).status == 403
        assert data_of(client.ask(infer(token(), 3))) == [6]


def test_refused_before_a_queue_slot_is_taken_and_while_the_queue_is_full(running: Protected) -> None:
    batcher = running.served.batcher()
    counted = (batcher.counters.accepted, batcher.counters.refused)
    for request in (gate(1), infer("x"), infer(token(scope="admin"))):
        assert running.ask(request).status in (401, 403)
    assert (batcher.counters.accepted, batcher.counters.refused) == counted
    running.engine.hold()
    with contextlib.ExitStack() as stack:
        waiting = []
        while batcher.queue.rows < batcher.admission.open_rows:
            accepted = batcher.counters.accepted
            waiting.append(stack.enter_context(running.served.connect()))
            waiting[-1].send(infer(token("bob"), *[2] * min(40, 100 - batcher.queue.rows)))
            running.served.until(lambda before=accepted: batcher.counters.accepted > before)  # type: ignore[misc]
            if len(waiting) == 1:
                running.engine.began.get(timeout=DEADLINE_S)
        assert running.ask(gate(1)).status == 401
        assert running.ask(infer(token(scope="admin"))).status == 403
        assert running.ask(infer(token())).slug == "queue-full"
        running.engine.release()
        assert {client.answer().status for client in waiting} == {200}


def test_pipelined_requests_are_authenticated_one_by_one(running: Protected) -> None:
    with running.served.connect() as client:
        client.send(infer(token(), 1) + gate(2) + infer(token(scope="admin"), 3) + infer(token(), 4))
        assert [client.answer().status for _ in range(4)] == [200, 401, 403, 200]


# Cached credentials


def cache(running: Protected, client_request: bytes) -> None:
    """Send a request until the fast path of each process has cached its header block."""
    for _ in running.auths:
        with running.served.connect() as client:
            for _ in range(3):
                assert client.ask(client_request).status == 200


def test_a_cached_token_is_refused_after_its_expiry(running: Protected) -> None:
    request = infer(token(jti="ends"))
    with running.served.connect() as client:
        for _ in range(3):
            assert client.ask(request).status == 200
        # It is valid for 600 s and 10 s of leeway.
        running.clock.ahead_s += 600
        assert client.ask(request).status == 200
        running.clock.ahead_s += 10
        for _ in range(2):
            answer = client.ask(request)
            assert (answer.status, answer.slug) == (401, "invalid-credentials")
            assert "expired" in answer.json["detail"]
        # The clock was wrong, and is set back.
        running.clock.ahead_s -= 610
        assert client.ask(request).status == 200


def test_a_cached_token_is_refused_after_its_key_was_withdrawn(running: Protected) -> None:
    request = infer(token(jti="withdrawn"))
    with running.served.connect() as client:
        for _ in range(3):
            assert client.ask(request).status == 200
        with contextlib.ExitStack() as stack:
            for auth in running.auths:
                key = auth._keys[ISSUER].get("key-ES256", "ES256")
                assert key is not None
                stack.enter_context(mock.patch.object(auth._keys[ISSUER], "get", return_value=None))
                running.served.call(partial(auth._withdraw, key))
            for _ in range(2):
                answer = client.ask(request)
                assert (answer.status, answer.slug) == (401, "invalid-credentials")
        # The key is back: the refusal was not cached.
        assert client.ask(request).status == 200


def test_a_good_tokens_signature_is_checked_once(running: Protected) -> None:
    fresh = infer(token(jti="once"))
    cache(running, fresh)
    with mock.patch("cobatch.server.auth.tokens._check_signature", side_effect=AssertionError):
        cache(running, fresh)
        assert running.ask(head_of(fresh, "X-Other: 1") + fresh.partition(b"\r\n\r\n")[2]).status == 200


def test_an_api_key_expires_on_a_cached_header_block(running: Protected) -> None:
    request = gate(1, headers={"X-API-Key": running.keys["job"]})
    with running.served.connect() as client:
        assert client.ask(request).status == 200
        (auth,) = [one for one in running.auths if one._api_key_principals]
        keys = auth._api_keys
        assert keys is not None
        (principal,) = auth._api_key_principals.values()
        (entry,) = keys._keys.values()
        principal.expires_s = running.clock.wall() - 1
        with mock.patch.dict(keys._keys, {entry.id: entry._replace(expires_s=principal.expires_s)}):
            assert client.ask(request).slug == "invalid-credentials"


# Open routes


def test_open_routes_need_no_credentials(running: Protected) -> None:
    for target in ("/v2/health/live", "/v2/health/ready", "/v2/models/gate/ready", "/problems"):
        assert running.ask(get(target)).status == 200
        # The header is ignored: a probe must not depend on an issuer.
        assert running.ask(get_as("x", target)).status == 200
