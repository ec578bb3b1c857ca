"""Requests of benchmarks at given times, sent by the generator of `cobatch bench`."""

from __future__ import annotations

import numpy as np

from benchmarks.common.open_loop import Load, constant, drive
from cobatch.server.loadtest.codec import encode, request_bytes
from cobatch.server.loadtest.messages import Address
from tests.support.http.serving import gated


def test_concurrent_loads_are_counted_separately() -> None:
    with gated(fast=True) as (served, engine):
        address = Address("127.0.0.1", served.server.port)
        body, headers = encode({"x": np.array([[1]])}, {"x": "INT64"}, False, {})
        good = request_bytes(address, "/v2/models/gate/infer", headers, body)
        bad = request_bytes(address, "/v2/models/none/infer", headers, body)
        before = sum(map(len, engine.ran))
        right, wrong = drive(
            address.authority, Load([good], [0.0, 0.01, 0.02]), Load([bad], constant(100.0, 0.05))
        )
        assert sum(map(len, engine.ran)) == before + 3
    assert (right.due, right.latency.count, right.good, dict(right.errors)) == (3, 3, 3, {})
    assert (wrong.due, wrong.latency.count) == (5, 0)
    assert sum(wrong.errors.values()) == 5
    assert all(kind.startswith("404") for kind in wrong.errors)
