"""Requests through fronts and home."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cobatch.server.settings.schema import ModelSettings
from tests.support.fronts.linked import linked
from tests.support.http.serving import GatedEngine, Served, data_of, gate

MODEL = ModelSettings(path="gate", max_batch_size=4, max_queue_rows=1000)


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "asgi"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    with linked(request.param, (MODEL,), engines={"gate": GatedEngine()}) as running:
        yield running


def test_each_answer_has_its_own_rows(served: Served) -> None:
    with served.connect() as one, served.connect() as other:
        for row in range(20):
            one.send(gate(row))
            other.send(gate(row + 100))
            assert data_of(one.answer()) == [2 * row]
            assert data_of(other.answer()) == [2 * row + 200]


def test_a_request_larger_than_a_batch_is_joined(served: Served) -> None:
    assert data_of(served.ask(gate(*range(20)))) == [2 * row for row in range(20)]
