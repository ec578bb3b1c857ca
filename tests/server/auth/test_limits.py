"""Limits per tenant over the wire: concurrent requests, queued rows, request rate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cobatch.server.settings.auth import TenantRule
from tests.support.auth.protected import Protected, batch, infer, item, predict, protected, token
from tests.support.fronts.linked import WAYS
from tests.support.http.serving import DEADLINE_S, Answer, data_of, gate

RULES = (
    TenantRule(tenant="two", max_concurrent=2),
    TenantRule(tenant="rows", max_queue_rows=6),
    TenantRule(tenant="slow", requests_per_s=0.001, burst=3),
    TenantRule(scope="silver", max_concurrent=1),
)


@pytest.fixture(params=WAYS)
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Protected]:
    with protected(request.param, tmp_path, tenants=RULES, keys={"two": ("infer",)}) as running:
        yield running


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def limited(answer: Answer, **members: object) -> int:
    """Check a refusal by a tenant limit; return Retry-After in seconds."""
    assert (answer.status, answer.slug) == (429, "tenant-limit")
    assert answer.json.items() >= members.items()
    wait_s = int(answer.headers["retry-after"])
    assert wait_s >= 1
    assert (wait_s - 1) * 1000 < answer.json["retry_after_ms"] <= max(1, wait_s) * 1000
    return wait_s


def statuses(answer: Answer) -> list[int]:
    assert answer.status == 200
    return [each["status"] for each in answer.json["responses"]]


def items(count: int, **more: Any) -> list[dict[str, Any]]:
    return [item(id=str(n), **more) for n in range(count)]


# Concurrent requests


def test_concurrent_requests(running: Protected, stack: contextlib.ExitStack) -> None:
    waiting = running.occupy(stack)
    waiting += [running.send(stack, infer(token("two", jti=str(n)), n)) for n in (1, 2)]
    assert running.account("two") == (2, 2)
    members = {"tenant": "two", "what": "concurrent requests", "used": 2, "limit": 2}
    request = infer(token("two"))
    with running.served.connect() as client:
        # Refused before the body is read.
        limited(client.ask(request[: request.index(b"\r\n\r\n") + 4]), **members)
    limited(running.ask(predict(token("two"))), **members)
    limited(running.ask(predict(token("two"), Prefer="respond-async")), **members)
    # All credentials of a tenant share its limit.
    limited(running.ask(gate(1, headers={"X-API-Key": running.keys["two"]})), **members)
    limited(running.ask(infer(token("two", "infer silver"))), **members)
    limited(running.ask(batch(token("two"), *items(3))), **members)
    assert running.account("two") == (2, 2)
    # Other tenants are not affected.
    waiting.append(running.send(stack, infer(token("bob"), 3)))
    running.engine.release()
    assert {client.answer().status for client in waiting} == {200}
    assert running.account("two") == running.account("bob") == (0, 0)
    assert data_of(running.infer(token("two"), 4)) == [8]


def test_a_limit_applies_to_a_cached_header_block(running: Protected, stack: contextlib.ExitStack) -> None:
    client = stack.enter_context(running.served.connect())
    for _ in range(3):
        assert client.ask(infer(token("two"))).status == 200
    waiting = [running.send(stack, infer(token("two"))) for _ in running.occupy(stack)]
    for _ in range(2):
        limited(client.ask(infer(token("two"))), used=2)
    running.engine.release()
    assert {one.answer().status for one in waiting} == {200}
    assert client.ask(infer(token("two"))).status == 200


def test_each_tenant_of_a_class_has_its_own_limit(running: Protected, stack: contextlib.ExitStack) -> None:
    running.occupy(stack)
    waiting = [running.send(stack, infer(token(name, "infer silver"))) for name in ("ann", "bob")]
    for name in ("ann", "bob"):
        limited(running.infer(token(name, "silver infer")), tenant=name, limit=1)
    waiting.append(running.send(stack, infer(token("ann"))))
    running.engine.release()
    assert {client.answer().status for client in waiting} == {200}


def test_each_item_of_a_batch_counts(running: Protected) -> None:
    assert statuses(running.ask(batch(token("two"), *items(2)))) == [200] * 2
    got = statuses(running.ask(batch(token("two"), *items(5))))
    assert sorted(got) == [200] * 2 + [429] * 3
    assert running.account("two") == (0, 0)


# Queued rows


def test_queued_rows(running: Protected, stack: contextlib.ExitStack) -> None:
    waiting = running.occupy(stack)
    # More rows than fit into one batch, so the request is split.
    waiting.append(running.send(stack, infer(token("rows"), *range(6))))
    assert running.account("rows") == (1, 6)
    members = {"tenant": "rows", "what": "queued rows", "used": 6, "limit": 6}
    for answer in (running.infer(token("rows")), running.ask(predict(token("rows")))):
        limited(answer, **members)
    limited(running.ask(batch(token("rows"), *items(2))), **members)
    waiting.append(running.send(stack, infer(token("bob"), *range(20))))
    running.engine.release()
    assert {client.answer().status for client in waiting} == {200}
    assert running.account("rows") == running.account("bob") == (0, 0)
    # A request that could never be queued gets no Retry-After.
    answer = running.infer(token("rows"), *range(7))
    assert (answer.status, answer.slug, answer.json["limit"]) == (413, "too-many-rows", 6)
    assert "retry-after" not in answer.headers
    assert data_of(running.infer(token("rows"), *range(6))) == [0, 2, 4, 6, 8, 10]


def test_a_row_limit_that_only_the_body_exceeds(running: Protected, stack: contextlib.ExitStack) -> None:
    running.occupy(stack)
    running.send(stack, infer(token("rows"), *range(4)))
    limited(running.infer(token("rows"), 1, 2, 3), used=4, limit=6)
    running.send(stack, infer(token("rows"), 1, 2))
    assert running.account("rows") == (2, 6)


# Request rate


def test_request_rate(running: Protected, stack: contextlib.ExitStack) -> None:
    client = stack.enter_context(running.served.connect())
    slow, other = (token(name, exp=2_000_000_000) for name in ("slow", "bob"))
    for _ in range(3):
        assert client.ask(infer(slow)).status == 200
    members = {"tenant": "slow", "what": "requests of its rate limit", "used": 3, "limit": 3}
    members["detail"] = "tenant 'slow' has used 3 of 3 requests of its rate limit"
    for _ in range(2):
        assert 900 < limited(client.ask(infer(slow)), **members) <= 1000
    limited(running.ask(predict(slow)), **members)
    limited(running.ask(batch(slow, *items(2))), **members)
    running.clock.ahead_s += 900
    assert limited(client.ask(infer(slow)), **members) <= 100
    running.clock.ahead_s += 100
    assert client.ask(infer(slow)).status == 200
    assert limited(client.ask(infer(slow)), **members) > 900
    assert data_of(running.infer(other, 2)) == [4]


def test_a_batch_uses_the_rest_of_the_rate(running: Protected) -> None:
    assert sorted(statuses(running.ask(batch(token("slow"), *items(5))))) == [200] * 3 + [429] * 2
    assert running.infer(token("slow")).status == 429
    assert running.account("slow") == (0, 0)


def test_refused_requests_do_not_use_the_rate(running: Protected, stack: contextlib.ExitStack) -> None:
    assert running.infer(token("slow"), *range(101)).status == 413
    assert running.ask(predict(token("slow")).replace(b"inputs", b"imputs")).status == 400
    assert running.infer(token("slow"), model="none").status == 404
    running.engine.hold()
    clients = [running.send(stack, infer(token("slow"))) for _ in range(3)]
    assert running.engine.began.get(timeout=DEADLINE_S)
    limited(running.infer(token("slow")))
    running.engine.release()
    assert {client.answer().status for client in clients} == {200}
