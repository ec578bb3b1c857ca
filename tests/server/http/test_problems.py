"""Problems: each kind that a request can cause, with all its parts; 404, 405 and HEAD."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from cobatch.batcher.errors import BatcherError, DeadlineTooShortError, DeadlineUnreachableError
from cobatch.engines.errors import BadRequest, EngineDeadError, EngineError, EngineRunError
from cobatch.server.http.problem import ALWAYS, KINDS, SOMETIMES
from cobatch.server.inference.model import Model
from cobatch.server.settings.auth import AuthSettings, Issuer, TenantRule
from tests.support.auth.protected import SIGNER, settings_in
from tests.support.auth.tokens import AUDIENCE, ISSUER, good_claims
from tests.support.http.in_process import Front, InProcess, gated
from tests.support.http.serving import GATE, GatedEngine, rows_of
from tests.support.paths import ROOT

PREDICTIONS = "/v1/models/gate/predictions"
X: dict[str, Any] = {"name": "x", "shape": [1, 1], "datatype": "INT64", "data": [1]}
NO_DATA = {name: value for name, value in X.items() if name != "data"}

# Kinds that other tests cause: those of the connection, of the worker, and of predictions.
ELSEWHERE = {
    "abandoned",
    "answer-too-long",
    "bad-http",
    "body-memory",
    "cancelled",
    "engine-restarting",
    "execution-timeout",
    "expired",
    "headers-too-large",
    "idempotency-mismatch",
    "profile-running",
    "receive-timeout",
    "result-too-large",
    "text-too-long",
    "too-many-elements",
    "too-many-predictions",
    "wrong-body",
    "unsupported-transfer-coding",
}


@pytest.fixture(autouse=True, params=[False, True], ids=["one", "front"])
def front(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test with one process, and with a front."""
    monkeypatch.setattr(Front, "wanted", request.param)


