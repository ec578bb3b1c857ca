"""The OpenAPI document of a server with authentication: complete, valid, and true of its responses."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from cobatch.server.auth.gate import OPEN
from cobatch.server.http.problem import ALWAYS, KINDS, SOMETIMES
from cobatch.server.openapi.document import AUTH_KINDS, describe
from cobatch.server.settings.auth import TenantRule
from tests.server.openapi.test_openapi import (
    IN_ITEMS,
    Json,
    Page,
    check,
    described,
    media_of,
    operations,
    run_example,
    served,
    several,
    slugs_of,
)
from tests.support.auth.protected import settings_in
from tests.support.auth.tokens import AUDIENCE
from tests.support.http.in_process import Front, InProcess, gated, in_process

KEYS = {"all": ("infer", "metadata", "admin"), "little": ("infer:none",)}


@contextlib.asynccontextmanager
async def guarded(folder: Path, **fields: Any) -> AsyncIterator[tuple[InProcess, dict[str, str]]]:
    """Run one model, `gate`; yield the application and the API keys by tenant."""
    auth, keys = settings_in(folder, KEYS, **fields)
    async with gated(auth=auth) as (running, _):
        yield running, keys


def document_of(running: InProcess) -> Json:
    # As the server sends it.
    document: Json = json.loads(json.dumps(describe(running.inference)))
    return document


@pytest.fixture(params=[False, True], ids=["one", "front"])
def front(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with one process, and with a front."""
    monkeypatch.setattr(Front, "wanted", request.param)


async def test_without_auth_the_document_has_no_trace_of_it() -> None:
    async with gated() as (running, _):
        document = document_of(running)
        page = (await running.http.get("/docs")).text
    assert "securitySchemes" not in document["components"]
    assert set(document["components"]["headers"]).isdisjoint({"WWW-Authenticate", "RateLimit"})
    for _, _, operation in operations(document):
        assert "security" not in operation
        assert slugs_of(operation).isdisjoint(AUTH_KINDS)
        assert set(operation["responses"]).isdisjoint({"401", "403"})
    for text in (json.dumps(document), page):
        assert not re.search(r"Bearer|X-API-Key|WWW-Authenticate|RateLimit|Needs (?:cred|the perm)", text)


async def test_the_document_is_valid_and_complete(tmp_path: Path) -> None:
    async with guarded(tmp_path, rate_limit_headers=True) as (running, _):
        document = document_of(running)
        OpenAPIV31SpecValidator(document).validate()
        assert described(running) == served(running)
    slugs = set().union(*[slugs_of(operation) for _, _, operation in operations(document)])
    assert slugs == set(KINDS) - IN_ITEMS - {"wrong-body"}  # of pipelines alone
    examples = document["components"]["examples"]
    assert set(examples) == set(KINDS)
    for slug, example in examples.items():
        problem = example["value"]
        assert (problem["type"], problem["status"]) == (f"/problems/{slug}", KINDS[slug].status)
        assert set(problem) <= {*ALWAYS, *SOMETIMES, *KINDS[slug].members}, slug
    schemes = document["components"]["securitySchemes"]
    assert (schemes["bearer"]["type"], schemes["bearer"]["scheme"]) == ("http", "bearer")
    assert {key: schemes["apiKey"][key] for key in ("type", "in", "name")} == {
        "type": "apiKey",
        "in": "header",
        "name": "X-API-Key",
    }
    for path, method, operation in operations(document):
        open_ = method == "get" and OPEN.fullmatch(path) is not None
        assert operation.get("security") == (None if open_ else [{"bearer": []}, {"apiKey": []}]), path
        assert ("unauthenticated" in slugs_of(operation)) != open_
        for status, response in operation["responses"].items():
            assert ("RateLimit" in response.get("headers", {})) == (not open_ and status != "401")
            if status in ("401", "403"):
                assert "WWW-Authenticate" in response["headers"]


@pytest.mark.parametrize(
    ("fields", "schemes"),
    [({"api_keys_file": ""}, {"bearer"}), ({"issuers": (), "audience": ()}, {"apiKey"})],
)
async def test_document_has_configured_schemes_only(tmp_path: Path, fields: Any, schemes: set[str]) -> None:
    auth, _ = settings_in(tmp_path, KEYS)
    kept = {name: getattr(auth, name) for name in ("issuers", "audience", "api_keys_file")} | fields
    async with gated(auth=type(auth)(**kept)) as (running, _):
        document = document_of(running)
        OpenAPIV31SpecValidator(document).validate()
    assert set(document["components"]["securitySchemes"]) == schemes
    assert "RateLimit" not in document["components"]["headers"]
    infer = document["paths"]["/v2/models/{name}/infer"]["post"]
    assert ("keys-unavailable" in slugs_of(infer)) == ("bearer" in schemes)
    # Without an audience that is a URL there is no OAuth metadata.
    assert ("/.well-known/oauth-protected-resource" in document["paths"]) == ("bearer" in schemes)


