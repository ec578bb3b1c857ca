"""The OpenAPI document: complete, valid, true of a running server, input of a fuzzer; and its page."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from onnx import TensorProto
from openapi_spec_validator import OpenAPIV31SpecValidator
from starlette.routing import Route

from cobatch.engines.base import DATATYPES, Signature, TensorSpec
from cobatch.server.http.problem import ALWAYS, KINDS, MEMBERS, SOMETIMES
from cobatch.server.openapi import examples as openapi_examples
from cobatch.server.openapi.document import AUTH_KINDS, describe
from cobatch.server.openapi.page import render
from cobatch.server.predictions import decode as v1_decode
from cobatch.server.predictions.content import JSON, Content, Field
from cobatch.server.settings.schema import ModelSettings
from cobatch.server.v2.decode import Decoder
from tests.support.http.in_process import InProcess, gated, in_process
from tests.support.http.serving import DEADLINE_S, GatedEngine, serve
from tests.support.models import models
from tests.support.paths import ROOT

CONFIG = Path(__file__).with_name("schemathesis.toml")
SCHEMATHESIS = Path(sys.executable).with_name("st")
Json = dict[str, Any]

# Kinds that are only in responses to the items of a batch.
IN_ITEMS = {"not-batchable"}


def several(folder: Path) -> list[ModelSettings]:
    """Models with one input and two, fixed and variable axes, and text."""
    files = {
        "negate": models.negate(),
        "pairs": models.two_inputs(),
        "sum": models.sum_rows(),
        "text": models.identity(TensorProto.STRING, 1),
        "truth": models.identity(TensorProto.BOOL),
    }
    return [
        ModelSettings(name=name, path=models.write(folder, data, f"{name}.onnx"))
        for name, data in files.items()
    ]


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def check(document: Json, schema: Json, value: object) -> None:
    """Validate a value against one of the document's schemas."""
    root = {"allOf": [schema], "components": document["components"]}
    jsonschema_rs.validator_for(root).validate(value)


def described(running: InProcess) -> set[tuple[str, str]]:
    return {(path, method) for path, method, _ in operations(describe(running.inference))}


def served(running: InProcess) -> set[tuple[str, str]]:
    """Return paths and methods of the routes."""
    routes = running.starlette.router.routes
    assert len(routes) > 20
    assert all(isinstance(route, Route) for route in routes)
    return {
        (route.path, method.lower())
        for route in routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }


def slugs_of(operation: Json) -> set[str]:
    """Return the kinds of problems among an operation's responses."""
    return {
        slug
        for response in operation["responses"].values()
        for slug in response["content"].get("application/problem+json", {}).get("examples", {})
    }


def media_of(response: Json, kind: str) -> Json:
    media: Json = response["content"][kind]
    return media


# The document


async def test_document_has_exactly_the_routes() -> None:
    async with gated() as (running, _):
        assert described(running) == served(running)


async def test_the_document_is_valid(tmp_path: Path) -> None:
    async with in_process(*several(tmp_path)) as running:
        answer = await running.http.get("/openapi.json")
        assert answer.headers["content-type"] == "application/json"
        document = answer.json()
    assert document["openapi"] == "3.1.0"
    OpenAPIV31SpecValidator(document).validate()


async def test_examples_follow_the_loaded_models() -> None:
    engine = GatedEngine()
    engine.may_open.clear()
    async with gated(ready=False, engine=engine) as (running, _):
        loaded = asyncio.Event()
        running.inference.on_ready = loaded.set

        async def examples() -> list[str]:
            document = (await running.http.get("/openapi.json")).json()
            OpenAPIV31SpecValidator(document).validate()
            body = document["paths"]["/v2/models/{name}/infer"]["post"]["requestBody"]
            assert "gate" in (await running.http.get("/docs")).text
            return list(body["content"][JSON].get("examples", {}))

        assert await examples() == []
        engine.may_open.set()
        async with asyncio.timeout(DEADLINE_S):
            await loaded.wait()
        assert await examples() == ["gate"]


