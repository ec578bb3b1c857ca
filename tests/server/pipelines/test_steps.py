"""Steps of calls over HTTP: from real processes into the queues of models in home."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from cobatch.engines.errors import EngineRunError
from cobatch.server.links.hub import Hub, hub_of
from cobatch.server.settings.auth import AuthSettings, TenantRule
from cobatch.server.settings.schema import ModelSettings, PipelineSettings
from tests.support.auth.protected import settings_in
from tests.support.http.in_process import InProcess, in_process
from tests.support.http.serving import DEADLINE_S, GatedEngine
from tests.support.paths import ROOT

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Running:
    """A server with pipelines, and its only model."""

    home: InProcess
    engine: GatedEngine

    @property
    def hub(self) -> Hub:
        return hub_of(self.home.inference)

    async def ask(self, *, to: str = "Steps", query: str = "", **ask: Any) -> httpx.Response:
        return await self.home.http.post(f"/v1/models/{to}/infer{query}", json=ask)

    async def until(self, condition: Callable[[], object]) -> None:
        """Let the loop run until a condition holds, of which no event tells."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110 - what happens in another process sets no event
                await asyncio.sleep(0)

    @property
    def idle(self) -> bool:
        """No step is open, and no block in use."""
        links = self.hub.links
        return not any(link.open or link._slab_out.arena.blocks for link in links)


@asynccontextmanager
async def serving(
    *names: str,
    engine: GatedEngine | None = None,
    max_queue_rows: int = 1000,
    auth: AuthSettings | None = None,
    **settings: Any,
) -> AsyncIterator[Running]:
    engine = engine or GatedEngine(8)
    model = ModelSettings(path="gate", max_batch_size=engine.max_batch_size, max_queue_rows=max_queue_rows)
    folder: dict[str, Any] = {"python_path": str(ROOT), "processes": 1, **settings}
    source = "tests/support/pipelines/stepping.py"
    pipelines = [PipelineSettings(python=f"{source}:{name}", **folder) for name in names or ("Steps",)]
    async with in_process(model, engines={"gate": engine}, pipelines=pipelines, auth=auth) as home:
        engine.ran.clear()
        yield Running(home, engine)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared() -> AsyncIterator[Running]:
    async with serving("Steps", "Blocking") as one:
        yield one


@pytest.fixture
def running(shared: Running) -> Iterator[Running]:
    shared.engine.ran.clear()
    shared.engine.began = queue.SimpleQueue()  # an earlier test may have left batches in it
    yield shared
    shared.engine.fails = lambda x: None
    shared.engine.release()


@pytest.mark.parametrize("name", ["Steps", "Blocking"])
async def test_steps_and_their_times(running: Running, name: str) -> None:
    answer = await running.ask(to=name, count=3, value=5)
    assert answer.json() == {"numbers": [10, 12, 14], "kinds": []}
    timing = dict(one.split(";dur=") for one in answer.headers["server-timing"].split(", "))
    assert list(timing) == ["queue", "compute", "gate-queue", "gate-run"]
    explained = await running.home.http.get(f"/v1/requests/{answer.headers['x-request-id']}")
    assert [step["model"] for step in explained.json()["steps"]] == ["gate"] * 3


async def test_steps_of_several_calls_and_other_requests_share_batches(running: Running) -> None:
    running.engine.hold()
    calls = [asyncio.create_task(running.ask(count=2, value=10 * n)) for n in range(3)]
    body = {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1, 1], "data": [7]}]}
    other = asyncio.create_task(running.home.http.post("/v2/models/gate/infer", json=body))
    await running.until(lambda: sum(len(link.open) for link in running.hub.links) == 6)
    running.engine.release()
    answers = await asyncio.gather(*calls)
    assert [one.json()["numbers"] for one in answers] == [[0, 2], [20, 22], [40, 42]]
    assert (await other).status_code == 200
    assert len(running.engine.ran) < 7


@pytest.mark.parametrize(
    ("ask", "status", "slug"),
    [
        ({"do": "float"}, 500, "run-failed"),
        ({"do": "unknown"}, 500, "run-failed"),
        ({"do": "shape"}, 422, "wrong-shape"),
        ({"value": 13}, 422, "input-rejected"),
        ({"value": 13, "do": "catch"}, 200, ""),
    ],
)
async def test_problems_of_steps(
    running: Running, ask: dict[str, Any], status: int, slug: str, caplog: pytest.LogCaptureFixture
) -> None:
    running.engine.fails = lambda x: EngineRunError("poison") if (x == 13).any() else None
    answer = await running.ask(**ask)
    assert answer.status_code == status, answer.text
    if slug:
        assert answer.json()["type"] == f"/problems/{slug}"
    else:
        assert answer.json() == {"numbers": [], "kinds": ["input-rejected"]}
    if slug == "run-failed":
        assert any("must be of int64" in one or "no model 'gote'" in one for one in caplog.messages)
    assert (await running.ask()).status_code == 200


@pytest.mark.parametrize("name", ["Steps", "Blocking"])
async def test_the_steps_of_a_client_that_leaves_are_cancelled(running: Running, name: str) -> None:
    running.engine.hold()
    first = asyncio.create_task(running.ask())
    await asyncio.to_thread(running.engine.began.get)
    call = asyncio.create_task(running.ask(to=name, count=5))
    await running.until(lambda: sum(len(link.open) for link in running.hub.links) > 1)
    call.cancel()
    await running.until(lambda: sum(len(link.open) for link in running.hub.links) == 1)
    running.engine.release()
    assert (await first).json()["numbers"] == [2]
    assert (await running.ask(to=name)).json()["numbers"] == [2]
    await running.until(lambda: running.idle)


