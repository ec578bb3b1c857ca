"""The live page's feed: who gets which event, and when it ends."""

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
from cobatch.server.dashboard import feed as live_module
from cobatch.server.dashboard import seconds as recent
from cobatch.server.dashboard.feed import KEPT, Live, hello
from cobatch.server.observability.history import History
from cobatch.server.settings.auth import TenantRule
from cobatch.server.settings.schema import ModelSettings
from tests.support.auth.protected import settings_in
from tests.support.http.in_process import InProcess, gated, in_process
from tests.support.http.serving import DEADLINE_S, GATE, GatedEngine, rows_of


class Clock:
    """Both clocks of a feed."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def wall(self) -> float:
        return 1_000_000.0 + self.now_s


class Feed:
    """A feed of a running application, whose seconds pass when the test says so."""

    def __init__(self, running: InProcess) -> None:
        self.clock = Clock()
        self.kept = History()
        running.core.observer.on_batch(self.kept.on_batch)
        self.live = Live(running.core, self.kept, clock=self.clock.monotonic, wall_clock=self.clock.wall)

    def second(self) -> None:
        """A second has passed."""
        self.clock.now_s += 1.0
        self.live.tick()

    def look(self, principal: Principal | None = None) -> AsyncIterator[bytes]:
        """A stream of events."""
        return self.live.stream(principal)


def parsed(event: bytes) -> tuple[str, Any]:
    """Kind and data of an event, which is one whole one."""
    kind, data, *rest = event.decode().split("\n")
    assert rest == ["", ""]
    return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


async def following(stream: AsyncIterator[bytes]) -> tuple[str, Any]:
    """The next event."""
    async with asyncio.timeout(DEADLINE_S):
        return parsed(await anext(stream))


async def asked(stream: AsyncIterator[bytes]) -> asyncio.Task[bytes]:
    """A task that waits for the next event."""
    task: asyncio.Task[bytes] = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    return task


async def infer(running: InProcess, *rows: int, **headers: str) -> int:
    answer = await running.http.post(GATE, json=rows_of(*rows), headers=headers)
    return answer.status_code


async def test_hello_comes_first_with_the_seconds_so_far_and_then_each_second() -> None:
    async with gated() as (running, _):
        feed = Feed(running)
        assert await infer(running, 1, 2) == 200
        feed.second()
        stream = feed.look()
        kind, said = await following(stream)
        assert kind == "hello"
        (second,) = said["history"]
        assert second["models"]["gate"]["did"]["rows"] == 2
        assert second["time"] == feed.clock.wall()
        assert said["totals"]["gate"]["rows"] == 2
        assert said["models"]["gate"]["sizes"] == [1, 2, 3, 4]

        waiting = await asked(stream)
        assert not waiting.done()
        assert await infer(running, 3) == 200
        feed.second()
        kind, tick = parsed(await waiting)
        assert kind == "tick"
        assert tick["span"] == 1.0
        assert tick["models"]["gate"]["did"]["rows"] == 1
        assert tick["totals"]["gate"]["rows"] == 3
        assert [row[6] for row in tick["timeline"]["gate"]] == [2, 1]
        await stream.aclose()  # type: ignore[attr-defined]
        assert feed.live.viewers == 0


async def test_all_who_look_get_the_same_bytes_and_nobody_who_looks_costs_nothing() -> None:
    async with gated() as (running, _):
        feed = Feed(running)
        with mock.patch.object(live_module, "timeline", wraps=recent.timeline) as timeline:
            feed.second()
            assert not timeline.called
            streams = [feed.look() for _ in range(3)]
            for stream in streams:
                assert (await following(stream))[0] == "hello"
            tasks = [await asked(stream) for stream in streams]
            timeline.reset_mock()
            feed.second()
            events = [await task for task in tasks]
            assert timeline.call_count == 1
        assert events[0] is events[1] is events[2]


async def test_who_missed_a_second_gets_all_of_them_again() -> None:
    async with gated() as (running, _):
        feed = Feed(running)
        stream = feed.look()
        await following(stream)
        feed.second()
        feed.second()
        kind, said = await following(stream)
        assert kind == "hello"
        assert len(said["history"]) == 2


async def test_only_the_last_minutes_are_kept() -> None:
    async with gated() as (running, _):
        feed = Feed(running)
        for _ in range(KEPT + 5):
            feed.second()
        _, said = await following(feed.look())
        times = [second["time"] for second in said["history"]]
        assert len(times) == KEPT
        assert times[-1] == feed.clock.wall()
        assert times[0] == times[-1] - KEPT + 1


async def test_streams_end_when_the_server_is_about_to_stop() -> None:
    async with gated() as (running, _):
        feed = Feed(running)
        stream = feed.look()
        await following(stream)
        waiting = await asked(stream)
        feed.live.close()
        with pytest.raises(StopAsyncIteration):
            await waiting
        with pytest.raises(StopAsyncIteration):
            await anext(feed.look())


async def test_a_stream_ends_with_its_credential() -> None:
    async with gated() as (running, _):
        feed = Feed(running)
        principal = Principal(
            Tenant("ops"), "ops", permissions=frozenset(("admin",)), rules={},
            expires_s=feed.clock.wall() + 1.5,
        )  # fmt: skip
        stream = feed.look(principal)
        await following(stream)
        waiting = await asked(stream)
        feed.second()
        assert parsed(await waiting)[0] == "tick"
        waiting = await asked(stream)
        feed.second()
        with pytest.raises(StopAsyncIteration):
            await waiting


async def test_one_who_leaves_does_not_disturb_the_others() -> None:
    async with gated() as (running, _):
        feed = Feed(running)
        leaves, stays = feed.look(), feed.look()
        await following(leaves)
        await following(stays)
        leaving, staying = await asked(leaves), await asked(stays)
        leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaving
        assert feed.live.viewers == 1
        feed.second()
        assert parsed(await staying)[0] == "tick"


async def test_a_second_that_fails_is_logged_and_the_next_one_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with gated() as (running, _):
        live = Live(running.core, History())
        told = asyncio.Event()
        outcomes = [RuntimeError("broken"), None]

        def tick() -> None:
            outcome = outcomes.pop(0)
            if outcome is not None:
                raise outcome
            told.set()
            raise asyncio.CancelledError

        with mock.patch.object(live_module, "INTERVAL_S", 0.0), mock.patch.object(live, "tick", tick):
            ticking = asyncio.create_task(live.run())
            async with asyncio.timeout(DEADLINE_S):
                await told.wait()
            with contextlib.suppress(asyncio.CancelledError):
                await ticking
        assert "a second of the live page is missing" in caplog.text
        caplog.clear()


async def test_settings_are_shown_without_what_may_be_secret() -> None:
    async with gated(
        kept_s=60.0, trace_endpoint="http://me:hidden@collector:4318", tls_cert="/etc/secret.pem"
    ) as (running, _):
        said = hello(running.core, 0.0)
    assert said["settings"]["kept_s"] == 60.0
    assert "kept_s" in said["own"]
    assert "receive_timeout_s" not in said["own"]
    text = msgspec.json.encode(said).decode()
    assert "hidden" not in text
    assert "secret" not in text
    gate = said["models"]["gate"]
    assert gate["platform"] == "gated"
    assert "max_batch_size" in gate["own"]
    assert "instances" not in gate["own"]


async def test_tenants_are_told_with_their_weights(tmp_path: Path) -> None:
    auth, keys = settings_in(
        tmp_path, {"red": ("infer",), "blue": ("infer",)}, tenants=(TenantRule(tenant="red", weight=3.0),)
    )
    model = ModelSettings(path="gate", max_batch_size=4)
    async with in_process(model, engines={"gate": GatedEngine()}, auth=auth) as running:
        feed = Feed(running)
        for tenant, times in (("red", 3), ("blue", 1)):
            for _ in range(times):
                assert await infer(running, 1, 2, **{"X-API-Key": keys[tenant]}) == 200
        feed.second()
        _, said = await following(feed.look())
        tenants = said["history"][-1]["tenants"]
        assert (tenants["red"]["requests"], tenants["red"]["rows"], tenants["red"]["weight"]) == (3, 6, 3.0)
        assert (tenants["blue"]["requests"], tenants["blue"]["rows"]) == (1, 2)
        feed.second()
        _, said = await following(feed.look())
        assert "requests" not in said["history"][-1]["tenants"]["red"]


async def test_the_application_ticks_by_itself() -> None:
    ticked = asyncio.Event()
    with (
        mock.patch.object(live_module, "INTERVAL_S", 0.0),
        mock.patch.object(Live, "tick", side_effect=ticked.set),
    ):
        async with gated(), asyncio.timeout(DEADLINE_S):
            await ticked.wait()
