"""An engine that dies, over the wire: 503 with its own type, and one attempt to open another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest

import cobatch.server.inference.model
from cobatch.engines.errors import EngineDeadError
from cobatch.server.settings.schema import ModelSettings
from tests.support.fronts.linked import WAYS, way
from tests.support.http.serving import (
    DEADLINE_S,
    Answer,
    GatedEngine,
    Served,
    data_of,
    gate,
    get,
    opened_again,
    serve,
)

DEADLY = 13


def mortal() -> GatedEngine:
    """Dies on a row with DEADLY in it, and on any row after that."""
    engine = GatedEngine()
    dead = False

    def fails(rows: object) -> EngineDeadError | None:
        nonlocal dead
        dead = dead or bool((rows == DEADLY).any())  # type: ignore[attr-defined]
        return EngineDeadError("the device fell off") if dead else None

    engine.fails = fails
    return engine


@contextlib.contextmanager
def served_by(path: str, *engines: GatedEngine) -> Iterator[Served]:
    """Load the first engine, then the next ones each time that an engine is opened again."""
    models = (ModelSettings(path="gate", max_batch_size=4),)
    with (
        serve(**way(path), models=models, engines={"gate": engines[0]}) as served,
        mock.patch.object(cobatch.server.inference.model, "load_engine", side_effect=engines[1:]),
    ):
        yield served


@pytest.mark.parametrize("path", WAYS)
def test_it_is_opened_again_once(path: str, caplog: pytest.LogCaptureFixture) -> None:
    second = mortal()
    second.may_open.clear()
    with served_by(path, mortal(), second) as served:
        gone = served.ask(gate(DEADLY))
        assert (gone.status, gone.slug) == (503, "engine-dead")
        # No request is accepted while it is being opened, and liveness stays.
        assert served.ask(gate(1)).slug == "engine-dead"
        assert served.ask(get("/v2/models/gate/ready")).status == 503
        assert served.ask(get("/v2/health/live")).status == 200
        second.may_open.set()
        opened_again(served)
        assert data_of(served.ask(gate(2))) == [4]
        assert served.ask(get("/v2/models/gate/ready")).status == 200
        assert "opened again after its engine died" in caplog.text
        # The second death is final.
        last = served.ask(gate(DEADLY))
        assert last.slug == "engine-dead"
        assert live(served).status == 503
        assert served.ask(gate(3)).json["reference"] == last.json["reference"]


def test_an_engine_that_ends_its_thread_is_opened_again() -> None:
    """Else its requests, and all later ones, would wait for ever, with health good."""
    first = mortal()
    first.fails = exits
    with served_by("fast", first, mortal()) as served:
        assert served.ask(gate(DEADLY)).slug == "engine-dead"
        opened_again(served)
        assert data_of(served.ask(gate(2))) == [4]


def exits(rows: object) -> None:
    """End the thread on a row with DEADLY in it."""
    if (rows == DEADLY).any():  # type: ignore[attr-defined]
        raise SystemExit(1)


def test_an_attempt_that_fails_is_the_last(caplog: pytest.LogCaptureFixture) -> None:
    second = mortal()
    second.fails = lambda rows: EngineDeadError("still dead")
    with served_by("fast", mortal(), second) as served:
        assert served.ask(gate(DEADLY)).slug == "engine-dead"
        opened_again(served)
        assert live(served).status == 503
        assert served.ask(gate(1)).slug == "engine-dead"
        assert "still dead" in caplog.text


def test_queued_requests_are_answered_before_the_next_engine_serves() -> None:
    second = mortal()
    second.may_open.clear()
    first = mortal()
    with served_by("fast", first, second) as served, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(served.connect()) for _ in range(8)]
        first.hold()
        clients[0].send(gate(DEADLY))
        first.began.get(timeout=DEADLINE_S)
        for number, client in enumerate(clients[1:], 1):
            before = served.batcher().counters.accepted
            client.send(gate(number))
            served.until(lambda before=before: served.batcher().counters.accepted > before)  # type: ignore[misc]
        first.release()
        assert {client.answer().slug for client in clients} == {"engine-dead"}
        second.may_open.set()
        opened_again(served)
        assert [data_of(client.ask(gate(number))) for number, client in enumerate(clients)] == [
            [2 * number] for number in range(8)
        ]


def live(served: Served) -> Answer:
    return served.ask(get("/v2/health/live"))
