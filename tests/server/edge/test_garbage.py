"""Requests leave nothing to the garbage collector: no object of theirs is in a reference cycle.

With cycles, memory would grow by whole bodies until a collection, and the collector would have to run
often; `server.serve` makes it run seldom.
"""

from __future__ import annotations

import gc

import pytest

from tests.support.fronts.linked import WAYS, way
from tests.support.http.serving import GATE, Served, gate, gated, get, post, rows_of

REQUESTS = 40


def collected(served: Served, request: bytes, status: int) -> int:
    """Return how many objects only the collector can free after many such requests."""
    with served.connect() as client:
        for _ in range(3):
            client.ask(request)  # objects that are made once and kept
        gc.collect()
        gc.disable()
        try:
            for _ in range(REQUESTS):
                assert client.ask(request).status == status
            return served.call(gc.collect)
        finally:
            gc.enable()


@pytest.mark.parametrize("path", WAYS)
@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (gate(7), 200),
        (gate(*range(11)), 200),
        (post(GATE, b"{"), 400),
        (post(GATE, rows_of(7, inputs=[])), 400),
        (post(GATE, b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1,1],"data":[1]}]}'), 422),
        (post("/v2/models/none/infer", b"{}"), 404),
    ],
    ids=["one row", "split", "not JSON", "no input", "wrong datatype", "no model"],
)
def test_requests_leave_no_garbage(path: str, request_: bytes, status: int) -> None:
    with gated(**way(path)) as (served, _):
        assert served.ask(get("/v2/health/ready")).status == 200
        left = collected(served, request_, status)
    # A reference cycle per request would be several objects each.
    assert left < REQUESTS
