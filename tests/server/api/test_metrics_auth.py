"""GET /metrics with authentication: permission, tenants and credentials."""

from __future__ import annotations

from pathlib import Path

import pytest

from cobatch.server.auth.authenticator import RESULTS
from cobatch.server.settings.auth import TenantRule
from tests.support.auth.protected import Protected, get_as, protected, token
from tests.support.fronts.linked import WAYS
from tests.support.http.scraping import Scrape, scrape, scrape_of
from tests.support.http.serving import gate, get

ADMIN = token("root", "admin")


def metrics(running: Protected) -> Scrape:
    answer = running.ask(get_as(ADMIN, "/metrics"))
    assert answer.status == 200, answer
    return scrape_of(answer)


ALL = pytest.mark.parametrize("path", WAYS)


@ALL
def test_scraping_needs_admin(path: str, tmp_path: Path) -> None:
    with protected(path, tmp_path) as running:
        assert running.ask(get("/metrics")).slug == "unauthenticated"
        assert running.ask(get_as(token(scope="infer metadata"), "/metrics")).slug == "forbidden"
        assert running.ask(get_as(ADMIN, "/metrics")).status == 200


@ALL
def test_scraping_is_open_if_set(path: str, tmp_path: Path) -> None:
    with protected(path, tmp_path, server={"metrics_open": True}) as running:
        assert scrape(running.served).value("ready") == 1
        assert running.ask(get("/v2/models/stats")).slug == "unauthenticated"


@ALL
def test_each_tenant_has_its_own_series(path: str, tmp_path: Path) -> None:
    limits = (TenantRule(tenant="bob", requests_per_s=0.001, burst=1),)
    with protected(path, tmp_path, tenants=limits) as running:
        for _ in range(3):
            assert running.infer(token("ann"), 1, 2).status == 200
        assert running.infer(token("bob"), 1).status == 200
        assert running.infer(token("bob"), 1).slug == "tenant-limit"
        now = metrics(running)
    assert now.value("tenant_requests_total", tenant="ann", result="answered") == 3
    assert now.value("tenant_requests_total", tenant="ann", result="refused") == 0
    assert now.value("tenant_rows_total", tenant="ann") == 6
    assert now.value("tenant_requests_total", tenant="bob", result="answered") == 1
    assert now.value("tenant_requests_total", tenant="bob", result="refused") == 1
    busy = now.value("engine_busy_seconds_total", model="gate", engine="0")
    theirs = now.of("tenant_engine_seconds_total")
    assert sum(theirs.values()) == pytest.approx(busy)


def test_credentials_are_counted_by_result(tmp_path: Path) -> None:
    with protected(False, tmp_path, keys={"shop": ("infer",)}) as running:
        first = token("ann")
        for _ in range(3):
            assert running.infer(first).status == 200
        for key, status in ((running.keys["shop"], 200), ("cb_none_such", 401)):
            assert running.ask(gate(1, headers={"X-API-Key": key})).status == status
        assert running.infer("not.a.token").status == 401
        head, body, signature = first.split(".")
        forged = ".".join((head, body, signature[:-4] + ("AAAA" if signature[-4:] != "AAAA" else "BBBB")))
        assert running.infer(forged).status == 401
        assert running.ask(get("/v2")).status == 401
        now = metrics(running)
    results = {dict(labels)["result"]: value for labels, value in now.of("auth_results_total").items()}
    assert set(results) == set(RESULTS)
    assert results["verified"] == 2  # ann and the admin
    assert results["remembered"] == 2
    assert results["key"] == 1
    assert results["forged"] == 1
    assert results["missing"] == 1
    assert results["invalid"] + results["unknown-key"] == 2
    refused = {"code": "401", "reason": "invalid-credentials"}
    assert now.value("requests_total", model="gate", **refused) == 3
    route = {"route": "/v2/models/{name}/infer", "method": "POST"}
    assert now.value("http_requests_total", **route, **refused) == 3
