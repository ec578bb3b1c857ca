"""The examples of the library, and the programs in its documentation, run as they are."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import httpx
import pytest

from cobatch import QueueFull
from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples" / "library"
PROGRAMS = re.findall(
    r"^```python\n(.*?)^```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL | re.MULTILINE
)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def client_of(app: Any) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


async def test_fastapi_requests_share_batches_in_the_name_of_their_tenants() -> None:
    module = load("fastapi_app")
    async with client_of(module.app) as client:
        calls = [
            client.post("/embed", json={"text": "x y" * n}, headers={"authorization": f"Bearer key-of-{who}"})
            for n in range(1, 9)
            for who in ("ann", "bob")
        ]
        responses = await asyncio.gather(*calls)
        assert [response.json() for response in responses] == [
            [3 * n, n] for n in range(1, 9) for _ in range(2)
        ]
        statistics = module.embed.statistics()
        assert statistics.accepted == 16 > statistics.batches
        unknown = await client.post("/embed", json={"text": "x"}, headers={"authorization": "Bearer x"})
        assert unknown.status_code == 401


@pytest.mark.parametrize(("error", "status"), [(QueueFull(1, 1, 0.2), 429), (TimeoutError(), 500)])
async def test_fastapi_answers_refusals(
    error: Exception, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("fastapi_app")

    async def refuse(*_: object, **options: object) -> None:
        assert options == {"tenant": "ann", "timeout": 10}
        raise error

    monkeypatch.setattr(module, "embed", refuse)
    async with client_of(module.app) as client:
        headers = {"authorization": "Bearer key-of-ann"}
        response = await client.post("/embed", json={"text": "x"}, headers=headers)
    assert response.status_code == status
    if status == 429:
        assert response.headers["retry-after"] == "1"


async def test_starlette_with_metrics() -> None:
    module = load("starlette_app")
    async with module.lifespan(module.app) as state:

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await module.app({**scope, "state": dict(state)}, receive, send)

        async with client_of(app) as client:
            rows = await asyncio.gather(*[client.post("/predict", json=[n, 2, 3]) for n in range(5)])
            assert [row.json() for row in rows] == [[2 * n, 4, 6] for n in range(5)]
            assert (await client.post("/predict", json=[1])).status_code == 422
            metrics = (await client.get("/metrics/")).text
    assert 'cobatch_function_calls_total{function="Model.predict"} 5.0' in metrics


def test_the_script() -> None:
    text = "the words of a text are looked up by many tasks " * 10
    done = subprocess.run(
        [sys.executable, EXAMPLES / "script.py"], input=text, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[:3] == ["the 3", "words 5", "of 2"]
    assert re.fullmatch(r"110 words in \d\d? runs", lines[-1])


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_the_documentations_programs(program: str) -> None:
    exec(compile(program, "docs/library.md", "exec"), {"__name__": "__main__"})