def check_response(document: Json, operation: Json, answer: httpx.Response) -> str:
    """Check a response against the document; return its kind of problem, "" for none."""
    response = operation["responses"][str(answer.status_code)]
    kind = answer.headers["content-type"].partition(";")[0]
    body: Any = answer.json() if "json" in kind else answer.text
    check(document, media_of(response, kind)["schema"], body)
    for name in ("WWW-Authenticate", "RateLimit", "RateLimit-Policy"):
        assert (name in answer.headers) <= (name in response.get("headers", {})), name
    slug = body["type"].rpartition("/")[2] if kind == "application/problem+json" else ""
    assert not slug or slug in slugs_of(operation)
    return slug


@pytest.mark.usefixtures("front")
async def test_responses_match_the_document(tmp_path: Path) -> None:
    """Call each operation without credentials, with too few permissions, and with all."""
    rule = TenantRule(max_concurrent=10)
    counted = dict.fromkeys(("", "unauthenticated", "forbidden"), 0)
    async with guarded(tmp_path, rate_limit_headers=True, tenants=(rule,)) as (running, keys):
        document = document_of(running)
        for path, method, operation in operations(document):
            parameters = [one for one in operation.get("parameters", []) if one["in"] == "path"]
            url = path.format_map({one["name"]: one["example"] for one in parameters})
            queries = [one for one in operation.get("parameters", []) if one["in"] == "query"]
            url += "?" + urlencode({one["name"]: one["example"] for one in queries if "example" in one})
            body = {"content": b"{"} if "requestBody" in operation else {}

            async def ask(
                key: str | None,
                method: str = method,
                url: str = url,
                body: Any = body,
                operation: Json = operation,
            ) -> tuple[str, httpx.Response]:
                headers = {"x-api-key": key} if key else {}
                answer = await running.http.request(method, url, headers=headers, **body)
                return check_response(document, operation, answer), answer

            anonymous, answer = await ask(None)
            assert (anonymous == "unauthenticated") == ("security" in operation), path
            counted[anonymous] += 1
            little, _ = await ask(keys["little"])
            # POST /batch only refuses callers without any permission.
            assert (little == "forbidden") == ("forbidden" in slugs_of(operation) and path != "/batch"), path
            if little == "forbidden":
                counted[little] += 1
            if "text/event-stream" in operation["responses"]["200"]["content"]:
                continue  # it never ends; tests/server/dashboard/test_feed.py reads it
            everything, answer = await ask(keys["all"])
            assert everything in ("", "not-json", "unsupported-media-type", "unknown-prediction",
                                  "unknown-request"), path  # fmt: skip
            assert ("RateLimit" in answer.headers) == ("security" in operation), path
    assert counted["unauthenticated"] >= 15
    assert counted["forbidden"] >= 10
    assert counted[""] >= 6


async def test_oauth_metadata_matches_the_document(tmp_path: Path) -> None:
    async with guarded(tmp_path) as (running, _):
        document = document_of(running)
        operation = document["paths"]["/.well-known/oauth-protected-resource"]["get"]
        answer = await running.http.get("/.well-known/oauth-protected-resource")
    assert check_response(document, operation, answer) == ""
    promised = media_of(operation["responses"]["200"], "application/json")["example"]
    assert promised["resource"] == AUDIENCE
    assert promised.items() <= answer.json().items()


@pytest.mark.usefixtures("front")
async def test_examples_of_requests_run_with_a_key(tmp_path: Path) -> None:
    auth, keys = settings_in(tmp_path, KEYS)
    async with in_process(*several(tmp_path), auth=auth) as running:
        running.http.headers["x-api-key"] = keys["all"]
        document = describe(running.inference)
        for path, _, operation in operations(document):
            for media, content in operation.get("requestBody", {}).get("content", {}).items():
                for example in content.get("examples", {}).values():
                    answer = await run_example(running, path, media, example)
                    assert answer.status_code == 200, (path, example, answer.text)


async def test_page_explains_authentication(tmp_path: Path) -> None:
    auth, keys = settings_in(tmp_path, KEYS)
    async with in_process(*several(tmp_path), auth=auth) as running:
        answer = await running.http.get("/docs", headers={"x-api-key": keys["all"]})
    page = Page(answer.text)
    assert "access" in page.ids
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    commands = re.findall(r"curl \$URL[^\n]*", unescape(answer.text))
    assert len(commands) > 10
    for command in commands:
        assert ' -H "Authorization: Bearer $TOKEN" ' in command
    assert "X-API-Key: $API_KEY" in answer.text
