"""Files and routes of the live page; test_browser.py has the page in a browser."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest

from cobatch.server import dashboard
from tests.support.auth.protected import protected, token
from tests.support.http.in_process import gated
from tests.support.http.serving import DEADLINE_S, Served, get
from tests.support.http.serving import gated as served_gate

FOLDER = Path(dashboard.__file__).with_name("static")
FILES = sorted(path.name for path in FOLDER.iterdir())


class Page(HTMLParser):
    """References of an HTML page, and parts that the content security policy forbids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.resources: list[str] = []
        self.ids: list[str] = []
        self.labelled: list[str] = []
        self.forbidden: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        for name, value in given.items():
            if name in ("src", "href") and not (value or "").startswith("#"):
                self.resources.append(value or "")
            if name == "style" or name.startswith("on"):
                self.forbidden.append(f"{tag} {name}")
        if tag == "style" or (tag == "script" and "src" not in given):
            self.forbidden.append(tag)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.labelled += [given[name] or "" for name in ("for", "aria-labelledby") if name in given]


PAGE = Page((FOLDER / "index.html").read_text())


async def test_page_and_files_have_a_strict_policy() -> None:
    async with gated() as (running, _):
        for path in ["/dashboard", *(f"/dashboard/static/{name}" for name in FILES)]:
            answer = await running.http.get(path)
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
        kinds = {
            name: (await running.http.get(f"/dashboard/static/{name}")).headers["content-type"]
            for name in FILES
        }
        assert kinds["main.js"] == "text/javascript; charset=utf-8"
        assert kinds["style.css"] == "text/css; charset=utf-8"
        assert kinds["icon.svg"].startswith("image/svg+xml")


async def test_an_unchanged_file_is_answered_with_304() -> None:
    async with gated() as (running, _):
        first = await running.http.get("/dashboard/static/main.js")
        tag = first.headers["etag"]
        again = await running.http.get("/dashboard/static/main.js", headers={"if-none-match": tag})
        assert (again.status_code, again.content) == (304, b"")
        other = await running.http.get("/dashboard/static/main.js", headers={"if-none-match": '"other"'})
        assert (other.status_code, other.content) == (200, first.content)
        head = await running.http.head("/dashboard/static/main.js")
        assert (head.status_code, head.headers["etag"]) == (200, tag)


@pytest.mark.parametrize("name", ["none.js", "..%2Fdashboard.py", "%2e%2e%2fdashboard.py"])
async def test_other_files_are_not_served(name: str) -> None:
    async with gated() as (running, _):
        answer = await running.http.get(f"/dashboard/static/{name}")
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"


# The files


def test_page_refers_to_its_own_files_only() -> None:
    assert PAGE.forbidden == []
    assert PAGE.resources
    for resource in PAGE.resources:
        folder, _, name = resource.rpartition("/")
        assert folder == "dashboard/static", resource
        assert name in FILES


def test_labels_refer_to_existing_elements() -> None:
    assert len(set(PAGE.ids)) == len(PAGE.ids)
    assert set(PAGE.labelled) <= set(PAGE.ids)


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith((".js", ".css"))])
def test_scripts_and_styles_load_nothing_from_other_servers(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert not re.findall(r"https?://|//[a-z0-9-]+\.[a-z]", text.replace("http://www.w3.org/", ""))
    for imported in re.findall(r'from "([^"]+)"', text):
        assert imported.removeprefix("./") in FILES
    for url in re.findall(r"url\(([^)]*)\)", text):
        assert url in FILES


def test_elements_used_by_scripts_exist() -> None:
    text = "".join((FOLDER / name).read_text() for name in FILES if name.endswith(".js"))
    wanted = set(re.findall(r'(?:byId|getElementById)\("([^"]+)"\)', text))
    wanted |= set(re.findall(r'(?:TimeChart|Timeline)\("([^"]+)"', text))
    assert len(wanted) > 20
    assert wanted <= set(PAGE.ids)


def test_no_script_writes_html() -> None:
    for name in FILES:
        text = (FOLDER / name).read_text()
        assert not re.search(
            r"innerHTML\s*=[^=]|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text
        ), name


# Permissions


def test_the_feed_needs_admin_and_the_page_does_not(tmp_path: Path) -> None:
    with protected(True, tmp_path) as running:
        url = f"http://127.0.0.1:{running.served.server.port}"
        with httpx.Client(base_url=url, timeout=DEADLINE_S) as http:
            assert http.get("/dashboard").status_code == 200
            refused = http.get("/dashboard/events")
            assert (refused.status_code, refused.headers["www-authenticate"][:6]) == (401, "Bearer")
            lesser = http.get("/dashboard/events", headers={"authorization": f"Bearer {token()}"})
            assert (lesser.status_code, lesser.json()["permission"]) == (403, "admin")
            bearer = {"authorization": f"Bearer {token('ops', 'admin')}"}
            with http.stream("GET", "/dashboard/events", headers=bearer) as feed:
                assert feed.status_code == 200
                assert next(feed.iter_lines()) == "event: hello"


# Over a socket


@contextlib.contextmanager
def watching(served: Served) -> Iterator[Iterator[str]]:
    """Yield the lines of an open feed after `hello`."""
    url = f"http://127.0.0.1:{served.server.port}/dashboard/events"
    with httpx.stream("GET", url, timeout=DEADLINE_S) as feed:
        assert feed.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert feed.headers["cache-control"] == "no-store"
        lines = feed.iter_lines()
        assert next(lines) == "event: hello"
        yield lines


def test_head_of_the_feed_is_answered_at_once() -> None:
    with served_gate(True) as (served, _), served.connect() as client:
        client.send(b"HEAD /dashboard/events HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client._until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        client.send(get("/v2/health/live"))
        # The connection stays open.
        assert client._until(b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("fast", [True, False])
def test_an_open_page_does_not_delay_shutdown(fast: bool) -> None:
    with served_gate(fast) as (served, _):
        with watching(served) as lines:
            served.stop()
            for _ in lines:
                pass  # until the server ends it
        served.join()  # fails if it takes too long