def infer(body: Any, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """Arguments of a POST to `gate`."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return {"method": "POST", "url": GATE, "content": content, "headers": headers}


def x(**changed: Any) -> dict[str, Any]:
    return infer({"inputs": [X | changed]})


def batch(*items: dict[str, Any]) -> dict[str, Any]:
    return {"method": "POST", "url": "/batch", "json": {"requests": items}}


# Requests that cause each kind at a server with one model, `gate`.
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "not-json": [infer(b"{"), {"method": "POST", "url": "/batch", "content": b"\xff"}],
    "bad-request": [infer({}), {"method": "POST", "url": "/batch", "json": []}],
    "unknown-tensor": [x(name="y"), infer(rows_of(1) | {"outputs": [{"name": "z"}]})],
    "duplicate-tensor": [infer({"inputs": [X, X]})],
    "missing-tensor": [infer({"inputs": []}), infer({"inputs": [NO_DATA]})],
    "bad-parameter": [infer(rows_of(1, parameters={"triton_x": 1}))],
    "bad-binary": [infer(rows_of(1), {"inference-header-content-length": "9999"})],
    "bad-encoding": [infer(b"{}", {"content-encoding": "gzip"})],
    "duplicate-id": [batch(*[{"id": "a", "url": "/v2", "method": "GET"}] * 2)],
    "unknown-version": [{"method": "GET", "url": "/v2/models/gate/versions/9"}],
    "unknown-model": [
        {"method": "GET", "url": "/v2/models/none"},
        {"method": "POST", "url": "/v2/models/none/infer", "json": {}},
    ],
    "unknown-request": [{"method": "GET", "url": "/v1/requests/none"}],
    "unknown-prediction": [{"method": "GET", "url": "/v1/predictions/none"}],
    "not-found": [
        {"method": "GET", "url": url} for url in ("/v2/models", "/v2/models/gate/infer/", "/problems/none")
    ],
    "method-not-allowed": [
        {"method": "GET", "url": GATE},
        {"method": "DELETE", "url": "/v2"},
        {"method": "PUT", "url": "/problems"},
        {"method": "GET", "url": "/batch"},
    ],
    "body-too-large": [infer(b" " * 5000), {"method": "POST", "url": "/batch", "content": b" " * 5000}],
    "too-many-rows": [infer(rows_of(*range(9)))],
    "too-many-items": [batch(*[{"id": str(n), "url": "/v2", "method": "GET"} for n in range(4)])],
    "unsupported-encoding": [infer(b"{}", {"content-encoding": "br"})],
    "unsupported-media-type": [
        {"method": "POST", "url": PREDICTIONS, "content": b"x", "headers": {"content-type": "text/plain"}}
    ],
    "wrong-shape": [x(shape=[1])],
    "wrong-datatype": [x(datatype="FP32")],
    "wrong-data": [x(data=[1, 2]), x(data=[2**70]), x(data=[0.5]), x(data=["a"]), x(data=[[1], 2])],
}


def check(answer: httpx.Response, slug: str, path: str) -> dict[str, Any]:
    """Check a problem's parts; return its body."""
    kind = KINDS[slug]
    body: dict[str, Any] = answer.json()
    assert (answer.status_code, body["type"]) == (kind.status, f"/problems/{slug}"), body
    assert answer.headers["content-type"] == "application/problem+json"
    assert body["status"] == answer.status_code
    assert body["title"] == kind.title
    assert body["error"] == body["detail"]
    assert body["instance"] == path
    assert set(body) - set(ALWAYS) - set(SOMETIMES) <= set(kind.members)
    assert all(value is not None for value in body.values())
    assert "Traceback" not in answer.text
    if "retry_after_ms" in body:
        assert int(answer.headers["retry-after"]) * 1000 >= body["retry_after_ms"]
    return body


async def ask(running: InProcess, slug: str, request: dict[str, Any]) -> dict[str, Any]:
    return check(await running.http.request(**request), slug, request["url"])


@pytest.mark.parametrize("slug", REQUESTS)
async def test_provoked(slug: str) -> None:
    async with gated(max_queue_rows=8, max_body_bytes=4096, max_batch_items=3) as (running, _):
        for request in REQUESTS[slug]:
            await ask(running, slug, request)


async def test_not_batchable() -> None:
    async with gated() as (running, _):
        item = {"id": "a", "url": "/batch", "method": "POST"}
        (answer,) = (await running.http.request(**batch(item))).json()["responses"]
        problem = httpx.Response(answer["status"], headers=answer["headers"], json=answer["body"])
        check(problem, "not-batchable", "/batch")


async def test_run_failed(caplog: pytest.LogCaptureFixture) -> None:
    async with gated() as (running, engine):
        engine.fails = lambda rows: EngineRunError("secret")
        problem = await ask(running, "run-failed", infer(rows_of(1)))
        assert problem["model"] == "gate"
        assert f"reference {problem['reference']}): secret" in caplog.text
        assert "secret" not in json.dumps(problem)


async def test_input_rejected(caplog: pytest.LogCaptureFixture) -> None:
    """Where zeros of the same shape run, the values are at fault."""
    async with gated() as (running, engine):
        engine.fails = lambda rows: EngineRunError("secret") if rows.any() else None
        problem = await ask(running, "input-rejected", infer(rows_of(1)))
        assert problem["model"] == "gate"
        assert f"reference {problem['reference']}): secret" in caplog.text
        assert "secret" not in json.dumps(problem)


async def test_refused_by_model() -> None:
    """Nothing else runs to find out whose fault it is."""
    async with gated() as (running, engine):
        engine.fails = lambda rows: BadRequest("no odd numbers")
        problem = await ask(running, "refused-by-model", infer(rows_of(1)))
        assert problem["detail"] == "no odd numbers"


async def test_engine_dead(caplog: pytest.LogCaptureFixture) -> None:
    async with gated() as (running, engine):
        engine.fails = lambda rows: EngineDeadError("secret")
        problem = await ask(running, "engine-dead", infer(rows_of(1)))
        assert problem["reference"] in caplog.text
        assert "secret" not in json.dumps(problem)


async def test_queue_full() -> None:
    async with gated(max_queue_rows=2) as (running, _):
        items = [{"id": str(n), "url": GATE, "method": "POST", "body": rows_of(n)} for n in range(3)]
        answers = (await running.http.request(**batch(*items))).json()["responses"]
        assert [each["status"] for each in answers] == [200, 200, 429]
        problem = httpx.Response(429, headers=answers[2]["headers"], json=answers[2]["body"])
        body = check(problem, "queue-full", GATE)
        assert (body["queued_rows"], body["limit"]) == (2, 2)
        assert body["retry_after_ms"] > 0


async def test_draining() -> None:
    async with gated() as (running, _):
        running.inference.draining = running.edge.draining = True
        for url in (GATE, "/batch"):
            await ask(running, "draining", {"method": "POST", "url": url, "json": {}})


async def test_starting() -> None:
    engine = GatedEngine()
    engine.may_open.clear()
    async with gated(engine=engine, ready=False) as (running, _):
        assert (await ask(running, "starting", infer(rows_of(1))))["model"] == "gate"
        await ask(running, "starting", {"method": "GET", "url": "/v2/models/gate"})
        engine.may_open.set()


async def test_load_failed() -> None:
    class Broken(GatedEngine):
        def open(self) -> None:
            raise EngineError("secret")

    async with gated(engine=Broken()) as (running, _):
        for request in (infer(rows_of(1)), {"method": "GET", "url": "/v2/models/gate/stats"}):
            assert "secret" not in json.dumps(await ask(running, "load-failed", request))


async def test_internal(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret")

    async with gated() as (running, _):
        model = running.edge.served["gate"]
        monkeypatch.setattr(model.decoder, "decode", broken)
        await ask(running, "internal", infer(rows_of(1)))
        monkeypatch.undo()
        monkeypatch.setattr(model.encoder, "encode", broken)
        problem = await ask(running, "internal", infer(rows_of(1)))
        monkeypatch.undo()
        monkeypatch.setattr(Model, "engine_worker", property(broken))
        problem = await ask(running, "internal", {"method": "GET", "url": "/v2/models/gate"})
        assert "secret" not in json.dumps(problem)
    assert caplog.text.count("secret") >= 2


@pytest.mark.parametrize(
    "error",
    [DeadlineTooShortError(0.001, 0.003), DeadlineUnreachableError(0.02, 0.05, 0.03)],
    ids=["deadline-too-short", "deadline-unreachable"],
)
async def test_refused_for_its_deadline(error: BatcherError, monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(_: object) -> None:
        raise error

    async with gated() as (running, _):
        monkeypatch.setattr(running.batcher(), "submit", submit)
        slug = "deadline-too-short" if isinstance(error, DeadlineTooShortError) else "deadline-unreachable"
        problem = await ask(running, slug, infer(rows_of(1)))
        assert problem["timeout_ms"] < problem["needed_ms"]


# Credentials


async def test_bad_authorization_unauthenticated_invalid_credentials_forbidden(tmp_path: Path) -> None:
    auth, keys = settings_in(tmp_path, {"little": ("infer:none",)})
    async with gated(auth=auth) as (running, _):
        for slug, headers in (
            ("bad-authorization", {"authorization": "Bearer two tokens"}),
            ("unauthenticated", {}),
            ("invalid-credentials", {"authorization": "Bearer token"}),
            ("invalid-credentials", {"x-api-key": "key"}),
            ("forbidden", {"x-api-key": keys["little"]}),
        ):
            for request in (infer(rows_of(1)), {"method": "GET", "url": "/v2/models/gate"}):
                answer = await running.http.request(**{**request, "headers": headers})
                problem = check(answer, slug, request["url"])
                assert answer.headers["www-authenticate"].startswith("Bearer ")
                assert ("permission" in problem) == (slug == "forbidden")


async def test_tenant_limit(tmp_path: Path) -> None:
    auth, keys = settings_in(tmp_path, {"slow": ("infer",)}, tenants=(TenantRule(requests_per_s=0.001),))
    async with gated(auth=auth) as (running, _):
        running.http.headers["x-api-key"] = keys["slow"]
        assert (await running.http.request(**infer(rows_of(1)))).status_code == 200
        problem = await ask(running, "tenant-limit", infer(rows_of(1)))
        assert (problem["tenant"], problem["limit"]) == ("slow", 1)


async def test_too_many_bad_tokens(tmp_path: Path) -> None:
    auth, _ = settings_in(tmp_path)
    async with gated(auth=auth) as (running, _):
        assert running.edge.auth is not None
        for _ in range(100):
            running.edge.auth.throttle.charge("127.0.0.1")
        running.http.headers["authorization"] = f"Bearer {SIGNER.token(good_claims(time.time()))}"
        await ask(running, "too-many-bad-tokens", infer(rows_of(1)))


async def test_keys_unavailable() -> None:
    # Nothing listens on port 1.
    issuer = Issuer(issuer=ISSUER, name="test", jwks_url="http://127.0.0.1:1/jwks")
    async with gated(auth=AuthSettings(issuers=(issuer,), audience=(AUDIENCE,)), ready=False) as (running, _):
        running.http.headers["authorization"] = f"Bearer {SIGNER.token(good_claims(time.time()))}"
        await ask(running, "keys-unavailable", infer(rows_of(1)))


def test_every_kind_is_provoked_somewhere() -> None:
    here = {*REQUESTS, "deadline-too-short", "deadline-unreachable"}
    here |= {"bad-authorization", "unauthenticated", "invalid-credentials", "forbidden"}
    for name in globals():
        if name.startswith("test_"):
            here.add(name.removeprefix("test_").replace("_", "-"))
    assert set(KINDS) - here == ELSEWHERE
    others = [path.read_text() for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__)]
    text = "".join(others)
    assert {slug for slug in ELSEWHERE if not re.search(rf'[/"]{slug}"', text)} == set()


# Methods


async def test_405_names_the_methods() -> None:
    async with gated() as (running, _):
        answer = await running.http.delete("/v2/models/gate")
        assert sorted(answer.headers["allow"].split(", ")) == ["GET", "HEAD"]
        assert answer.json()["allowed"] == ["GET", "HEAD"]
        assert (await running.http.get(GATE)).headers["allow"] == "POST"


@pytest.mark.parametrize("url", ["/v2", "/v2/health/ready", "/v2/models/gate", "/problems/draining"])
async def test_head_where_get_is(url: str) -> None:
    async with gated() as (running, _):
        head, get = await running.http.head(url), await running.http.get(url)
        assert head.status_code == get.status_code == 200
        assert head.headers["content-length"] == get.headers["content-length"]
