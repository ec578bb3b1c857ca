"""The index, the problem pages, and the table of kinds checked against the code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import msgspec

from cobatch.server.http.problem import _SLUGS, KINDS, MEMBERS, SOMETIMES
from tests.support.http.in_process import gated
from tests.support.paths import ROOT

# Pages


async def test_the_index_leads_to_pages_that_exist() -> None:
    async with gated() as (running, _):
        text = await running.http.get("/")
        assert text.headers["content-type"] == "text/plain; charset=utf-8"
        page = await running.http.get("/", headers={"accept": "text/html"})
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        links = re.findall(r'href="([^"]+)"', page.text)
        assert {"dashboard", "docs"} <= set(links)
        assert links == re.findall(r"^/(\S+)", text.text, re.MULTILINE)
        for link in links:
            assert (await running.http.get(f"/{link}")).status_code == 200


async def test_the_list_of_models_is_hinted_at_where_clients_look_for_it() -> None:
    async with gated() as (running, _):
        problem = (await running.http.get("/v2/models")).json()
        assert (
            problem["detail"] == "there is nothing at /v2/models; POST /v2/repository/index lists the models"
        )
        assert (await running.http.get("/v2/modelss")).json()["detail"] == "there is nothing at /v2/modelss"


async def test_each_kind_has_a_page_in_html_and_text() -> None:
    async with gated() as (running, _):
        for slug, kind in KINDS.items():
            text = await running.http.get(f"/problems/{slug}")
            assert text.headers["content-type"] == "text/plain; charset=utf-8"
            assert text.text.startswith(f"{kind.status} {slug}: {kind.title}\n")
            for part in (kind.meaning, kind.remedy, *(f"  {name}: " for name in kind.members)):
                assert part in text.text
            page = await running.http.get(f"/problems/{slug}", headers={"accept": "text/html,*/*;q=0.8"})
            assert page.headers["content-type"] == "text/html; charset=utf-8"
            assert page.headers["vary"] == "accept"
            assert f"<code>/problems/{slug}</code>" in page.text
            assert not re.search(r"https?://|<script|<link|\bsrc=|@import|url\(", page.text)


async def test_the_index_lists_all_kinds() -> None:
    async with gated() as (running, _):
        text = (await running.http.get("/problems")).text
        page = (await running.http.get("/problems", headers={"accept": "text/html"})).text
        for slug in KINDS:
            assert re.search(rf"^\d+  {slug} ", text, re.MULTILINE)
            assert f'href="/problems/{slug}"' in page


# The table


def test_every_kind_is_complete() -> None:
    table = msgspec.json.decode((ROOT / "server/http/problem_kinds.json").read_bytes())
    assert [kind["slug"] for kind in table["kinds"]] == list(KINDS), "two kinds have one slug"
    assert list(KINDS.values()) == sorted(KINDS.values(), key=lambda kind: kind.status)
    for slug, kind in KINDS.items():
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", slug)
        assert 400 <= kind.status < 600
        assert kind.title[0].isupper()
        assert not kind.title.endswith(".")
        for text in (kind.meaning, kind.remedy):
            assert text[0].isupper()
            assert text.endswith(".")
        assert len(set(kind.members)) == len(kind.members)
    used = {name for kind in KINDS.values() for name in kind.members}
    assert used == set(MEMBERS)


def problems_in_the_code() -> Iterator[tuple[str, set[str], str]]:
    """Yield slug, members and place of every Problem that server/ creates."""
    for path in sorted((ROOT / "server").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Problem":
                members = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
                slug = node.args[0]
                for part in (slug.body, slug.orelse) if isinstance(slug, ast.IfExp) else (slug,):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield part.value, members, f"{path.name}:{node.lineno}"


def test_every_kind_is_raised_with_its_own_members() -> None:
    raised = set()
    for slug, given, where in problems_in_the_code():
        raised.add(slug)
        given -= {"close", "headers", *SOMETIMES}
        members = {{"retry_after_s": "retry_after_ms"}.get(name, name) for name in given}
        assert members <= set(KINDS[slug].members), where
    assert set(_SLUGS.values()) <= set(KINDS)
    text = "".join(path.read_text() for path in (ROOT / "server").rglob("*.py"))
    for slug in set(KINDS) - raised:
        assert f'"{slug}"' in text, slug
