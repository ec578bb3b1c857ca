"""Callers without credentials are told apart by their connection, on each way to the batcher."""

from __future__ import annotations

import pytest

from cobatch.batcher.scheduling import policy
from cobatch.engines.errors import EngineRunError
from tests.support.fronts.linked import WAYS, way
from tests.support.http.batching import infer
from tests.support.http.serving import Client, Served, gate, gated, post

JSON = {"Content-Type": "application/json"}
PREDICTIONS = "/v1/models/gate/predictions"
BAD = 13


def of_one_item(row: int) -> bytes:
    return post("/batch", {"requests": [infer(row)]})


def of_two_items(row: int) -> bytes:
    return post("/batch", {"requests": [infer(row), infer(row + 100)]})


def prediction(row: int) -> bytes:
    return post(PREDICTIONS, {"inputs": {"x": [[row]]}}, JSON)


def reasons_after(served: Served, client: Client, request: bytes) -> set[str]:
    """Return the reasons of the batches that a request causes, which are counted after its answer."""
    before = served.call(lambda: served.batcher().counters.reasons)
    assert client.ask(request).status == 200
    return set(served.call(lambda: served.batcher().counters.reasons) - before)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("make", [gate, of_one_item, of_two_items, prediction])
def test_a_connection_whose_rows_failed_rides_apart(how: str, make: object) -> None:
    assert callable(make)
    with gated(**way(how)) as (served, engine), served.connect() as bad, served.connect() as good:
        engine.fails = lambda rows: EngineRunError("no") if BAD in rows else None
        bad.ask(make(BAD))
        assert reasons_after(served, good, gate(1)) == {policy.IDLE}
        assert reasons_after(served, bad, make(1)) == {policy.SUSPECT}
