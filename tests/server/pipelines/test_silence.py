"""A stream that is silent for long: comments keep proxies from closing it. In virtual time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from cobatch.batcher.errors import ExpiredError
from cobatch.server.observability.traffic import Traffic
from cobatch.server.pipelines import sse
from cobatch.server.pipelines.call import NOTHING, Head
from cobatch.server.pipelines.request import PipelineRequest
from cobatch.server.pipelines.routes import _Answering
from tests.support.virtual.loop import run

TEXT = b"data: a\n\n"


def silent_then(call: PipelineRequest, *, item_s: float, end_s: float, error: Exception | None) -> None:
    """Let an item come at a time, and the end, or an error, at another."""

    def item() -> None:
        call.head = Head(0, "text/event-stream", streamed=True)
        call.items.append(memoryview(b"a"))
        call.changed.set()

    def end() -> None:
        call.ended, call.error = True, error
        call.changed.set()

    loop = asyncio.get_running_loop()
    loop.call_later(item_s, item)
    loop.call_later(end_s, end)


async def sent(
    *, item_s: float, end_s: float, error: Exception | None = None
) -> tuple[float, list[tuple[float, bytes]]]:
    """Return when the response began, and its parts with their times."""
    loop = asyncio.get_running_loop()
    call = PipelineRequest("text/plain", NOTHING)
    pipeline: Any = SimpleNamespace(
        content=SimpleNamespace(streamed=True), traffic=Traffic(), path="/v1/models/a/infer"
    )
    request: Any = SimpleNamespace(receive=loop.create_future, scope={})
    answering = _Answering(None, pipeline, request, call)  # type: ignore[arg-type]  # not used by a stream
    silent_then(call, item_s=item_s, end_s=end_s, error=error)
    await answering.response()
    began_s = loop.time()
    return began_s, [(loop.time(), part) async for part in answering.events()]


def test_a_comment_after_each_silence() -> None:
    async def main() -> None:
        began_s, parts = await sent(item_s=1, end_s=40)
        assert began_s == 1
        assert parts == [(1, TEXT), (16, sse.COMMENT), (31, sse.COMMENT), (40, sse.completed())]

    run(main())


def test_a_stream_that_is_silent_before_its_first_item_begins_all_the_same() -> None:
    async def main() -> None:
        began_s, parts = await sent(item_s=40, end_s=41)
        assert began_s == 15
        assert parts == [(30, sse.COMMENT), (40, TEXT), (41, sse.completed())]

    run(main())


def test_an_error_after_the_response_has_begun_is_an_event() -> None:
    async def main() -> None:
        began_s, parts = await sent(item_s=100, end_s=20, error=ExpiredError(20))
        assert began_s == 15
        ((at_s, last),) = parts
        assert at_s == 20
        assert last.startswith(b'event: error\ndata: {"type":"/problems/expired"')

    run(main())
