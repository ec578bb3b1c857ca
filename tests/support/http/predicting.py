"""The application in this process, through httpx, for tests of /v1 predictions."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import math
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from onnx import TensorProto
from starlette.types import ASGIApp

from cobatch.batcher.tenant import Tenant
from cobatch.engines.base import Engine
from cobatch.server.auth.principal import PRINCIPAL, Principal
from cobatch.server.inference.service import Inference
from cobatch.server.settings.schema import ModelSettings
from tests.support.http import wire
from tests.support.http.in_process import in_process
from tests.support.http.serving import DEADLINE_S, GatedEngine
from tests.support.models import models

GATE = "/v1/models/gate/predictions"


class App:
    """A running application and a client for it."""

    def __init__(self, app: ASGIApp, inference: Inference, client: httpx.AsyncClient) -> None:
        self.app = app
        self.inference = inference
        self.client = client

    async def predict(
        self, model: str, message: object, headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """POST a prediction in JSON; return the answer."""
        return await self.client.post(f"/v1/models/{model}/predictions", json=message, headers=headers)

    async def later(self, *rows: int, headers: Mapping[str, str] | None = None, **more: Any) -> str:
        """Start an asynchronous prediction of `gate`; return its URL."""
        prefer = {"Prefer": "respond-async"} | dict(headers or {})
        answer = await self.predict("gate", rows_of(*rows, **more), prefer)
        assert answer.status_code == 202, answer.text
        location = answer.headers["location"]
        assert location == f"/v1/predictions/{answer.json()['id']}"
        return str(location)


class Subjects:
    """Replaces the gate: a header names the principal."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        subject = dict(scope["headers"]).get(b"subject")
        more = {} if subject is None else {PRINCIPAL: principal(subject.decode())}
        await self._app({**scope, **more}, receive, send)


def principal(name: str) -> Principal:
    """Return a principal that may run every model."""
    may = frozenset(("infer", "metadata"))
    return Principal(Tenant(name), name, permissions=may, expires_s=math.inf, rules={})


@contextlib.asynccontextmanager
async def running(
    served: tuple[ModelSettings, ...], engines: Mapping[str, Engine] | None = None, **settings: Any
) -> AsyncIterator[App]:
    """Run the application with these models. `engines`, by path, replace the engines of model files."""
    async with in_process(*served, engines=engines, wrap=Subjects, **settings) as running:
        yield App(running.app, running.inference, running.http)


@contextlib.asynccontextmanager
async def gated(*, hold: bool = True, **settings: Any) -> AsyncIterator[tuple[App, GatedEngine]]:
    """Run one model, `gate`, held from the start: batches of at most 4 rows, a queue of 8."""
    engine = GatedEngine()
    model = ModelSettings(path="gate", max_batch_size=engine.max_batch_size, max_queue_rows=8)
    async with running((model,), {"gate": engine}, **settings) as app:
        engine.ran.clear()  # the warm-up's runs
        if hold:
            engine.hold()
        yield app, engine


@contextlib.asynccontextmanager
async def small_models(folder: Path) -> AsyncIterator[App]:
    """Run real models: batches of 4 rows, a queue of 50 rows, bodies up to 100 kB."""
    files = {
        "add": models.two_inputs(),
        "negate": models.negate(width=3),
        "any-size": wire.any_size(),
        "pick": models.pick(),
        "text": models.identity(TensorProto.STRING, "width"),
        "truth": models.identity(TensorProto.BOOL, 2),
        "half": models.identity(TensorProto.FLOAT16, 3),
    }
    settings = tuple(
        ModelSettings(
            path=models.write(folder, data, f"{name}.onnx"), max_batch_size=4, max_queue_rows=50, threads=1
        )
        for name, data in files.items()
    )
    async with running(settings, max_body_bytes=100_000) as app:
        yield app


def outputs(answer: httpx.Response) -> Any:
    """Return the outputs of a completed prediction."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["status"] == "completed"
    return answer.json()["outputs"]


def b64(array: np.ndarray[Any, Any], dtype: str | None = None) -> dict[str, Any]:
    """Encode a tensor as base64 in JSON."""
    data = base64.b64encode(array.tobytes()).decode()
    return {"b64": data, "dtype": dtype or array.dtype.name, "shape": list(array.shape)}


async def began(engine: GatedEngine) -> list[int]:
    """Wait until a batch is held; return its first column."""
    return await asyncio.to_thread(engine.began.get, timeout=DEADLINE_S)


def rows_of(*rows: int, **more: Any) -> dict[str, Any]:
    """Return a request for `gate` with one number in each row."""
    return {"inputs": {"x": [[row] for row in rows]}, **more}


async def leave(
    app: App, path: str, message: object, engine: GatedEngine, headers: Mapping[str, str]
) -> None:
    """Send a request and disconnect once its batch has started."""
    body = json.dumps(message, separators=(",", ":")).encode()  # as httpx encodes it
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await began(engine)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        """Ignore a response to a disconnected client."""

    fields = {"content-type": "application/json"} | dict(headers)
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(),
        "query_string": b"", "root_path": "", "scheme": "http", "server": ("test", 80),
        "headers": [(name.lower().encode(), value.encode()) for name, value in fields.items()],
    }  # fmt: skip
    await asyncio.wait_for(app.app(scope, receive, send), DEADLINE_S)


def slug(answer: httpx.Response) -> str:
    """Return the kind of problem of an answer."""
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["status"] == answer.status_code
    assert problem["title"]
    assert problem["instance"]
    return str(problem["type"]).removeprefix("/problems/")
