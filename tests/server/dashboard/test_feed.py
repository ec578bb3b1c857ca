"""The live page's feed: events, missed events, and the end of streams."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest

from cobatch.batcher.tenant import Tenant
from cobatch.server.auth.principal import Principal
from cobatch.server.dashboard import feed as feed_module
from cobatch.server.dashboard import seconds as recent
from cobatch.server.dashboard.feed import KEPT, Feed, hello
from cobatch.server.observability.history import History
from cobatch.server.settings.auth import TenantRule
from cobatch.server.settings.schema import ModelSettings, PipelineSettings
from tests.support.auth.protected import settings_in
from tests.support.http.in_process import InProcess, gated, in_process
from tests.support.http.serving import DEADLINE_S, GATE, GatedEngine, rows_of
from tests.support.paths import ROOT


class Clock:
    """Both clocks of a feed."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def wall(self) -> float:
        return 1_000_000.0 + self.now_s


class Driver:
    """The feed of a running application with a clock that the test advances."""

    def __init__(self, running: InProcess) -> None:
        self.clock = Clock()
        self.kept = History()
        running.inference.observer.on_batch(self.kept.on_batch)
        self.feed = Feed(running.inference, self.kept, clock=self.clock.monotonic, wall_clock=self.clock.wall)

    def second(self) -> None:
        """Let a second pass."""
        self.clock.now_s += 1.0
        self.feed.tick()

    def look(self, principal: Principal | None = None) -> AsyncIterator[bytes]:
        """Return a stream of events."""
        return self.feed.stream(principal)


def parsed(event: bytes) -> tuple[str, Any]:
    """Return kind and data of exactly one event."""
    kind, data, *rest = event.decode().split("\n")
    assert rest == ["", ""]
    return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def next_event(stream: AsyncIterator[bytes]) -> tuple[str, Any]:
    """Return the next event."""
    async with asyncio.timeout(DEADLINE_S):
        return parsed(await anext(stream))


async def waiting_for_event(stream: AsyncIterator[bytes]) -> asyncio.Task[bytes]:
    """Return a task that waits for the next event."""
    task: asyncio.Task[bytes] = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    return task


async def infer(running: InProcess, *rows: int, **headers: str) -> int:
    answer = await running.http.post(GATE, json=rows_of(*rows), headers=headers)
    return answer.status_code


async def test_hello_with_kept_seconds_comes_first_and_then_ticks() -> None:
    async with gated() as (running, _):
        driver = Driver(running)
        assert await infer(running, 1, 2) == 200
        driver.second()
        stream = driver.look()
        kind, data = await next_event(stream)
        assert kind == "hello"
        (second,) = data["history"]
        assert second["models"]["gate"]["delta"]["rows"] == 2
        assert second["time"] == driver.clock.wall()
        assert data["totals"]["gate"]["rows"] == 2
        assert data["models"]["gate"]["sizes"] == [1, 2, 3, 4]

        waiting = await waiting_for_event(stream)
        assert not waiting.done()
        assert await infer(running, 3) == 200
        driver.second()
        kind, tick = parsed(await waiting)
        assert kind == "tick"
        assert tick["span"] == 1.0
        assert tick["models"]["gate"]["delta"]["rows"] == 1
        assert tick["totals"]["gate"]["rows"] == 3
        assert [row[6] for row in tick["timeline"]["gate"]] == [2, 1]
        await stream.aclose()  # type: ignore[attr-defined]
        assert driver.feed.viewers == 0


async def test_viewers_share_an_event_and_without_viewers_there_is_none() -> None:
    async with gated() as (running, _):
        driver = Driver(running)
        with mock.patch.object(feed_module, "timeline", wraps=recent.timeline) as timeline:
            driver.second()
            assert not timeline.called
            streams = [driver.look() for _ in range(3)]
            for stream in streams:
                assert (await next_event(stream))[0] == "hello"
            tasks = [await waiting_for_event(stream) for stream in streams]
            timeline.reset_mock()
            driver.second()
            events = [await task for task in tasks]
            assert timeline.call_count == 1
        assert events[0] is events[1] is events[2]


async def test_a_viewer_that_missed_a_tick_gets_hello_again() -> None:
    async with gated() as (running, _):
        driver = Driver(running)
        stream = driver.look()
        await next_event(stream)
        driver.second()
        driver.second()
        kind, data = await next_event(stream)
        assert kind == "hello"
        assert len(data["history"]) == 2


async def test_old_seconds_are_dropped() -> None:
    async with gated() as (running, _):
        driver = Driver(running)
        for _ in range(KEPT + 5):
            driver.second()
        _, data = await next_event(driver.look())
        times = [second["time"] for second in data["history"]]
        assert len(times) == KEPT
        assert times[-1] == driver.clock.wall()
        assert times[0] == times[-1] - KEPT + 1


async def test_streams_end_when_the_server_stops() -> None:
    async with gated() as (running, _):
        driver = Driver(running)
        stream = driver.look()
        await next_event(stream)
        waiting = await waiting_for_event(stream)
        driver.feed.close()
        with pytest.raises(StopAsyncIteration):
            await waiting
        with pytest.raises(StopAsyncIteration):
            await anext(driver.look())


