"""Calls of pipelines over HTTP, to real processes: answers, streams, faults."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from cobatch.batcher.batcher import Batcher
from cobatch.server.pipelines.call import Described, NotLoaded
from cobatch.server.pipelines.pipeline import Pipeline
from cobatch.server.pipelines.process import PoolProcess
from cobatch.server.pipelines.wire import Wire
from cobatch.server.settings.schema import PipelineSettings
from tests.support.http.in_process import InProcess, in_process
from tests.support.paths import ROOT

SOURCE = "tests/support/pipelines/handlers.py"


def pipeline(name: str, **settings: Any) -> PipelineSettings:
    settings = {"processes": 1, "python_path": str(ROOT), **settings}
    return PipelineSettings(python=f"{SOURCE}:{name}", name=name.lower(), **settings)


@pytest.fixture
async def running() -> AsyncIterator[InProcess]:
    async with in_process(pipelines=[pipeline("Asked"), pipeline("Words"), pipeline("Backwards")]) as running:
        yield running


async def until(condition: Callable[[], object]) -> None:
    """Let the loop run until a condition holds, of which no event tells."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0)


async def started(running: InProcess) -> None:
    """Wait until a call runs."""
    batcher = running.inference.pipelines["asked"].batcher
    assert isinstance(batcher, Batcher)
    await until(lambda: batcher.running_batches)


async def ask(running: InProcess, do: str = "answer", text: str = "", **options: Any) -> httpx.Response:
    return await running.http.post("/v1/models/asked/infer", json={"do": do, "text": text}, params=options)


async def test_an_answer(running: InProcess) -> None:
    answer = await ask(running, text="hello")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json()["text"] == "hello"
    assert answer.headers["server-timing"].startswith("queue;dur=")


async def test_answers_at_the_same_time(running: InProcess) -> None:
    waiting = asyncio.create_task(ask(running, "wait"))
    answers = await asyncio.gather(*[ask(running, text=str(number)) for number in range(40)])
    assert [answer.json()["text"] for answer in answers] == [str(number) for number in range(40)]
    waiting.cancel()


async def test_long_bodies_and_answers(running: InProcess) -> None:
    data = os.urandom(3_000_000)
    answer = await running.http.post("/v1/models/backwards/infer", content=data)
    assert answer.content == data[::-1]


@pytest.mark.parametrize(
    ("do", "status", "slug"),
    [("refuse", 422, "refused-by-model"), ("fail", 500, "run-failed"), ("leave", 500, "run-failed")],
)
async def test_errors(running: InProcess, do: str, status: int, slug: str) -> None:
    answer = await ask(running, do, "of this text")
    assert (answer.status_code, answer.json()["type"]) == (status, f"/problems/{slug}")
    assert ("of this text" in answer.text) == (do == "refuse")


async def test_a_thread_goes_on_after_stop_iteration(running: InProcess) -> None:
    answers = [
        await running.http.post("/v1/models/backwards/infer", content=text) for text in (b"stop", b"go")
    ]
    assert [answer.status_code for answer in answers] == [500, 200]


async def test_a_body_of_another_shape(running: InProcess) -> None:
    answer = await running.http.post("/v1/models/asked/infer", json={"text": 3})
    assert (answer.status_code, answer.json()["type"]) == (422, "/problems/wrong-body")


async def test_the_log_has_the_traceback(running: InProcess, caplog: pytest.LogCaptureFixture) -> None:
    answer = await ask(running, "fail", "of this text")
    with_reference = [one for one in caplog.messages if answer.json()["reference"] in one]
    assert "ValueError: of this text" in with_reference[0]


