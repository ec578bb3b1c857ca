"""A real Prometheus scrapes a real server; promtool checks the files in deploy/."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from cobatch.server.api.metrics import STATES
from cobatch.server.auth.authenticator import RESULTS
from cobatch.server.http.problem import KINDS
from cobatch.server.observability.metric_families import FAMILIES
from cobatch.server.observability.record import RequestRecord
from tests.support.auth.protected import protected, token
from tests.support.http.prometheus import prometheus, promtool
from tests.support.http.serving import DEADLINE_S, Served, gate, gated, get
from tests.support.paths import ROOT

DEPLOY = ROOT / "deploy"
METRICS = ROOT / "docs" / "metrics.md"
RULES = DEPLOY / "prometheus" / "alerts.yml"
CONFIG = DEPLOY / "prometheus" / "prometheus.yml"
DASHBOARD = DEPLOY / "grafana" / "cobatch.json"
T = TypeVar("T")
_SCRAPES = 300


def scraped(served: Served) -> threading.Semaphore:
    """Return a semaphore that each scrape releases."""
    scrapes = threading.Semaphore(0)

    def done(record: RequestRecord) -> None:
        if record.path == "/metrics" and record.status == 200:
            scrapes.release()

    served.call(lambda: served.inference.observer.on_request(done, each=True))
    return scrapes


def config_for(port: int, folder: Path, more: str = "") -> Path:
    """Write the configuration of deploy/ for a server on this port, with ten scrapes per second."""
    text = CONFIG.read_text()
    for original, replacement in (
        ("localhost:8000", f"127.0.0.1:{port}"),
        ("scrape_interval: 15s", "scrape_interval: 100ms\n  scrape_timeout: 100ms"),
        ("alerts.yml", str(RULES)),
    ):
        assert original in text
        text = text.replace(original, replacement)
    path = folder / "prometheus.yml"
    path.write_text(text.replace("    static_configs:", f"{more}    static_configs:"))
    return path


def eventually(scrapes: threading.Semaphore, read: Callable[[], T], expected: T) -> None:
    """Assert that a value becomes the expected one, and read it again after each scrape.

    On a busy machine scrapes can be late or exceed Prometheus' timeout.
    """
    for _ in range(_SCRAPES):
        if read() == expected:
            return
        assert scrapes.acquire(timeout=DEADLINE_S)
    assert read() == expected


# It scrapes nothing in its first five seconds.
@pytest.mark.slow
def test_prometheus_stores_metrics_and_rules(tmp_path: Path) -> None:
    with gated(True) as (served, _):
        scrapes = scraped(served)
        with prometheus(config_for(served.server.port, tmp_path), tmp_path) as running:
            with served.connect() as client:
                for _ in range(7):
                    assert client.ask(gate(1)).status == 200

            def health() -> list[tuple[str, str]]:
                targets = running.ask("targets")["activeTargets"]
                return [(target["health"], target["lastError"]) for target in targets]

            def values(query: str) -> list[float]:
                return [value for _, value in running.values(query)]

            eventually(scrapes, health, [("up", "")])
            requests = 'cobatch_requests_total{model="gate", code="200"}'
            eventually(scrapes, lambda: values(requests), [7.0])
            median = "histogram_quantile(0.5, sum by (le) (cobatch_request_duration_seconds_bucket))"
            eventually(scrapes, lambda: [0 < value < DEADLINE_S for value in values(median)], [True])
            kinds = running.ask("targets/metadata", metric="cobatch_queue_delay_seconds")
            assert [one["type"] for one in kinds] == ["histogram"]
            groups = running.ask("rules")["groups"]
            assert [rule["name"] for group in groups for rule in group["rules"]] == alerts()


@pytest.mark.slow
def test_prometheus_scrapes_with_credentials(tmp_path: Path) -> None:
    with protected(True, tmp_path) as server:
        (tmp_path / "token").write_text(token("prometheus", "admin"))
        more = f"    authorization:\n      credentials_file: {tmp_path / 'token'}\n"
        scrapes = scraped(server.served)
        with prometheus(config_for(server.served.server.port, tmp_path, more), tmp_path) as running:
            eventually(scrapes, lambda: [value for _, value in running.values("cobatch_ready")], [1.0])


def test_promtool_accepts_the_text() -> None:
    with gated(True) as (served, _):
        served.ask(gate(1))
        said = promtool("check", "metrics", stdin=served.ask(get("/metrics")).body.decode())
    assert said == ""


# Files in deploy/


def alerts() -> list[str]:
    return re.findall(r"- alert: (\w+)", RULES.read_text())


def test_configuration_and_rules_are_valid() -> None:
    assert "SUCCESS" in promtool("check", "config", CONFIG)
    assert f"{len(alerts())} rules found" in promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)
    assert "SUCCESS" in promtool("test", "rules", RULES.with_name("alerts_test.yml"))


def test_each_alert_has_a_test_and_a_line_in_the_docs() -> None:
    tested = RULES.with_name("alerts_test.yml").read_text()
    assert set(re.findall(r'alertname="(\w+)"', tested)) == set(alerts())
    assert re.findall(r"^\| `(Cobatch\w+)`", METRICS.read_text(), re.MULTILINE) == alerts()


def expressions() -> list[str]:
    """Return the dashboard's queries with values for Grafana's variables."""
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    return [re.sub(r"\$(instance|model|job)", ".*", one).replace("$__rate_interval", "1m") for one in found]


def test_queries_of_the_dashboard_are_valid(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{n}", "expr": one} for n, one in enumerate(expressions())]
    # JSON is YAML.
    path = tmp_path / "panels.yml"
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", path)


def test_queries_use_existing_metrics_and_labels() -> None:
    endings = {
        "counter": ("_total",),
        "gauge": ("",),
        "histogram": ("_bucket", "_sum", "_count"),
        "info": ("_info",),
    }
    series = {family.name + ending: family for family in FAMILIES for ending in endings[family.kind]}
    asked = [
        *expressions(),
        *re.findall(r"(?:expr: (?:\|\n)?)(.*?)(?=\n +(?:for|labels):)", RULES.read_text(), re.DOTALL),
    ]
    names = {name for one in asked for name in re.findall(r"\bcobatch_\w+", one)}
    assert names <= set(series)
    assert len(names) > 25
    for one in asked:
        for name, labels in re.findall(r"\b(cobatch_\w+)\{([^}]*)\}", one):
            used = set(re.findall(r"(\w+)\s*[=!]", labels)) - {"instance", "job"}
            assert used <= set(series[name].labels), one


def test_rules_use_existing_label_values() -> None:
    """An unknown reason or state would disable an alert, or an exception from it."""
    known = {"reason": set(KINDS), "state": set(STATES), "result": set(RESULTS)}
    asked = re.findall(r'(reason|state|result)(?:=|!=|=~|!~)"([^"]+)"', RULES.read_text())
    assert {label for label, _ in asked} == {"reason", "state", "result"}
    for label, pattern in asked:
        for one in pattern.split("|"):
            assert any(re.fullmatch(one, value) for value in known[label]), (label, one)
