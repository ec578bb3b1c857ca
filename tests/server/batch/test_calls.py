"""POST /batch below HTTP: callers that leave, and items that go through the application."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from cobatch.server.batch.routes import _Call, _parse
from tests.support.http.batching import ask, data, get, infer
from tests.support.http.in_process import InProcess, gated
from tests.support.http.serving import DEADLINE_S

# Callers that leave


async def call(running: InProcess, receive: Receive, sent: list[Message]) -> None:
    """POST /batch below httpx."""
    scope: Scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
        "scheme": "http", "path": "/batch", "raw_path": b"/batch", "root_path": "", "query_string": b"",
        "headers": [], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip

    async def send(message: Message) -> None:
        sent.append(message)

    await running.app(scope, receive, send)


def body_of(*items: dict[str, Any]) -> Message:
    body = json.dumps({"requests": items}).encode()
    return {"type": "http.request", "body": body, "more_body": False}


@pytest.mark.parametrize("how", ["disconnect", "cancel"])
async def test_a_client_that_leaves_cancels_what_is_queued(how: str) -> None:
    async with gated() as (running, engine):
        engine.hold()
        messages: asyncio.Queue[Message] = asyncio.Queue()
        messages.put_nowait(body_of(*map(infer, range(12))))
        sent: list[Message] = []
        task = asyncio.create_task(call(running, messages.get, sent))
        assert await asyncio.to_thread(engine.began.get, timeout=DEADLINE_S) == [0, 1, 2, 3]
        if how == "disconnect":
            messages.put_nowait({"type": "http.disconnect"})
            await task
        else:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert running.batcher().queued_rows == 0
        assert running.batcher().counters.cancelled == 12
        engine.release()
        assert data((await ask(running, infer(50)))[0]) == [100]
        assert [8, 9, 10, 11] not in engine.ran


async def test_a_client_that_leaves_before_its_body_is_there() -> None:
    async with gated() as (running, engine):
        messages: asyncio.Queue[Message] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": b'{"requests":[', "more_body": True})
        messages.put_nowait({"type": "http.disconnect"})
        await call(running, messages.get, [])
        assert engine.ran == []


# Items that go through the application


class Outer:
    """A call whose items meet an application that the test has made."""

    def __init__(self, running: InProcess, app: Any, *items: dict[str, Any], headers: Any = ()) -> None:
        body = json.dumps({"requests": items}).encode()
        scope: Scope = {"type": "http", "method": "POST", "path": "/batch", "root_path": "/base"}
        scope.update({"headers": list(headers), "user": "ann", "path_params": {}, "endpoint": None})
        self.left: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._call = _Call(running.core, app, scope, *_parse(running.core, body, 10))

    async def answers(self) -> Any:
        async def receive() -> Message:
            return await self.left

        return await self._call.answers(receive)


async def test_the_outer_calls_credentials_apply_to_each_item() -> None:
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)
        assert (await receive())["body"] == b""
        await send({"type": "http.response.start", "status": 204, "headers": [(b"x-a", b"b")]})
        await send({"type": "http.response.body"})

    outer_headers = [(b"authorization", b"Bearer 1"), (b"content-length", b"77"), (b"idempotency-key", b"k")]
    async with gated() as (running, _):
        item = get("/v2/models/gate?a=b", headers={"Accept": "text/plain"})
        outer = Outer(running, app, item, headers=outer_headers)
        (reply,) = await outer.answers()
        assert reply.status == 204
    (scope,) = scopes
    assert scope["user"] == "ann"
    assert (scope["method"], scope["path"], scope["query_string"]) == ("GET", "/base/v2/models/gate", b"a=b")
    assert scope["root_path"] == "/base"
    assert dict(scope["headers"]) == {
        b"authorization": b"Bearer 1",
        b"accept": b"text/plain",
        b"content-length": b"0",
    }


async def test_an_item_that_the_application_fails_on(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError("broken")

    async with gated() as (running, _):
        answers = await Outer(running, app, get("/v2"), infer(1)).answers()
        assert [each.status for each in answers] == [500, 200]
        assert "broken" in caplog.text


async def test_predictions() -> None:
    url, body = "/v1/models/gate/predictions", {"inputs": {"x": [[4], [5]]}}
    later = {"prefer": "respond-async", "idempotency-key": "k"}
    async with gated() as (running, engine):
        answers = await ask(
            running,
            infer(6),
            {"id": "now", "url": url, "method": "POST", "body": {"inputs": {"x": [[3]]}}},
            {"id": "later", "url": url, "method": "POST", "body": body, "headers": later},
        )
        assert answers[1]["body"]["outputs"]["y"]["data"] == [[6]]
        assert answers[2]["status"] == 202
        assert engine.ran[0][:2] == [6, 3]  # an infer item and a prediction in one batch
        where = answers[2]["headers"]["location"]
        (answer,) = await ask(running, get(where, headers={"prefer": "wait=20"}))
        assert answer["body"]["status"] == "completed"
        (answer,) = await ask(running, {"id": "d", "url": where, "method": "DELETE"})
        assert answer["status"] == 200


async def test_a_client_that_leaves_ends_them_too() -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        began.set()
        try:
            await receive()
        finally:
            ended.set()

    async with gated() as (running, _):
        outer = Outer(running, app, get("/v2"))
        task = asyncio.create_task(outer.answers())
        await began.wait()
        outer.left.set_result({"type": "http.disconnect"})
        assert await task is None
        await ended.wait()