@pytest.mark.parametrize("name", ["Steps", "Blocking"])
async def test_the_deadline_of_a_call_is_that_of_its_steps(running: Running, name: str) -> None:
    running.engine.hold()
    first = asyncio.create_task(running.ask())
    await asyncio.to_thread(running.engine.began.get)
    answer = await running.ask(to=name, query="?deadline_ms=100")
    assert (answer.status_code, answer.json()["type"]) == (504, "/problems/expired")
    await running.until(lambda: sum(len(link.open) for link in running.hub.links) == 1)
    running.engine.release()
    await first
    assert (await running.ask(to=name)).status_code == 200


async def test_steps_wait_where_other_requests_are_refused() -> None:
    async with serving(engine=GatedEngine(1), max_queue_rows=1) as running:
        answers = await asyncio.gather(*[running.ask(count=8, value=n) for n in range(8)])
        assert [one.json()["numbers"][0] for one in answers] == [2 * n for n in range(8)]
        assert running.home.batcher().counters.refused == 0


async def test_the_limits_and_permissions_of_a_tenant_are_those_of_its_calls(tmp_path: Path) -> None:
    rule = TenantRule(tenant="one", max_concurrent=1, requests_per_s=0.001, burst=2)
    auth, keys = settings_in(tmp_path, {"one": ("infer:Steps",)}, tenants=(rule,))
    async with serving(auth=auth) as running:
        running.home.http.headers["x-api-key"] = keys["one"]
        assert (await running.ask(count=5)).json()["numbers"] == [2, 4, 6, 8, 10]
        body = {"inputs": [{"name": "x", "datatype": "INT64", "shape": [1, 1], "data": [7]}]}
        assert (await running.home.http.post("/v2/models/gate/infer", json=body)).status_code == 403
        assert (await running.ask(count=5)).status_code == 200
        assert (await running.ask()).status_code == 429  # the third call
        ((name, total), *_) = running.home.inference.tenant_totals()
        assert (name, total.answered, total.refused) == ("one", 2, 1)
        assert total.rows == 2 * (5 + 1)  # of the steps and of the calls


async def test_a_process_that_ends_leaves_nothing(running: Running) -> None:
    running.engine.hold()
    first = asyncio.create_task(running.ask(to="Blocking"))
    await asyncio.to_thread(running.engine.began.get)
    links = set(running.hub.links)
    call = asyncio.create_task(running.ask(do="exit", count=50))
    await running.until(lambda: any(len(link.open) > 1 for link in running.hub.links))
    assert (await call).status_code == 500
    await running.until(lambda: sum(len(link.open) for link in running.hub.links) == 1)
    assert not running.home.batcher().queue.rows
    running.engine.release()
    assert (await first).json()["numbers"] == [2]
    assert (await running.ask(count=3)).json()["numbers"] == [2, 4, 6]  # by the next process
    await running.until(lambda: running.idle)
    assert len(links & running.hub.links) == 1


async def test_a_process_that_breaks_the_rules_of_its_link_is_ended(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await running.ask(do="garble")
    assert (answer.status_code, answer.json()["type"]) == (500, "/problems/run-failed")
    assert any(
        "sent a bad message and was ended: no block in use is at 12345" in one for one in caplog.messages
    )
    assert (await running.ask()).json()["numbers"] == [2]  # by the next process


async def test_a_hint_for_calls_of_models(running: Running) -> None:
    refused = await running.ask(to="gate")
    detail = "'gate' is a model: POST /v1/models/gate/predictions"
    assert (refused.status_code, refused.json()["detail"]) == (404, detail)


async def test_a_model_that_there_is_not_is_refused_at_load() -> None:
    settings = PipelineSettings(
        python="tests/support/pipelines/lost.py:Lost", python_path=str(ROOT), processes=1
    )
    async with in_process(pipelines=[settings], ready=False) as home:
        lost: Any = home.inference.pipelines["Lost"]
        async with asyncio.timeout(DEADLINE_S):
            while lost.load_error is None:  # noqa: ASYNC110 - nothing tells of it
                await asyncio.sleep(0)
        assert "there is no model 'gate'; the server has no models" in str(lost.load_error)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_nothing_leaks_in_many_calls(running: Running) -> None:
    await running.ask(count=2, width=10_000)
    before = descriptors()
    for _ in range(25):
        answers = await asyncio.gather(*[running.ask(count=2, width=width) for width in (1, 10_000) * 2])
        assert all(answer.status_code == 200 for answer in answers)
    await running.until(lambda: running.idle)
    assert descriptors() <= before


async def test_metrics_have_pipelines_beside_models() -> None:
    async with serving() as running:
        await running.ask()
        await running.ask(do="shape")
        text = (await running.home.http.get("/metrics")).text
    for line in (
        'cobatch_requests_total{code="200",model="Steps",reason=""} 1.0',
        'cobatch_requests_total{code="422",model="Steps",reason="wrong-shape"} 1.0',
        'cobatch_request_duration_seconds_count{model="Steps"} 1.0',
        'cobatch_model_state{model="Steps",state="ready"} 1.0',
        'cobatch_queue_limit_rows{model="Steps"} 1024.0',
        'cobatch_batch_compute_seconds_count{model="Steps"} 1.0',
        'cobatch_batch_compute_seconds_count{model="gate"} 1.0',
        'cobatch_http_requests_total{code="200",method="POST",reason="",route="/v1/models/{name}/infer"} 1.0',
    ):
        assert line in text, [one for one in text.splitlines() if one.startswith(line.partition("{")[0])]
