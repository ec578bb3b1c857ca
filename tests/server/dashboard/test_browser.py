"""The live page in a real browser: figures as in /metrics, restarts, tokens, keyboard, sizes, contrast."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect
from prometheus_client.parser import text_string_to_metric_families

from cobatch.server.settings.auth import TenantRule
from cobatch.server.settings.schema import ModelSettings
from tests.support.auth.protected import protected, token
from tests.support.fronts.linked import LinkedServer
from tests.support.http.browser import chromium, page_at
from tests.support.http.serving import (
    GATE,
    GatedEngine,
    Served,
    ThreadServer,
    data_of,
    gate,
    gated,
    get,
    post,
    serve,
)

pytestmark = pytest.mark.slow

_CLIENTS = 4
_EACH = 60


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def address(served: Served) -> str:
    return f"http://127.0.0.1:{served.server.port}/dashboard"


def metrics(served: Served) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Return the samples of /metrics by name and labels."""
    text = served.ask(get("/metrics")).body.decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(samples: dict[tuple[str, tuple[tuple[str, str], ...]], float], name: str, **labels: str) -> int:
    """Return the sum of the samples with this name and these labels."""
    wanted = set(labels.items())
    return round(sum(value for (of, has), value in samples.items() if of == name and wanted <= set(has)))


