"""An ASGI application's side of a request: `receive` and `send`, and applications that break the protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from cobatch.server.edge.cycle import AsgiCycle, HeadBeginnings
from cobatch.server.http.reply import Reply

App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Client:
    """A connection that keeps the bytes written to it."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed = False
        self.transport = SimpleNamespace(
            write=self.written.append, is_closing=lambda: self.closed, close=self.close
        )
        self.inference = SimpleNamespace(closing=False)
        self.server_state = SimpleNamespace(tasks=set())
        self.writable = asyncio.Event()
        self.write_paused = False
        self.replies: list[Reply] = []
        self.complete = 0
        self.ended: list[AsgiCycle] = []

    def closes_now(self) -> bool:
        return False

    def close(self) -> None:
        self.closed = True

    def allow_body(self) -> None:
        self.written.append(b"HTTP/1.1 100 Continue\r\n\r\n")

    def write_reply(self, reply: Reply, keep_alive: bool) -> float | None:
        assert not keep_alive
        self.replies.append(reply)
        return None

    def head_beginnings(self) -> dict[int, bytes]:
        beginnings = HeadBeginnings()
        beginnings.headers = [(b"date", b"today")]
        return beginnings

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def on_response_complete(self) -> None:
        self.complete += 1

    def on_cycle_end(self, cycle: AsgiCycle) -> None:
        self.ended.append(cycle)


def cycle_of(
    client: Client, method: str = "GET", *, version: str = "1.1", expects_continue: bool = False
) -> AsgiCycle:
    return AsgiCycle(
        client,
        {"method": method, "http_version": version},
        keep_alive=True,
        expects_continue=expects_continue,
    )


def start(*headers: tuple[bytes, bytes], status: int = 200) -> Message:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(data: bytes, more_body: bool = False) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more_body}


def length(size: int) -> tuple[bytes, bytes]:
    return b"content-length", b"%d" % size


def sends(*messages: Message) -> App:
    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    return app


async def run(*messages: Message, method: str = "GET", version: str = "1.1") -> Client:
    client = Client()
    await cycle_of(client, method, version=version).run(sends(*messages))
    return client


HEAD = b"HTTP/1.1 200 OK\r\ndate: today\r\n"


async def test_head_and_body_of_known_length_are_one_write() -> None:
    client = await run(start(length(5)), body(b"a", more_body=True), body(b"bcde"))
    assert client.written == [HEAD + b"content-length: 5\r\n\r\na", b"bcde"]
    assert (client.complete, client.closed) == (1, False)


async def test_a_body_of_unknown_length_is_chunked_and_its_head_sent_at_once() -> None:
    client = await run(start(), body(b"", more_body=True), body(b"ab", more_body=True), body(b"c"))
    assert client.written == [
        HEAD + b"transfer-encoding: chunked\r\n\r\n", b"2\r\nab\r\n", b"1\r\nc\r\n0\r\n\r\n"
    ]  # fmt: skip
    assert client.complete == 1


async def test_a_body_of_unknown_length_ends_with_the_connection_in_http_1_0() -> None:
    client = await run(start(), body(b"ab", more_body=True), body(b"c"), version="1.0")
    assert client.written == [HEAD + b"connection: close\r\n\r\n", b"ab", b"c"]
    assert (client.complete, client.closed) == (1, True)


async def test_head_requests_get_no_body() -> None:
    client = await run(start(length(5)), body(b"abcde"), method="HEAD")
    assert client.written == [HEAD + b"content-length: 5\r\n\r\n"]
    client = await run(start(), body(b"abcde"), method="HEAD")
    assert client.written == [HEAD + b"\r\n"]


@pytest.mark.parametrize("status", [204, 304])
async def test_statuses_without_a_body(status: int) -> None:
    client = await run(start(status=status), body(b""))
    assert b"transfer-encoding" not in client.written[0]
    assert client.complete == 1


async def test_connection_close_ends_the_connection() -> None:
    client = await run(start(length(0), (b"connection", b"Close")), body(b""))
    assert client.written[0].count(b"onnection") == 1
    assert client.closed