async def test_a_stream_ends_with_its_credential() -> None:
    async with gated() as (running, _):
        driver = Driver(running)
        principal = Principal(
            Tenant("ops"), "ops", permissions=frozenset(("admin",)), rules={},
            expires_s=driver.clock.wall() + 1.5,
        )  # fmt: skip
        stream = driver.look(principal)
        await next_event(stream)
        waiting = await waiting_for_event(stream)
        driver.second()
        assert parsed(await waiting)[0] == "tick"
        waiting = await waiting_for_event(stream)
        driver.second()
        with pytest.raises(StopAsyncIteration):
            await waiting


async def test_a_cancelled_stream_does_not_affect_others() -> None:
    async with gated() as (running, _):
        driver = Driver(running)
        leaves, stays = driver.look(), driver.look()
        await next_event(leaves)
        await next_event(stays)
        leaving, staying = await waiting_for_event(leaves), await waiting_for_event(stays)
        leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaving
        assert driver.feed.viewers == 1
        driver.second()
        assert parsed(await staying)[0] == "tick"


async def test_a_failed_tick_is_logged_and_the_next_one_works(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with gated() as (running, _):
        feed = Feed(running.inference, History())
        succeeded = asyncio.Event()
        outcomes = [RuntimeError("broken"), None]

        def tick() -> None:
            outcome = outcomes.pop(0)
            if outcome is not None:
                raise outcome
            succeeded.set()
            raise asyncio.CancelledError

        with mock.patch.object(feed_module, "INTERVAL_S", 0.0), mock.patch.object(feed, "tick", tick):
            ticking = asyncio.create_task(feed.run())
            async with asyncio.timeout(DEADLINE_S):
                await succeeded.wait()
            with contextlib.suppress(asyncio.CancelledError):
                await ticking
        assert "a second of the live page is missing" in caplog.text
        caplog.clear()


async def test_hello_has_settings_without_secrets() -> None:
    async with gated(
        kept_s=60.0, trace_endpoint="http://me:hidden@collector:4318", tls_cert="/etc/secret.pem"
    ) as (running, _):
        data = hello(running.inference, 0.0)
    assert data["settings"]["kept_s"] == 60.0
    assert "kept_s" in data["own"]
    assert "receive_timeout_s" not in data["own"]
    text = msgspec.json.encode(data).decode()
    assert "hidden" not in text
    assert "secret" not in text
    gate = data["models"]["gate"]
    assert gate["platform"] == "gated"
    assert "max_batch_size" in gate["own"]
    assert "instances" not in gate["own"]


async def test_ticks_have_tenants_with_weights(tmp_path: Path) -> None:
    auth, keys = settings_in(
        tmp_path, {"red": ("infer",), "blue": ("infer",)}, tenants=(TenantRule(tenant="red", weight=3.0),)
    )
    model = ModelSettings(path="gate", max_batch_size=4)
    async with in_process(model, engines={"gate": GatedEngine()}, auth=auth) as running:
        driver = Driver(running)
        for tenant, times in (("red", 3), ("blue", 1)):
            for _ in range(times):
                assert await infer(running, 1, 2, **{"X-API-Key": keys[tenant]}) == 200
        driver.second()
        _, data = await next_event(driver.look())
        tenants = data["history"][-1]["tenants"]
        assert (tenants["red"]["requests"], tenants["red"]["rows"], tenants["red"]["weight"]) == (3, 6, 3.0)
        assert (tenants["blue"]["requests"], tenants["blue"]["rows"]) == (1, 2)
        driver.second()
        _, data = await next_event(driver.look())
        assert "requests" not in data["history"][-1]["tenants"]["red"]


async def test_the_application_runs_the_feed() -> None:
    ticked = asyncio.Event()
    with (
        mock.patch.object(feed_module, "INTERVAL_S", 0.0),
        mock.patch.object(Feed, "tick", side_effect=ticked.set),
    ):
        async with gated(), asyncio.timeout(DEADLINE_S):
            await ticked.wait()


async def test_pipelines_are_shown_as_models_are() -> None:
    source = "tests/support/pipelines/handlers.py:Backwards"
    settings = PipelineSettings(python=source, python_path=str(ROOT), processes=1)
    async with in_process(pipelines=[settings]) as running:
        driver = Driver(running)
        answer = await running.http.post("/v1/models/Backwards/infer", content=b"abc")
        assert answer.content == b"cba"
        driver.second()
        stream = driver.look()
        _, data = await next_event(stream)
        assert data["models"]["Backwards"]["kind"] == "pipeline"
        assert data["models"]["Backwards"]["own"] == ["python", "python_path", "processes"]
        shown = data["history"][0]["models"]["Backwards"]
        assert (shown["state"], shown["delta"]["requests"], sum(shown["latency"][1:])) == ("ready", 1, 1)
        await stream.aclose()  # type: ignore[attr-defined]
