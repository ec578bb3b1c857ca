"""A run that does not end, over the wire: 504, not ready, and another engine takes its place."""

from __future__ import annotations

import contextlib
from unittest import mock

import pytest

import cobatch.server.inference.model
from cobatch.server.settings.schema import ModelSettings
from tests.support.fronts.linked import WAYS, way
from tests.support.http.serving import DEADLINE_S, GatedEngine, data_of, gate, get, serve


@pytest.mark.parametrize("how", WAYS)
def test_a_run_that_does_not_end(how: str) -> None:
    engine = GatedEngine()
    model = ModelSettings(path="gate", max_batch_size=4, execution_timeout_ms=50.0)
    with (
        serve(models=(model,), engines={"gate": engine}, **way(how)) as served,
        contextlib.ExitStack() as stack,
    ):
        stack.enter_context(
            mock.patch.object(cobatch.server.inference.model, "load_engine", return_value=engine)
        )
        client = stack.enter_context(served.connect())
        engine.hold()
        engine.may_open.clear()  # the next engine is not there at once
        client.send(gate(1))
        engine.began.get(timeout=DEADLINE_S)
        answer = client.answer()
        assert (answer.status, answer.slug) == (504, "execution-timeout")
        assert answer.json["limit_ms"] == 50
        told = served.ask(get(f"/v1/requests/{answer.headers['x-request-id']}")).json
        (batch,) = told["batches"]
        assert (batch["failed"], batch["rows"], batch["requests"]) == (True, 1, 1)
        assert told["times_us"]["compute"] >= 49_000
        assert "That batch failed, or did not end in time." in told["in_words"]
        assert served.ask(get("/v2/models/gate/ready")).status == 503
        assert served.ask(get("/v2/health/live")).status == 200
        waiting = stack.enter_context(served.connect())
        taken = served.batcher().counters.accepted
        waiting.send(gate(2))
        served.until(lambda: served.batcher().counters.accepted > taken)
        # The hung run ends after all and answers no request; the new engine serves the queue.
        engine.release()
        engine.may_open.set()
        assert data_of(waiting.answer()) == [4]
        assert served.ask(get("/v2/models/gate/ready")).status == 200
        assert served.batcher().counters.hung == 1
