"""Open and protected routes, and the isolation of models and predictions between clients."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.routing import Route

from cobatch.server.auth.gate import OPEN
from cobatch.server.settings.auth import ModelRule
from cobatch.server.settings.schema import ModelSettings
from tests.support.auth import tokens
from tests.support.auth.protected import (
    Protected,
    batch,
    get_as,
    infer,
    item,
    predict,
    protected,
    settings_in,
    token,
)
from tests.support.fronts.linked import WAYS
from tests.support.http.in_process import in_process
from tests.support.http.serving import DEADLINE_S, GATE, Answer, GatedEngine, data_of, post, rows_of

OTHER = GATE.replace("gate", "other")


async def test_every_route_is_protected_or_listed_as_open(tmp_path: Path) -> None:
    auth, _ = settings_in(tmp_path)
    model = ModelSettings(path="gate", max_batch_size=4)
    async with in_process(model, engines={"gate": GatedEngine()}, auth=auth) as running:
        app = running.starlette
        fill = {"{name}": "gate", "{version}": "1", "{id}": "x", "{slug}": "draining", "{file}": "style.css"}
        paths: dict[str, set[str]] = {}
        for route in app.routes:
            assert isinstance(route, Route), "what is it, and who may ask it?"
            path = route.path
            for parameter, value in fill.items():
                path = path.replace(parameter, value)
            assert "{" not in path
            paths.setdefault(path, set()).update(route.methods or ())
        opened = set()
        powerless = token(**tokens.good_claims(time.time()) | {"scope": "nothing"})
        for path, methods in paths.items():
            for method in {*methods, "GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"}:
                answer = await running.http.request(method, path)
                if answer.status_code != 401:
                    assert OPEN.fullmatch(path), path
                    opened.add((method, path))
                known = await running.http.request(
                    method, path, headers={"Authorization": f"Bearer {powerless}"}
                )
                if method not in methods:
                    assert known.status_code == 405, (method, path, known.text)
                elif (method, path) not in opened:
                    # The server's name needs no permission.
                    expected = {"/v1/predictions/x": 404, "/v2": 200, "/v2/": 200}.get(path, 403)
                    assert known.status_code == expected, (method, path)
        assert opened == {
            (method, path)
            for method in ("GET", "HEAD")
            for path in (
                "/v2/health/live", "/v2/health/ready", "/v2/models/gate/ready",
                "/v2/models/gate/versions/1/ready", "/", "/problems", "/problems/draining",
                "/.well-known/oauth-protected-resource", "/dashboard", "/dashboard/static/style.css",
            )
        }  # fmt: skip


@pytest.fixture(params=WAYS)
def running(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Protected]:
    rules = (ModelRule(model="other", tenants=("red",), scopes=("gold",)),)
    with protected(request.param, tmp_path, keys={"red": ("infer",)}, models=rules) as running:
        yield running


# Models


def test_a_model_rule_is_required_beside_the_permission(running: Protected) -> None:
    for credential in (token("red"), token("bob", "infer gold"), token("red", "infer:other")):
        assert data_of(running.infer(credential, 2, model="other")) == [4]
    for credential in (token("bob"), token("red", "infer:gate"), token("bob", "gold"), token("Red")):
        answer = running.infer(credential, 2, model="other")
        assert (answer.status, answer.slug, answer.json["model"]) == (403, "forbidden", "other")
        assert running.ask(get_as(credential, "/v2/models/other")).status == 403
    # A model without a rule needs only the permission.
    assert data_of(running.infer(token("bob"), 2)) == [4]
    assert running.ask(post(OTHER, rows_of(1), {"X-API-Key": running.keys["red"]})).status == 200
    assert running.ask(get_as(token("bob", "metadata"), "/v2/models/other")).status == 200


def test_a_forbidden_model_looks_like_a_missing_one(running: Protected) -> None:
    known = running.infer(token(scope="infer:gate"), model="other")
    unknown = running.infer(token(scope="infer:gate"), model="others")
    assert known.body.replace(b"other", b"others") == unknown.body
    assert known.headers["www-authenticate"].replace("other", "others") == unknown.headers["www-authenticate"]


def test_a_cached_header_block_belongs_to_one_client(running: Protected) -> None:
    with running.served.connect() as client:
        for _ in range(3):
            assert data_of(client.ask(infer(token("red"), model="other"))) == [2]
            assert client.ask(infer(token("bob"), model="other")).status == 403


# Batches


def test_a_batch_needs_credentials_and_its_items_inherit_them(running: Protected) -> None:
    assert running.ask(batch(None, item(GATE))).slug == "unauthenticated"
    assert running.ask(batch("x", item(GATE))).slug == "invalid-credentials"
    own = item(GATE, headers={"authorization": f"Bearer {token()}"})
    answer = running.ask(batch(token(scope="admin"), own))
    assert [each["status"] for each in answer.json["responses"]] == [400]


def test_items_for_forbidden_models_are_refused_and_the_others_run(running: Protected) -> None:
    items = [item(GATE), item(OTHER), item("/v2/models/gate", "GET"), item("/v2/models/other", "GET"),
             item(f"{GATE}?x=1"), item(f"{OTHER}?x=1"), item("/v2/models/stats", "GET"),
             item("/v2/health/live", "GET"), item("/v2/models/none/infer"),
             item(GATE.replace("gate", "gate/versions/1")), item(OTHER.replace("other", "other/versions/1")),
             item("/v1/models/gate/predictions", body={"inputs": {"x": [[3]]}})]  # fmt: skip
    answer = running.ask(batch(token("bob"), *items))
    assert answer.status == 200
    got = {each["id"]: each["status"] for each in answer.json["responses"]}
    expected = [200, 403, 400, 400, 200, 403, 400, 400, 404, 200, 403, 400]
    assert got == dict(zip([each["id"] for each in items], expected, strict=True))
    for each in answer.json["responses"]:
        if each["status"] == 403:
            assert each["body"]["type"] == "/problems/forbidden"
            assert each["headers"]["www-authenticate"].startswith("Bearer ")
    assert answer.json["responses"][8]["body"]["models"] == ["gate"]


def test_a_batch_of_one_forbidden_model(running: Protected) -> None:
    many = [{**item(OTHER), "id": str(n)} for n in range(20)]
    answer = running.ask(batch(token("bob"), *many))
    assert {each["status"] for each in answer.json["responses"]} == {403}
    assert running.served.batcher("other").counters.accepted == 0
    answer = running.ask(batch(token("red"), *many))
    assert {each["status"] for each in answer.json["responses"]} == {200}


# Predictions


def test_a_prediction_belongs_to_its_subject(running: Protected) -> None:
    running.engine.hold()
    accepted = running.ask(predict(token("red"), Prefer="respond-async"))
    assert accepted.status == 202
    location = accepted.headers["location"]
    running.engine.began.get(timeout=DEADLINE_S)
    others = [token("bob"), token("bob", "admin"), running.keys["red"]]
    for method in ("GET", "DELETE"):
        for credential in others[:2]:
            answer = running.ask(get_as(credential, location, method))
            assert (answer.status, answer.slug) == (404, "unknown-prediction")
            nothing = running.ask(get_as(credential, location[:-4] + "AAAA", method))
            named, other = (path.rpartition("/")[2].encode() for path in (location, location[:-4] + "AAAA"))
            assert nothing.body.replace(other, named) == answer.body
        # A tenant's API key and its token are different subjects.
        key = f"{method} {location} HTTP/1.1\r\nHost: x\r\nX-API-Key: {others[2]}\r\n\r\n".encode()
        assert running.ask(key).slug == "unknown-prediction"
    assert running.ask(get_as(token("red", "metadata", jti="later"), location)).json["status"] == "running"
    running.engine.release()
    done = running.ask(get_as(token("red"), location).replace(b"Host", b"Prefer: wait=20\r\nHost"))
    assert done.json["outputs"]["y"]["data"] == [[6]]


def test_an_idempotency_key_belongs_to_its_subject(running: Protected) -> None:
    def of(answer: Answer) -> str:
        assert answer.status == 200
        return str(json.loads(answer.body)["id"])

    first = of(running.ask(predict(token("red"), **{"Idempotency-Key": "k"})))
    assert of(running.ask(predict(token("red", jti="2"), **{"Idempotency-Key": "k"}))) == first
    assert of(running.ask(predict(token("bob"), **{"Idempotency-Key": "k"}))) != first