async def test_every_problem_is_a_response_of_an_operation() -> None:
    async with gated() as (running, _):
        document = describe(running.inference)
    slugs = set().union(*[slugs_of(operation) for _, _, operation in operations(document)])
    # tests/server/openapi/test_access.py has those of authentication.
    assert slugs == set(KINDS) - IN_ITEMS - AUTH_KINDS - {"wrong-body"}  # of pipelines alone
    assert set(document["components"]["examples"]) == set(KINDS) - AUTH_KINDS
    assert set(document["components"]["schemas"]["Problem"]["properties"]) == {*ALWAYS, *SOMETIMES, *MEMBERS}


async def test_examples_of_responses_match_their_schemas(tmp_path: Path) -> None:
    async with in_process(*several(tmp_path)) as running:
        document = describe(running.inference)
    checked = 0
    for _, _, operation in operations(document):
        for response in operation["responses"].values():
            for media in response["content"].values():
                named = media.get("examples", {}).values()
                values = [document["components"]["examples"][one["$ref"].rpartition("/")[2]] for one in named]
                for value in [one["value"] for one in values] + [
                    media[k] for k in ("example",) if k in media
                ]:
                    check(document, media["schema"], value)
                    checked += 1
    assert checked > 200


# Examples


async def run_example(running: InProcess, path: str, media: str, example: Json) -> Any:
    """Send an example request of the document and return the response."""
    value = example["value"]
    url = path.format_map(example.get("x-path", {}) | {"version": "1"})
    headers = dict(example.get("x-headers", {}))
    if media == "multipart/form-data":
        parts = {name: (None, json.dumps(part).encode(), JSON) for name, part in value.items()}
        return await running.http.post(url, files=parts, headers=headers)
    content = value.encode() if isinstance(value, str) else json.dumps(value).encode()
    return await running.http.post(url, content=content, headers={"content-type": media, **headers})


async def test_examples_of_requests_run(tmp_path: Path) -> None:
    ran = 0
    async with in_process(*several(tmp_path)) as running:
        document = describe(running.inference)
        for path, _, operation in operations(document):
            for media, content in operation.get("requestBody", {}).get("content", {}).items():
                for example in content.get("examples", {}).values():
                    if not isinstance(example["value"], str):
                        check(document, content["schema"], example["value"])
                    answer = await run_example(running, path, media, example)
                    assert answer.status_code == 200, (path, example, answer.text)
                    kind = answer.headers["content-type"]
                    described = media_of(operation["responses"]["200"], kind)
                    if kind == JSON:
                        check(document, described["schema"], answer.json())
                        for item in answer.json().get("responses", []):
                            assert item["status"] == 200
                    assert "server-timing" in answer.headers or path == "/batch"
                    ran += 1
    # Five models, six ways on three paths; text with two inputs has no raw body.
    assert ran >= 5 * 7 - 1


async def test_examples_of_outputs_equal_real_outputs(tmp_path: Path) -> None:
    async with in_process(*several(tmp_path)) as running:
        document = describe(running.inference)
        for path in ("/v2/models/{name}/infer", "/v1/models/{name}/predictions"):
            operation = document["paths"][path]["post"]
            example = operation["requestBody"]["content"][JSON]["examples"]["negate"]
            answer = (await run_example(running, path, JSON, example)).json()
            promised = media_of(operation["responses"]["200"], JSON)["example"]
            assert answer.keys() == promised.keys()
            assert answer["outputs"] == promised["outputs"]


async def test_paths_without_a_body_run_with_their_examples(tmp_path: Path) -> None:
    async with in_process(*several(tmp_path)) as running:
        document = describe(running.inference)
        for path, method, operation in operations(document):
            values = {
                one["name"]: one["example"] for one in operation.get("parameters", []) if one["in"] == "path"
            }
            if "requestBody" in operation or "text/event-stream" in operation["responses"]["200"]["content"]:
                continue  # the event stream never ends
            # Profiles take five seconds by default.
            answer = await running.http.request(method, path.format_map(values), params={"seconds": "0.1"})
            unknown = path.startswith(("/v1/predictions", "/v1/requests"))
            assert answer.status_code == (404 if unknown else 200)
            kind = answer.headers["content-type"].partition(";")[0]
            described = media_of(operation["responses"][str(answer.status_code)], kind)
            check(document, described["schema"], answer.json() if "json" in kind else answer.text)


