"""Every end of a request releases its tenant's limits; the RateLimit headers report them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cobatch.engines.errors import EngineDeadError, EngineRunError
from cobatch.server.settings.auth import TenantRule
from tests.support.auth.protected import Protected, batch, get_as, infer, item, predict, protected, token
from tests.support.fronts.linked import WAYS
from tests.support.http.serving import Answer, data_of, get, post, rows_of

RULES = (
    TenantRule(tenant="a", max_concurrent=3, max_queue_rows=50),
    TenantRule(tenant="slow", requests_per_s=0.001, burst=3),
    TenantRule(tenant="both", max_concurrent=2, requests_per_s=1000),
)


@pytest.fixture(params=WAYS)
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Protected]:
    with protected(request.param, tmp_path, tenants=RULES, rate_limit_headers=True) as running:
        yield running


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("rows", [1, 4, 10])
def test_a_disconnected_client(running: Protected, stack: contextlib.ExitStack, rows: int) -> None:
    running.occupy(stack)
    clients = [
        running.send(stack, data)
        for data in (infer(token("a"), *range(rows)), predict(token("a"), *range(rows)))
    ]
    assert running.account("a") == (2, 2 * rows)
    for client in clients:
        client.close()
    running.served.until(lambda: running.account("a") == (0, 0))


def test_a_disconnected_client_of_a_batch(running: Protected, stack: contextlib.ExitStack) -> None:
    running.occupy(stack)
    client = running.send(stack, batch(token("a"), *[item(id=str(n)) for n in range(3)]))
    running.served.until(lambda: running.account("a") == (3, 3))
    client.close()
    running.served.until(lambda: running.account("a") == (0, 0))


def test_a_client_that_disconnects_during_the_run(running: Protected, stack: contextlib.ExitStack) -> None:
    running.engine.hold()
    client = running.send(stack, infer(token("a"), *range(10)))
    running.engine.began.get(timeout=60)
    client.close()
    running.served.until(lambda: running.account("a") == (0, 0))
    running.engine.release()
    assert running.infer(token("a")).status == 200
    assert running.account("a") == (0, 0)


def test_a_cancelled_prediction(running: Protected, stack: contextlib.ExitStack) -> None:
    running.occupy(stack)
    accepted = running.ask(predict(token("a"), 1, 2, Prefer="respond-async"))
    # It counts as open until it finishes, although its HTTP request is answered.
    assert running.account("a") == (1, 2)
    running.ask(get_as(token("a"), accepted.headers["location"], "DELETE"))
    assert running.account("a") == (0, 0)


@pytest.mark.parametrize("rows", [1, 10])
def test_a_failed_run(running: Protected, rows: int) -> None:
    running.engine.fails = lambda x: EngineRunError("13 is unlucky") if (x == 13).any() else None
    for request in (infer(token("a"), *[13] * rows), predict(token("a"), *[13] * rows)):
        assert running.ask(request).slug == "input-rejected"
        assert running.account("a") == (0, 0)
    answer = running.ask(batch(token("a"), *[item(id=str(n), body=rows_of(n)) for n in (12, 13, 14)]))
    assert [each["status"] for each in answer.json["responses"]] == [200, 422, 200]
    assert running.account("a") == (0, 0)


def test_a_failing_item_counts_once_and_the_rows_of_others_count(running: Protected) -> None:
    running.engine.fails = lambda x: EngineRunError("13 is unlucky") if (x == 13).any() else None
    running.ask(batch(token("a"), *[item(id=str(n), body=rows_of(n)) for n in (12, 13, 14)]))
    total = dict(running.auth.tenants.totals())["a"]
    assert (total.answered, total.failed, total.refused, total.rows) == (2, 1, 0, 2)


def test_a_dead_engine(running: Protected, stack: contextlib.ExitStack) -> None:
    clients = running.occupy(stack)
    clients += [running.send(stack, infer(token("a"), *range(rows))) for rows in (1, 10)]
    running.engine.fails = lambda x: EngineDeadError("the device fell off")
    running.engine.release()
    assert {client.answer().status for client in clients} == {503}
    assert running.account("a") == running.account("occupant") == (0, 0)


@pytest.mark.parametrize("rows", [1, 10])
def test_an_expired_request(running: Protected, stack: contextlib.ExitStack, rows: int) -> None:
    running.occupy(stack)
    request = rows_of(*range(rows), parameters={"timeout": 1000})
    answer = running.ask(post("/v2/models/gate/infer", request, {"Authorization": f"Bearer {token('a')}"}))
    assert (answer.status, answer.slug) == (504, "expired")
    assert running.account("a") == (0, 0)


def test_an_output_of_an_unexpected_shape(running: Protected) -> None:
    running.engine.answer_width = 3
    message = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "INT64", "data": [1, 2]}]}
    headers = {"Authorization": f"Bearer {token('a')}"}
    assert running.ask(post("/v2/models/gate/infer", message, headers)).status == 200
    assert running.account("a") == (0, 0)


def test_a_drain_answers_accepted_requests(running: Protected, stack: contextlib.ExitStack) -> None:
    running.occupy(stack)
    clients = [running.send(stack, infer(token("a"), *range(rows))) for rows in (1, 10)]
    running.served.stop()
    running.engine.release()
    assert [client.answer().status for client in clients] == [200, 200]
    running.served.join()
    assert running.account("a") == (0, 0)


@pytest.mark.parametrize("path", WAYS)
def test_a_drain_abandons_requests_after_its_timeout(
    path: str, tmp_path: Path, stack: contextlib.ExitStack
) -> None:
    with protected(path, tmp_path, tenants=RULES, server={"drain_timeout_s": 0.0}) as running:
        running.occupy(stack)
        clients = [running.send(stack, infer(token("a"), *range(rows))) for rows in (1, 10)]
        running.served.stop()
        assert [client.answer().slug for client in clients] == ["abandoned"] * 2
        running.engine.release()
        running.served.join()
        assert running.account("a") == (0, 0)


# The headers RateLimit and RateLimit-Policy (draft-ietf-httpapi-ratelimit-headers-10)


def rate_limit(answer: Answer) -> tuple[str, str]:
    return answer.headers["ratelimit-policy"], answer.headers["ratelimit"]


def test_rate_limit_headers(running: Protected) -> None:
    policy = '"requests";q=3;w=3000'
    for left in (2, 1, 0):
        # `t` falls with each second that passes, so only its range is checked.
        policies, state = rate_limit(running.infer(token("slow")))
        assert policies == policy
        assert state.startswith(f'"requests";r={left};t=')
        full_s = int(state.rpartition("=")[2])
        assert (2 - left) * 1000 < full_s <= (3 - left) * 1000
    for request in (infer(token("slow")), predict(token("slow"))):
        answer = running.ask(request)
        assert answer.status == 429
        assert rate_limit(answer)[1].startswith('"requests";r=0;t=')
    slow = token("slow")
    for request in (
        get_as(slow, "/v2/models/gate"),
        get_as(slow, "/none"),
        batch(slow, item()),
        infer(token("slow", scope="admin")),
    ):
        assert rate_limit(running.ask(request))[0] == policy


def test_rate_limit_headers_with_two_limits(running: Protected, stack: contextlib.ExitStack) -> None:
    policy = '"requests";q=1000;w=1, "concurrent";q=2;qu="concurrent-requests"'
    policies, state = rate_limit(running.infer(token("both")))
    assert policies == policy
    assert state.endswith(', "concurrent";r=2')
    clients = running.occupy(stack)
    clients += [running.send(stack, infer(token("both"))) for _ in range(2)]
    answer = running.infer(token("both"))
    assert answer.status == 429
    assert rate_limit(answer)[1].endswith(', "concurrent";r=0')
    running.engine.release()
    assert [data_of(client.answer()) for client in clients[2:]] == [[2], [2]]


def test_other_tenants_and_open_routes_have_no_rate_limit_headers(running: Protected) -> None:
    bob = token("bob")
    for request in (
        infer(bob),
        infer(token("bob", "admin")),
        predict(bob),
        infer("x"),
        get("/v2"),
        get_as(token("slow"), "/v2/health/live"),
    ):
        headers = running.ask(request).headers
        assert not headers.keys() & {"ratelimit", "ratelimit-policy"}


@pytest.mark.parametrize("path", WAYS)
def test_rate_limit_headers_are_off_by_default(path: str, tmp_path: Path) -> None:
    with protected(path, tmp_path, tenants=RULES) as running:
        for request in (infer(token("slow")), predict(token("slow"))):
            assert "ratelimit" not in running.ask(request).headers