async def test_prints_reach_the_log(running: InProcess, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    answer = await ask(running, "print", "printed\nby a handler")
    request_id = answer.headers["x-request-id"]
    await until(lambda: any("by a handler" in one for one in caplog.messages))
    for line in ("printed", "by a handler"):
        assert f"model asked: {request_id}: {line}" in caplog.messages


async def test_the_deadline_ends_a_call_that_runs(running: InProcess) -> None:
    answer = await ask(running, "wait", deadline_ms=50)
    assert (answer.status_code, answer.json()["type"]) == (504, "/problems/expired")
    assert (await ask(running)).status_code == 200


@pytest.mark.parametrize("query", ["deadline_ms=0", "deadline_ms=x", "priority=-1"])
async def test_options_that_are_none(running: InProcess, query: str) -> None:
    answer = await running.http.post(f"/v1/models/asked/infer?{query}", json={})
    assert (answer.status_code, answer.json()["type"]) == (400, "/problems/bad-parameter")


async def test_other_addresses(running: InProcess) -> None:
    assert (await running.http.post("/v1/models/none/infer", json={})).status_code == 404
    assert (await running.http.get("/v1/models/asked/infer")).status_code == 405
    answer = await running.http.post("/v1/models/asked/infer", json={}, headers={"idempotency-key": "a"})
    assert answer.json()["parameter"] == "Idempotency-Key"


async def test_readiness_and_a_hint_for_clients_of_v2(running: InProcess) -> None:
    ready = await running.http.get("/v2/models/asked/ready")
    assert (ready.status_code, ready.json()) == (200, {"name": "asked", "ready": True})
    refused = await running.http.post("/v2/models/asked/infer", json={})
    assert (refused.status_code, refused.json()["type"]) == (404, "/problems/unknown-model")
    assert refused.json()["detail"] == "'asked' is a pipeline: POST /v1/models/asked/infer"


@pytest.mark.parametrize(("word", "status"), [("refuse", 422), ("fail", 500), ("broken", 500)])
async def test_errors_with_long_texts_or_none(word: str, status: int) -> None:
    async with in_process(pipelines=[pipeline("Quotes")]) as running:
        for length in (200_000, 1_000_000):
            answer = await running.http.post(
                "/v1/models/quotes/infer", content=word + "x" * length, headers={"content-type": "text/plain"}
            )
            assert answer.status_code == status


async def test_a_description_that_is_too_long() -> None:
    async with in_process(pipelines=[pipeline("Strange")], ready=False) as running:
        strange = running.inference.pipelines["strange"]
        assert isinstance(strange, Pipeline)
        await until(lambda: strange.load_error)
        assert "Message too long" in str(strange.load_error)


async def test_a_call_that_cannot_be_sent(running: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(data: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("cobatch.server.pipelines.process.in_memory", fail)
    answer = await running.http.post("/v1/models/backwards/infer", content=b"x" * 100_000)
    assert (answer.status_code, answer.json()["type"]) == (500, "/problems/run-failed")
    answer = await running.http.post("/v1/models/backwards/infer", content=b"xy")
    assert answer.content == b"yx"


# Streams


async def words(running: InProcess, text: str) -> list[str]:
    answer = await running.http.post(
        "/v1/models/words/infer", content=text, headers={"content-type": "text/plain"}
    )
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/event-stream")
    return answer.text.split("\n\n")[:-1]


async def test_a_stream(running: InProcess) -> None:
    assert await words(running, "a b") == ["data: a", "data: b", "event: completed\ndata: {}"]


async def test_a_stream_longer_than_what_is_sent_ahead(running: InProcess) -> None:
    many = [str(number) for number in range(200)]
    assert (await words(running, " ".join(many)))[:-1] == [f"data: {one}" for one in many]


async def test_a_stream_that_fails(running: InProcess) -> None:
    *items, last = await words(running, "a fail b")
    assert items == ["data: a"]
    assert last.startswith('event: error\ndata: {"type":"/problems/run-failed"')


async def test_a_stream_that_fails_before_its_first_item(running: InProcess) -> None:
    answer = await running.http.post(
        "/v1/models/words/infer", content="fail", headers={"content-type": "text/plain"}
    )
    assert (answer.status_code, answer.json()["type"]) == (500, "/problems/run-failed")


async def test_a_generator_that_does_not_heed_its_cancellation() -> None:
    async with in_process(pipelines=[pipeline("Stubborn", concurrency=1)]) as running:
        answer = await running.http.post("/v1/models/stubborn/infer?deadline_ms=50", json=10**9)
        assert "/problems/expired" in answer.text.split("\n\n")[-2]
        answer = await running.http.post("/v1/models/stubborn/infer", json=1)
        assert answer.text == "data: 0\n\nevent: completed\ndata: {}\n\n"


# Processes that end


async def test_the_call_that_ends_its_process_is_at_fault(running: InProcess) -> None:
    first = (await ask(running)).json()["process"]
    answer = await ask(running, "abort")
    assert (answer.status_code, answer.json()["type"]) == (500, "/problems/run-failed")
    assert (await ask(running)).json()["process"] != first  # it waits for the next process


async def test_calls_beside_it_may_come_again(running: InProcess) -> None:
    beside = asyncio.create_task(ask(running, "wait"))
    await started(running)
    answers = [await ask(running, "exit"), await beside]
    assert {answer.json()["type"] for answer in answers} == {"/problems/engine-restarting"}
    assert {answer.headers["retry-after"] for answer in answers} == {"1"}
    assert (await ask(running)).status_code == 200


async def test_a_handler_that_holds_the_loop_is_ended() -> None:
    async with in_process(pipelines=[pipeline("Asked", execution_timeout_ms=50.0)]) as running:
        answer = await ask(running, "hold")
        assert (answer.status_code, answer.json()["type"]) == (504, "/problems/execution-timeout")
        assert (await ask(running)).status_code == 200


async def test_a_handler_that_only_waits_is_cancelled() -> None:
    async with in_process(pipelines=[pipeline("Asked", execution_timeout_ms=50.0)]) as running:
        process = (await ask(running)).json()["process"]
        assert (await ask(running, "wait")).json()["type"] == "/problems/execution-timeout"
        assert (await ask(running)).json()["process"] == process


async def test_a_call_that_had_not_begun_runs_in_the_next_process(running: InProcess) -> None:
    process = (await ask(running)).json()["process"]
    os.kill(process, signal.SIGSTOP)
    asked = asyncio.create_task(ask(running))
    await started(running)
    os.kill(process, signal.SIGKILL)
    assert (await asked).json()["process"] != process


def process_of(running: InProcess, name: str) -> PoolProcess:
    """Return the only process of a pipeline."""
    one = running.inference.pipelines[name]
    assert isinstance(one, Pipeline)
    (process,) = one._processes
    return process


async def test_a_process_that_is_killed_gets_no_more_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its call may end before it does."""
    os.mkfifo(tmp_path / "gate")
    async with in_process(pipelines=[pipeline("Gated")]) as running:
        process = process_of(running, "gated")
        monkeypatch.setattr(process._process, "abandon", lambda: None)
        seats = list(process.seats)
        asked = asyncio.create_task(
            running.http.post("/v1/models/gated/infer", content=os.fsencode(tmp_path / "gate"))
        )
        await until(lambda: seats[0].begun)
        process.give_up(seats[0], concurrent=False)
        await asyncio.to_thread((tmp_path / "gate").write_text, "passed")
        assert (await asked).text == "passed"
        assert process.seats == seats


async def test_a_call_beside_one_that_ran_too_long_is_not_at_fault(
    running: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = process_of(running, "asked")
    monkeypatch.setattr(process._process, "abandon", lambda: None)
    late, beside = [asyncio.create_task(ask(running, "wait")) for _ in range(2)]
    await until(lambda: sum(seat.begun for seat in process.seats) == 2)
    process.give_up(next(seat for seat in process.seats if seat.begun), concurrent=True)
    process.kill()  # as the timer does, before the call ends
    await until(lambda: not process._killers)
    process._process.kill()
    answer = await beside
    assert (answer.status_code, answer.json()["type"]) == (503, "/problems/engine-restarting")
    late.cancel()  # the batcher has not been told


async def test_a_process_that_is_described_again(running: InProcess) -> None:
    process = process_of(running, "asked")
    process._on_message(await process.described())
    process._on_message(NotLoaded("after all"))
    assert (await ask(running)).status_code == 200


@pytest.mark.parametrize("problem", ["none", "expired detail", "expired slug"])
async def test_a_problem_that_a_handler_has_changed(running: InProcess, problem: str) -> None:
    answer = await ask(running, "problem", problem)
    assert (answer.status_code, answer.json()["type"]) == (500, "/problems/run-failed")


async def test_a_process_that_ends_before_it_is_in_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    original = PoolProcess.described
    ended: list[PoolProcess] = []

    async def described(process: PoolProcess) -> Described:
        answer = await original(process)
        if not ended:
            ended.append(process)
            process.kill()
            await until(lambda: process.ended)
        return answer

    monkeypatch.setattr(PoolProcess, "described", described)
    async with in_process(pipelines=[pipeline("Asked")]) as running:
        assert (await ask(running)).status_code == 200


async def test_a_process_that_cannot_be_started_at_first(
    running: InProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = os.pidfd_open
    failures = [OSError(errno.ENOSYS, "Function not implemented")]

    def pidfd_open(pid: int) -> int:
        if failures:
            raise failures.pop()
        return original(pid)

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    assert (await ask(running, "abort")).status_code == 500
    assert (await ask(running)).status_code == 200
    assert (
        "cannot be started again: the model's process cannot be started: [Errno 38] Function" in caplog.text
    )


async def test_a_start_that_cannot_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def send(wire: Wire[Any, Any], message: object, descriptor: int = -1) -> None:
        started.append(1)
        raise OSError(errno.EMSGSIZE, "Message too long")

    monkeypatch.setattr(Wire, "send", send)
    async with in_process(pipelines=[pipeline("Asked", processes=2)], ready=False) as running:
        asked = running.inference.pipelines["asked"]
        assert isinstance(asked, Pipeline)
        await until(lambda: asked.load_error)
        assert str(asked.load_error) == "its process cannot be told what to load: [Errno 90] Message too long"
    assert started == [1]


class Delays:
    """The delays of starts, which pass when the test says so."""

    def __init__(self) -> None:
        self.begun: asyncio.Queue[float] = asyncio.Queue()
        self.passed = asyncio.Event()

    async def sleep(self, delay_s: float) -> None:
        self.begun.put_nowait(delay_s)
        await self.passed.wait()


@pytest.fixture
async def delays(monkeypatch: pytest.MonkeyPatch) -> Delays:
    delays = Delays()
    time = SimpleNamespace(**vars(asyncio) | {"sleep": delays.sleep})
    monkeypatch.setattr("cobatch.server.pipelines.pipeline.asyncio", time)
    return delays


async def test_a_process_that_is_killed_while_calls_run_and_wait(tmp_path: Path, delays: Delays) -> None:
    notes = tmp_path / "notes"
    async with in_process(pipelines=[pipeline("Asked", concurrency=16)]) as running:
        process = (await ask(running)).json()["process"]
        run = [asyncio.create_task(ask(running, "note", str(notes))) for _ in range(16)]
        await until(lambda: notes.exists() and notes.read_text() == "begun\n" * 16)
        wait = [asyncio.create_task(ask(running, text=str(number))) for number in range(4)]
        asked = running.inference.pipelines["asked"]
        assert isinstance(asked.batcher, Batcher)
        queue = asked.batcher.queue
        await until(lambda: queue.rows == 4)
        os.kill(process, signal.SIGKILL)
        for answer in await asyncio.gather(*run):
            assert (answer.status_code, answer.json()["type"]) == (503, "/problems/engine-restarting")
            assert answer.headers["retry-after"] == "1"
        answers = [answer.json() for answer in await asyncio.gather(*wait)]
        assert [answer["text"] for answer in answers] == ["0", "1", "2", "3"]
        assert {answer["process"] for answer in answers} == {process_of(running, "asked")._process.pid}
        assert asked.ready
        assert notes.read_text() == "begun\n" * 16  # none has run twice
        assert delays.begun.empty()  # the next process is started at once


async def test_after_two_ends_in_a_row_starts_wait(running: InProcess, delays: Delays) -> None:
    for _ in range(3):
        assert (await ask(running, "abort")).json()["type"] == "/problems/run-failed"
    assert await delays.begun.get() == 1.0
    refused = await ask(running)
    assert (refused.status_code, refused.json()["type"]) == (503, "/problems/engine-restarting")
    assert (refused.headers["retry-after"], refused.json()["retry_after_ms"]) == ("1", 1000)
    assert (await running.http.get("/v2/models/asked/ready")).status_code == 503
    assert (await running.http.get("/v2/health/live")).status_code == 200
    answer = await running.http.post("/v1/models/backwards/infer", content=b"ab")
    assert answer.content == b"ba"
    asked = running.inference.pipelines["asked"]
    delays.passed.set()
    await until(lambda: asked.ready)
    assert (await ask(running)).status_code == 200  # and ends the row
    assert (await ask(running, "abort")).status_code == 500
    assert (await ask(running)).status_code == 200
    assert delays.begun.empty()


async def test_a_full_queue() -> None:
    settings = pipeline("Asked", concurrency=1, max_queue=1)
    async with in_process(pipelines=[settings]) as running:
        waiting = [asyncio.create_task(ask(running, "wait")) for _ in range(2)]
        batcher = running.inference.pipelines["asked"].batcher
        assert batcher is not None
        await until(lambda: batcher.queue.rows)
        answer = await ask(running)
        assert (answer.status_code, answer.json()["type"]) == (429, "/problems/queue-full")
        assert "retry-after" in answer.headers
        for one in waiting:
            one.cancel()


async def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("class Broken:\n    def handle(self, one, two): ...\n")
    settings = PipelineSettings(python="broken.py:Broken", python_path=str(tmp_path), processes=1)
    async with in_process(pipelines=[settings], ready=False) as running:
        broken = running.inference.pipelines["Broken"]
        assert isinstance(broken, Pipeline)
        await until(lambda: broken.load_error)
        assert "takes the request alone" in str(broken.load_error)
        answer = await running.http.post("/v1/models/Broken/infer", json={})
        assert (answer.status_code, answer.json()["type"]) == (503, "/problems/load-failed")