@pytest.mark.parametrize("data", [b"abc", b"abcdefg"])
async def test_a_wrong_content_length_ends_the_connection(
    data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    client = await run(start(length(5)), body(data))
    assert (client.written, client.closed, client.complete) == ([], True, 0)
    assert "not as long as its Content-Length" in caplog.text


@pytest.mark.parametrize("value", [b"a\r\nset-cookie: b", b"a\nb", b"a\rb"])
async def test_a_line_break_in_a_header_is_never_sent(value: bytes, caplog: pytest.LogCaptureFixture) -> None:
    client = await run(start(length(0), (b"location", value)), body(b""))
    assert (client.written, [reply.slug for reply in client.replies]) == ([], ["internal"])
    assert "a line break in a response header" in caplog.text


@pytest.mark.parametrize(
    "messages", [[body(b"")], [start(length(0)), start()], [start(length(0)), body(b""), body(b"")]]
)
async def test_messages_out_of_order_are_errors(
    messages: list[Message], caplog: pytest.LogCaptureFixture
) -> None:
    await run(*messages)
    assert "unexpected ASGI message" in caplog.text


async def test_an_application_that_fails_before_its_response(caplog: pytest.LogCaptureFixture) -> None:
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise RuntimeError("broken")

    client = Client()
    await cycle_of(client).run(app)
    (reply,) = client.replies
    assert (reply.status, reply.slug) == (500, "internal")
    assert "RuntimeError: broken" in caplog.text


async def test_an_application_that_ends_within_its_response(caplog: pytest.LogCaptureFixture) -> None:
    client = await run(start(), body(b"a", more_body=True))
    assert (client.closed, client.replies) == (True, [])
    assert "without a complete response" in caplog.text


async def test_an_application_without_a_response(caplog: pytest.LogCaptureFixture) -> None:
    client = await run()
    assert [reply.slug for reply in client.replies] == ["internal"]
    assert "without a complete response" in caplog.text


async def test_the_body_arrives_in_parts_and_then_the_disconnect() -> None:
    client = Client()
    cycle = cycle_of(client)
    received: list[Message] = []

    async def app(_scope: Scope, receive: Receive, _send: Send) -> None:
        while not received or received[-1]["type"] != "http.disconnect":
            received.append(await receive())

    task = asyncio.create_task(cycle.run(app))
    steps: list[Callable[[], None]] = [
        lambda: cycle.on_body(b"a"), lambda: cycle.on_body(b"b"), cycle.on_end, cycle.on_disconnect
    ]  # fmt: skip
    for step in steps:
        await asyncio.sleep(0)
        step()
    await task
    bodies: list[Any] = [(one.get("body"), one.get("more_body")) for one in received]
    assert bodies == [(b"a", True), (b"b", True), (b"", False), (None, None)]
    assert client.written == []
    assert client.ended == [cycle]


async def test_an_unread_body_is_buffered_up_to_a_limit() -> None:
    client = Client()
    cycle = cycle_of(client)
    cycle.on_body(b"a" * 65536)
    cycle.on_body(b"b")
    assert not client.reading
    cycle.on_end()
    assert await cycle.receive() == {
        "type": "http.request", "body": b"a" * 65536 + b"b", "more_body": False
    }  # fmt: skip


async def test_100_continue_is_sent_once_and_only_if_the_body_is_read() -> None:
    client = Client()
    cycle = cycle_of(client, expects_continue=True)
    cycle.on_body(b"a")
    await cycle.receive()
    cycle.on_end()
    await cycle.receive()
    assert client.written == [b"HTTP/1.1 100 Continue\r\n\r\n"]
    assert (await run(start(length(0)), body(b""))).written[0].startswith(HEAD)


async def test_sending_waits_for_a_slow_client() -> None:
    client = Client()
    client.write_paused = True
    task = asyncio.create_task(cycle_of(client).run(sends(start(length(1)), body(b"a"))))
    await asyncio.sleep(0)
    assert client.written == []
    client.write_paused = False
    client.writable.set()
    await task
    assert client.written == [HEAD + b"content-length: 1\r\n\r\na"]


async def test_a_response_after_the_disconnect_is_dropped() -> None:
    client = Client()
    cycle = cycle_of(client)
    cycle.on_disconnect()
    await cycle.run(sends(start(length(1)), body(b"a")))
    assert (client.written, client.complete, client.replies) == ([], 0, [])