def load(served: Served) -> None:
    """Send requests of one to three rows from several threads, with some invalid ones."""

    def call(offset: int) -> None:
        with served.connect() as client:
            for number in range(_EACH):
                rows = range(1, 2 + (number + offset) % 3)
                assert data_of(client.ask(gate(*rows))) == [2 * row for row in rows]
                if number % 20 == 0:
                    assert client.ask(post(GATE, {})).status == 400

    threads = [threading.Thread(target=call, args=(number,)) for number in range(_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def shows(page: Page, selector: str, number: int) -> None:
    """Wait until an element shows this number."""
    expect(page.locator(selector)).to_have_text(f"{number:,}")


@pytest.mark.parametrize("make_server", [ThreadServer, LinkedServer], ids=["one process", "three"])
def test_figures_equal_metrics_under_load(browser: Browser, make_server: type[ThreadServer]) -> None:
    with gated(True, make_server=make_server) as (served, _), page_at(browser, address(served)) as page:
        expect(page.locator("#link")).to_have_text("live")
        load(served)
        samples = metrics(served)
        requests = total(samples, "cobatch_requests_total", model="gate", code="200")
        assert requests == _CLIENTS * _EACH
        bad = total(samples, "cobatch_requests_total", model="gate", code="400")
        assert bad == _CLIENTS * _EACH // 20
        shows(page, "dd[data-total=requests]", requests)
        shows(page, "dd[data-total=rows]", total(samples, "cobatch_batch_rows_sum", model="gate"))
        shows(page, "dd[data-total=batches]", total(samples, "cobatch_batches_total", model="gate"))
        shows(page, "dd[data-total=problems]", bad)
        shows(page, "td[data-problem=bad-request]", bad)
        # All traffic was in the last five minutes, so the sum of the seconds is the same.
        row = page.locator("#refusals tbody tr")
        expect(row.locator("td").nth(1)).to_have_text(f"{bad}")
        for name in ("requests", "latency", "batch"):
            expect(page.locator(f"#t-{name}")).to_have_text(re.compile("[0-9]"))
        expect(page.locator("#c-timeline canvas")).to_have_attribute(
            "aria-label", re.compile("engine was busy")
        )
        processes = page.locator("#processes tbody tr")
        if make_server is ThreadServer:
            expect(page.locator("#processes-card")).to_be_hidden()
            return
        expect(processes.locator("td:first-child")).to_have_text(["engines", "front 0", "front 1"])
        expect(processes.nth(1).locator("td").nth(1)).to_have_text(re.compile("[1-9]"))


def test_page_reconnects_after_a_restart_and_keeps_its_data(browser: Browser) -> None:
    with gated(True) as (served, _), page_at(browser, address(served)) as page:
        port = served.server.port
        load(served)
        shows(page, "dd[data-total=requests]", _CLIENTS * _EACH)
        served.stop()
        served.join()
        expect(page.locator("#link")).to_have_text("no connection, retrying")
        model = ModelSettings(path="gate", max_batch_size=4)
        with serve(True, (model,), engines={"gate": GatedEngine()}, port=port) as again:
            expect(page.locator("#link")).to_have_text("live")
            shows(page, "dd[data-total=requests]", 0)
            again.ask(gate(1))
            shows(page, "dd[data-total=requests]", 1)
            # The errors before the restart are still within the last five minutes.
            row = page.locator("#refusals tbody tr")
            expect(row.locator("td").nth(1)).to_have_text(f"{_CLIENTS * _EACH // 20}")
            expect(row.locator("td").nth(2)).to_have_text("0")


def test_page_asks_for_a_token_and_keeps_it_in_the_tab(browser: Browser, tmp_path: Path) -> None:
    rules = (TenantRule(tenant="red", weight=3.0),)
    with (
        protected(True, tmp_path, keys={"ops": ("admin",)}, tenants=rules) as running,
        page_at(browser, address(running.served)) as page,
    ):
        expect(page.locator("#login")).to_be_visible()
        expect(page.locator("#main")).to_be_hidden()
        expect(page.locator("#token")).to_be_focused()
        page.keyboard.type(token("red"))
        page.keyboard.press("Enter")
        expect(page.locator("#why")).to_have_text("This token lacks the permission admin.")
        page.keyboard.type("nonsense")
        page.keyboard.press("Enter")
        expect(page.locator("#why")).not_to_have_text("This token lacks the permission admin.")
        expect(page.locator("#token")).to_have_value("")
        page.keyboard.type(running.keys["ops"])
        page.keyboard.press("Enter")
        expect(page.locator("#main")).to_be_visible()
        assert page.context.cookies() == []
        assert page.evaluate("() => localStorage.length") == 0
        assert running.infer(token("red"), 1, 2).status == 200
        expect(page.locator("#tenants td.name")).to_have_text("red")
        expect(page.locator("#tenants tbody td").nth(3)).to_have_text("3")
        page.reload()
        expect(page.locator("#main")).to_be_visible()
        page.click("#forget")
        expect(page.locator("#login")).to_be_visible()
        assert page.evaluate("() => sessionStorage.length") == 0


def test_a_jwt_works_until_it_expires(browser: Browser, tmp_path: Path) -> None:
    with protected(True, tmp_path) as running, page_at(browser, address(running.served)) as page:
        page.fill("#token", token("ops", "admin"))
        page.keyboard.press("Enter")
        expect(page.locator("#main")).to_be_visible()
        running.clock.ahead_s += 24 * 3600
        expect(page.locator("#login")).to_be_visible()
        expect(page.locator("#why")).to_contain_text("expired")


def test_keyboard_selects_a_second_and_a_batch(browser: Browser) -> None:
    with gated(True) as (served, _), page_at(browser, address(served)) as page:
        # One after another: three batches, and the first met an idle engine and no other traffic.
        for row in range(3):
            assert data_of(served.ask(gate(row))) == [2 * row]
        shows(page, "dd[data-total=batches]", 3)
        chart = page.locator("#c-throughput canvas")
        chart.focus()
        page.keyboard.press("Home")
        expect(chart).to_have_attribute("aria-label", re.compile("ago: |now: "))
        page.keyboard.press("Escape")
        expect(chart).not_to_have_attribute("aria-label", re.compile("ago: "))
        page.locator("#c-timeline canvas").focus()
        about = page.locator("#c-timeline .about")
        seen = []
        for key in ("End", "ArrowLeft", "Home"):
            page.keyboard.press(key)
            number = re.match(r"Batch (\d+): 1 rows? ", about.inner_text())
            assert number is not None, about.inner_text()
            seen.append(int(number[1]))
        assert seen[0] > seen[1] > seen[2]
        expect(about).to_contain_text("dispatched because the engine was idle")
        page.keyboard.press("Enter")
        expect(page.locator("#explained")).to_contain_text(re.compile(rf"\bbatch {seen[2]}\b"))
        page.fill("#request-id", "never-was")
        page.keyboard.press("Enter")
        expect(page.locator("#explained")).to_contain_text("request 'never-was' is unknown")


def test_a_paused_page_does_not_change(browser: Browser) -> None:
    with gated(True) as (served, _), page_at(browser, address(served)) as page:
        shows(page, "dd[data-total=requests]", 0)
        page.click("#pause")
        expect(page.locator("#link")).to_have_text("paused")
        served.ask(gate(1))
        # Another page shows that the events of this second were sent.
        with page_at(browser, address(served)) as other:
            shows(other, "dd[data-total=requests]", 1)
        shows(page, "dd[data-total=requests]", 0)
        page.click("#pause")
        shows(page, "dd[data-total=requests]", 1)


@pytest.mark.parametrize("width", [320, 390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_the_screen_with_enough_contrast(browser: Browser, width: int, scheme: str) -> None:
    size = {"width": width, "height": 800}
    with (
        gated(True) as (served, _),
        page_at(browser, address(served), viewport=size, color_scheme=scheme) as page,
    ):
        load(served)
        shows(page, "dd[data-total=requests]", _CLIENTS * _EACH)
        assert page.evaluate("() => document.documentElement.scrollWidth") == width
        assert page.evaluate(_CONTRAST) >= 4.5
        if width < 600:
            assert page.evaluate(_SMALLEST_BUTTON) >= 24


def test_each_model_has_its_own_figures(browser: Browser) -> None:
    engines = {name: GatedEngine() for name in ("gate", "other")}
    models = tuple(ModelSettings(path=name, max_batch_size=4) for name in engines)
    with serve(True, models, engines=engines) as served, page_at(browser, address(served)) as page:
        served.ask(gate(1))
        shows(page, "dd[data-total=requests]", 1)
        page.click("#models button[data-model=other]")
        shows(page, "dd[data-total=requests]", 0)
        expect(page.locator("#models button[data-model=other]")).to_have_attribute("aria-pressed", "true")
        page.reload()
        expect(page.locator("#models button[data-model=other]")).to_have_attribute("aria-pressed", "true")


# The smallest contrast of text with its background, by WCAG's formula.
_CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (text) => {
    const linear = (one) => one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = rgb(text).slice(0, 3).map((one) => linear(one / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      if (rgb(color)[3] !== 0) return color;
    }
    return "rgb(255, 255, 255)";
  };
  let least = Infinity;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !node.checkVisibility()) continue;
    const [one, other] = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => b - a);
    least = Math.min(least, (one + 0.05) / (other + 0.05));
  }
  return least;
}"""
_SMALLEST_BUTTON = """() => Math.min(...[...document.querySelectorAll("button")]
  .filter((one) => one.checkVisibility()).map((one) => one.getBoundingClientRect().height))"""
