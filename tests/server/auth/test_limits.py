"""What one tenant may have in the server, over the wire: concurrent requests, queued rows, a rate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cobatch.server.settings.auth import TenantRule
from tests.support.auth.protected import Protected, batch, infer, item, predict, protected, token
from tests.support.http.serving import DEADLINE_S, Answer, data_of, gate

RULES = (
    TenantRule(tenant="two", max_concurrent=2),
    TenantRule(tenant="rows", max_queue_rows=6),
    TenantRule(tenant="slow", requests_per_s=0.001, burst=3),
    TenantRule(scope="silver", max_concurrent=1),
)


@pytest.fixture(params=["fast", "asgi"])
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Protected]:
    with protected(request.param == "fast", tmp_path, tenants=RULES, keys={"two": ("infer",)}) as running:
        yield running


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def limited(answer: Answer, **members: object) -> int:
    """Checks that it is this limit's refusal; Retry-After."""
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
    said = {"tenant": "two", "what": "concurrent requests", "used": 2, "limit": 2}
    request = infer(token("two"))
    with running.served.connect() as client:
        # Before the body.
        limited(client.ask(request[: request.index(b"\r\n\r\n") + 4]), **said)
    limited(running.ask(predict(token("two"))), **said)
    limited(running.ask(predict(token("two"), Prefer="respond-async")), **said)
    # A tenant is one, whatever it shows.
    limited(running.ask(gate(1, headers={"X-API-Key": running.keys["two"]})), **said)
    limited(running.ask(infer(token("two", "infer silver"))), **said)
    limited(running.ask(batch(token("two"), *items(3))), **said)
    assert running.account("two") == (2, 2)
    # Others are not affected.
    waiting.append(running.send(stack, infer(token("bob"), 3)))
    running.engine.release()
    assert {client.answer().status for client in waiting} == {200}
    assert running.account("two") == running.account("bob") == (0, 0)
    assert data_of(running.infer(token("two"), 4)) == [8]


def test_a_limit_on_a_header_block_that_is_known(running: Protected, stack: contextlib.ExitStack) -> None:
    client = stack.enter_context(running.served.connect())
    for _ in range(3):
        assert client.ask(infer(token("two"))).status == 200
    waiting = [running.send(stack, infer(token("two"))) for _ in running.occupy(stack)]
    for _ in range(2):
        limited(client.ask(infer(token("two"))), used=2)
    running.engine.release()
    assert {one.answer().status for one in waiting} == {200}
    assert client.ask(infer(token("two"))).status == 200


def test_a_class_of_tenants_has_the_limit_each(running: Protected, stack: contextlib.ExitStack) -> None:
    running.occupy(stack)
    waiting = [running.send(stack, infer(token(name, "infer silver"))) for name in ("ann", "bob")]
    for name in ("ann", "bob"):
        limited(running.infer(token(name, "silver infer")), tenant=name, limit=1)
    waiting.append(running.send(stack, infer(token("ann"))))
    running.engine.release()
    assert {client.answer().status for client in waiting} == {200}


def test_a_batchs_items_count_each(running: Protected) -> None:
    assert statuses(running.ask(batch(token("two"), *items(2)))) == [200] * 2
    got = statuses(running.ask(batch(token("two"), *items(5))))
    assert sorted(got) == [200] * 2 + [429] * 3
    assert running.account("two") == (0, 0)


# Rows in the queue


def test_rows_in_the_queue(running: Protected, stack: contextlib.ExitStack) -> None:
    waiting = running.occupy(stack)
    # More rows than one batch takes: in parts.
    waiting.append(running.send(stack, infer(token("rows"), *range(6))))
    assert running.account("rows") == (1, 6)
    said = {"tenant": "rows", "what": "queued rows", "used": 6, "limit": 6}
    for answer in (running.infer(token("rows")), running.ask(predict(token("rows")))):
        limited(answer, **said)
    limited(running.ask(batch(token("rows"), *items(2))), **said)
    waiting.append(running.send(stack, infer(token("bob"), *range(20))))
    running.engine.release()
    assert {client.answer().status for client in waiting} == {200}
    assert running.account("rows") == running.account("bob") == (0, 0)
    # What could never be queued is not worth a second try.
    answer = running.infer(token("rows"), *range(7))
    assert (answer.status, answer.slug, answer.json["limit"]) == (413, "too-many-rows", 6)
    assert "retry-after" not in answer.headers
    assert data_of(running.infer(token("rows"), *range(6))) == [0, 2, 4, 6, 8, 10]


def test_rows_that_would_be_too_many_show_in_the_body_only(
    running: Protected, stack: contextlib.ExitStack
) -> None:
    running.occupy(stack)
    running.send(stack, infer(token("rows"), *range(4)))
    limited(running.infer(token("rows"), 1, 2, 3), used=4, limit=6)
    running.send(stack, infer(token("rows"), 1, 2))
    assert running.account("rows") == (2, 6)


# The rate


def test_a_rate(running: Protected, stack: contextlib.ExitStack) -> None:
    client = stack.enter_context(running.served.connect())
    slow, other = (token(name, exp=2_000_000_000) for name in ("slow", "bob"))
    for _ in range(3):
        assert client.ask(infer(slow)).status == 200
    said = {"tenant": "slow", "what": "requests at once", "used": 3, "limit": 3}
    for _ in range(2):
        assert 900 < limited(client.ask(infer(slow)), **said) <= 1000
    limited(running.ask(predict(slow)), **said)
    limited(running.ask(batch(slow, *items(2))), **said)
    running.clock.ahead_s += 900
    assert limited(client.ask(infer(slow)), **said) <= 100
    running.clock.ahead_s += 100
    assert client.ask(infer(slow)).status == 200
    assert limited(client.ask(infer(slow)), **said) > 900
    assert data_of(running.infer(other, 2)) == [4]


def test_a_batch_takes_of_the_rate_what_is_there(running: Protected) -> None:
    assert sorted(statuses(running.ask(batch(token("slow"), *items(5))))) == [200] * 3 + [429] * 2
    assert running.infer(token("slow")).status == 429
    assert running.account("slow") == (0, 0)


def test_what_is_refused_takes_nothing_of_the_rate(running: Protected, stack: contextlib.ExitStack) -> None:
    assert running.infer(token("slow"), *range(101)).status == 413
    assert running.ask(predict(token("slow")).replace(b"inputs", b"imputs")).status == 400
    assert running.infer(token("slow"), model="none").status == 404
    running.engine.hold()
    clients = [running.send(stack, infer(token("slow"))) for _ in range(3)]
    assert running.engine.began.get(timeout=DEADLINE_S)
    limited(running.infer(token("slow")))
    running.engine.release()
    assert {client.answer().status for client in clients} == {200}