@pytest.mark.parametrize("shape", [(), (2,), (-1,), (2, -1)])
@pytest.mark.parametrize("datatype", list(DATATYPES))
def test_every_datatype_has_examples(datatype: str, shape: tuple[int, ...]) -> None:
    signature = Signature((TensorSpec("x", datatype, shape),), (TensorSpec("y", "FP32", ()),))
    decoder = Decoder(signature, 64)
    assert openapi_examples.has_example(signature)
    message = openapi_examples.infer_json(signature)
    assert (message is None) == (datatype == "BF16")
    if message is not None:
        assert decoder.decode(json.dumps(message).encode(), None).rows == 1
    body, length = openapi_examples.infer_binary(signature)
    assert decoder.decode(body.encode(), length).rows == 1
    raw = openapi_examples.raw_tensor(signature)
    if raw is not None:
        assert decoder.decode(raw.encode(), 0).rows == 1
    text = json.dumps(openapi_examples.prediction(signature)).encode()
    assert v1_decode.decode(Content(JSON, [Field("", JSON, text)], []), decoder).rows == 1


def test_a_model_with_long_rows_has_no_examples() -> None:
    signature = Signature((TensorSpec("x", "FP32", (3, 224, 224)),), ())
    assert not openapi_examples.has_example(signature)


# The page


class Page(HTMLParser):
    """The ids, links and loads of a page. Asserts that its elements are closed in order."""

    VOID = frozenset(("meta", "link", "br", "img", "input"))

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.links += [given["href"] or ""] if "href" in given else []
        self.loads += [tag] if "src" in given or tag in ("script", "link", "iframe", "object") else []
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


async def test_page_is_complete_and_loads_nothing(tmp_path: Path) -> None:
    async with in_process(*several(tmp_path)) as running:
        document = describe(running.inference)
        answer = await running.http.get("/docs")
        page = Page(answer.text)
        assert not page.loads
        assert "@import" not in answer.text
        assert "url(" not in answer.text
        assert len(set(page.ids)) == len(page.ids)
        for link in set(page.links):
            if link.startswith("#"):
                assert link[1:] in page.ids
            else:
                assert (await running.http.get(f"/{link}")).status_code == 200, link
    for path in document["paths"]:
        assert f"<code>{path}</code>" in answer.text
    for name in document["components"]["schemas"]:
        assert f"schema-{name}" in page.ids
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


async def test_names_of_models_are_escaped_in_the_page(tmp_path: Path) -> None:
    async with in_process(*several(tmp_path)) as running:
        text = (
            json.dumps(describe(running.inference)).replace("negate", "<script>&'").replace("total", "<img>")
        )
    page = render(json.loads(text))
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;&amp;&#x27;" in page


async def test_document_and_page_are_compressed_on_request() -> None:
    async with gated(compress_min_bytes=1) as (running, _):
        for path in ("/openapi.json", "/docs"):
            plain = await running.http.get(path, headers={"accept-encoding": "identity"})
            packed = await running.http.get(path, headers={"accept-encoding": "gzip"})
            assert packed.headers["content-encoding"] == "gzip"
            assert packed.content == plain.content


# The server, fuzzed from the document


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pairs", "truth"])
def test_schemathesis_finds_nothing(name: str, tmp_path: Path) -> None:
    """Run all phases (examples, coverage, fuzzing, stateful) with the same requests each time.

    Random JSON could be a valid raw tensor by chance, but not for these models: one has two inputs, the other
    accepts only bytes 0 and 1.
    """
    (model,) = (model for model in several(tmp_path) if model.name == name)
    with serve(True, (model,), max_wait_s=0.1) as served:
        url = f"http://127.0.0.1:{served.server.port}/openapi.json"
        command = [str(SCHEMATHESIS), "--config-file", str(CONFIG)]
        command += ["run", url, "--max-examples", "40"]
        # The hooks are a module of the repository; schemathesis writes its files into the test's folder.
        env = os.environ | {
            "SCHEMATHESIS_HOOKS": "tests.support.http.schemathesis_hooks",
            "PYTHONPATH": str(ROOT),
        }
        ran = subprocess.run(
            command,
            check=False,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S * 6,
            cwd=tmp_path,
            env=env,
        )
        assert ran.returncode == 0, ran.stdout[-20_000:] + ran.stderr[-2000:]
        assert served.inference.ready
        # Some requests were accepted.
        assert served.batcher(name).counters.batches > 100
    assert "Tested: 29" in ran.stdout, ran.stdout
