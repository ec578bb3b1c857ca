"""POST /batch below HTTP: clients that disconnect."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope

from tests.support.http.batching import ask, data, infer
from tests.support.http.in_process import InProcess, gated
from tests.support.http.serving import DEADLINE_S


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
async def test_a_disconnect_cancels_queued_items(how: str) -> None:
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
        assert running.batcher().queue.rows == 0
        assert running.batcher().counters.cancelled == 12
        engine.release()
        assert data((await ask(running, infer(50)))[0]) == [100]
        assert [8, 9, 10, 11] not in engine.ran


async def test_a_disconnect_before_the_body_is_complete() -> None:
    async with gated() as (running, engine):
        messages: asyncio.Queue[Message] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": b'{"requests":[', "more_body": True})
        messages.put_nowait({"type": "http.disconnect"})
        await call(running, messages.get, [])
        assert engine.ran == []
