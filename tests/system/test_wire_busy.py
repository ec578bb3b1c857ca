"""Responses over the wire while the engine is busy, loading, failing or about to stop.

The engine is one that the test holds, so that "queued", "full" and "draining" are states and not luck.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from cobatch.engines.errors import EngineDeadError, EngineLoadError, EngineRunError
from cobatch.server.settings.schema import ModelSettings
from tests.support.fronts.linked import WAYS, way
from tests.support.http import serving
from tests.support.http.serving import GatedEngine, Served, data_of, gate, gated, get


@pytest.fixture(scope="module", params=WAYS)
def path(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def held_server(path: str) -> Iterator[tuple[Served, GatedEngine]]:
    with gated(**way(path), max_queue_rows=8) as pair:
        yield pair


@pytest.fixture
def held(held_server: tuple[Served, GatedEngine]) -> Iterator[tuple[Served, GatedEngine]]:
    """A model whose batches of at most 4 rows the test holds; the queue takes 8 rows."""
    served, engine = held_server
    yield served, engine
    engine.fails = lambda rows: None
    engine.release()


def test_clients_in_one_batch_get_their_own_rows(held: tuple[Served, GatedEngine]) -> None:
    served, engine = held
    engine.hold()
    with contextlib.ExitStack() as stack:
        first, *others = [stack.enter_context(served.connect()) for _ in range(5)]
        first.send(gate(1))
        assert engine.began.get(timeout=serving.DEADLINE_S) == [1]
        taken = served.batcher().counters.accepted
        for n, client in enumerate(others):
            client.send(gate(10 * n, id=str(n)))
        served.until(lambda: served.batcher().counters.accepted == taken + 4)
        engine.release()
        assert data_of(first.answer()) == [2]
        for n, client in enumerate(others):
            answer = client.answer()
            assert data_of(answer) == [20 * n]
            assert answer.json["id"] == str(n)
            assert "batch;desc=4" in answer.headers["server-timing"]


def test_others_in_a_failing_batch_are_answered(
    held: tuple[Served, GatedEngine], caplog: pytest.LogCaptureFixture
) -> None:
    served, engine = held
    engine.fails = lambda rows: EngineRunError("13 is unlucky") if 13 in rows else None
    engine.hold()
    with contextlib.ExitStack() as stack:
        first, *others = [stack.enter_context(served.connect()) for _ in range(5)]
        first.send(gate(1))
        assert engine.began.get(timeout=serving.DEADLINE_S) == [1]
        taken = served.batcher().counters.accepted
        for n, client in zip((11, 12, 13, 14), others, strict=True):
            client.send(gate(n))
        served.until(lambda: served.batcher().counters.accepted == taken + 4)
        engine.release()
        assert data_of(first.answer()) == [2]
        answers = [client.answer() for client in others]
    assert [answer.status for answer in answers] == [200, 200, 422, 200]
    assert answers[2].slug == "input-rejected"
    assert [data_of(answer) for answer in answers if answer.status == 200] == [[22], [24], [28]]
    assert answers[2].json["reference"] in caplog.text


def test_a_dead_engine(path: str, caplog: pytest.LogCaptureFixture) -> None:
    with gated(**way(path)) as (served, engine):
        engine.fails = lambda rows: EngineDeadError("the device fell off")
        answer = served.ask(gate(1))
        assert (answer.status, answer.slug) == (503, "engine-dead")
        assert answer.json["reference"] in caplog.text
        serving.opened_again(served)  # it is as dead as before
        again = served.ask(gate(2))
        assert again.slug == "engine-dead"
        assert again.json["reference"] in caplog.text
        assert served.ask(get("/v2/health/live")).status == 503


# Refused before the body is read


def fill(stack: contextlib.ExitStack, served: Served, engine: GatedEngine) -> list[serving.Client]:
    """Hold the engine and send requests until the queue is full."""
    engine.hold()
    batcher = served.batcher()
    clients: list[serving.Client] = []
    while batcher.queue.rows < batcher.admission.open_rows:
        client = stack.enter_context(served.connect())
        before = batcher.counters.accepted
        client.send(gate(*[len(clients)] * min(4, 8 - batcher.queue.rows)))
        served.until(lambda before=before: batcher.counters.accepted > before)  # type: ignore[misc]
        clients.append(client)
        if len(clients) == 1:
            engine.began.get(timeout=serving.DEADLINE_S)
    return clients


def test_a_full_queue_refuses_before_the_body(held: tuple[Served, GatedEngine]) -> None:
    served, engine = held
    with contextlib.ExitStack() as stack:
        waiting = fill(stack, served, engine)
        client = stack.enter_context(served.connect())
        request = gate(5)
        end = request.index(b"\r\n\r\n") + 4
        answer = client.ask(request[:end])
        assert (answer.status, answer.slug) == (429, "queue-full")
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json["retry_after_ms"] >= 1
        assert answer.json.items() >= {"queued_rows": 8, "limit": 8}.items()
        assert "connection" not in answer.headers
        engine.release()
        for n, other in enumerate(waiting):
            assert set(data_of(other.answer())) == {2 * n}
        # The body of the refused request is skipped, and the connection goes on.
        client.send(request[end:])
        assert data_of(client.ask(gate(6))) == [12]


def test_a_full_queue_and_a_known_header_block(held: tuple[Served, GatedEngine]) -> None:
    served, engine = held
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(served.connect())
        assert data_of(client.ask(gate(5))) == [10]
        waiting = fill(stack, served, engine)
        assert client.ask(gate(5)).slug == "queue-full"
        assert client.ask(gate(5)).slug == "queue-full"
        engine.release()
        for other in waiting:
            assert other.answer().status == 200
        assert data_of(client.ask(gate(6))) == [12]


def test_more_rows_than_there_is_room_for(held: tuple[Served, GatedEngine]) -> None:
    """The headers do not tell the number of rows, so this is refused after the body."""
    served, engine = held
    with contextlib.ExitStack() as stack:
        first, second = stack.enter_context(served.connect()), stack.enter_context(served.connect())
        engine.hold()
        first.send(gate(1))
        engine.began.get(timeout=serving.DEADLINE_S)
        taken = served.batcher().counters.accepted
        second.send(gate(2, 2))
        served.until(lambda: served.batcher().counters.accepted > taken)
        answer = served.ask(gate(*[3] * 8))
        assert answer.slug == "queue-full"
        assert "retry-after" in answer.headers
        engine.release()
        assert first.answer().status == second.answer().status == 200
        assert served.batcher().counters.refused >= 1


def test_while_the_model_is_being_loaded(path: str) -> None:
    engine = GatedEngine()
    engine.may_open.clear()
    model = ModelSettings(path="gate", max_batch_size=4)
    with (
        serving.serve(**way(path), models=(model,), engines={"gate": engine}, ready=False) as served,
        served.connect() as client,
    ):
        request = gate(1)
        answer = client.ask(request[: request.index(b"\r\n\r\n") + 4])
        assert (answer.status, answer.slug) == (503, "starting")
        assert answer.headers["retry-after"] == "1"
        assert "connection" not in answer.headers
        client.send(request[request.index(b"\r\n\r\n") + 4 :])
        assert client.ask(get("/v2/health/live")).status == 200
        assert client.ask(get("/v2/health/ready")).status == 503
        assert client.ask(get("/v2/models/gate")).slug == "starting"
        engine.may_open.set()
        assert served.server.ready.wait(serving.DEADLINE_S)
        assert client.ask(get("/v2/health/ready")).status == 200
        assert data_of(client.ask(request)) == [2]


def test_a_model_that_cannot_be_loaded(path: str) -> None:
    engine = GatedEngine()
    model = ModelSettings(path="gate", max_batch_size=4)
    failed = EngineLoadError("the file is a poem")

    def fail() -> None:
        raise failed

    engine.open = fail  # type: ignore[method-assign]
    with serving.serve(**way(path), models=(model,), engines={"gate": engine}, ready=False) as served:
        served.join()
        assert served.server.status == 1


def test_draining(path: str) -> None:
    with gated(**way(path)) as (served, engine):
        engine.hold()
        with (
            served.connect() as running, served.connect() as idle, served.connect() as late,
            served.connect() as checking,
        ):  # fmt: skip
            assert idle.ask(get("/v2/health/ready")).status == 200
            running.send(gate(1))
            engine.began.get(timeout=serving.DEADLINE_S)
            served.stop()
            answer = checking.ask(get("/v2/health/ready"))
            assert (answer.status, answer.headers["connection"]) == (503, "close")
            assert checking.closed()
            request = gate(2)
            for client in (late, idle):
                answer = client.ask(request[: request.index(b"\r\n\r\n") + 4])
                assert (answer.status, answer.slug) == (503, "draining")
                assert answer.headers["retry-after"] == "1"
                assert answer.headers["connection"] == "close"
                assert client.closed()
            engine.release()
            assert data_of(running.answer()) == [2]
            assert running.closed()
        served.join()
        assert served.server.status == 0
