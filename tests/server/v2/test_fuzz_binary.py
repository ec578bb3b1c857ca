"""Structured fuzzing of the binary tensor extension: valid messages, then damaged in their parts.

The decoder always answers with rows that fit their shapes or with a 4xx Problem, in memory bounded by the
body; through a server a damaged message is never answered with 5xx, and a valid request beside it gets its
own answer.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from math import prod

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cobatch.engines.base import RowShapes, Signature
from cobatch.server.http.problem import Problem
from cobatch.server.settings.schema import ModelSettings
from cobatch.server.v2.decode import Decoder
from tests.support.examples import examples
from tests.support.fronts.linked import WAYS, way
from tests.support.http import serving
from tests.support.http.damage import LIMITED, SIGNATURES, SPECS, Message, hostile, whole
from tests.support.http.serving import Client, Served, data_of, post
from tests.support.virtual.loop import Array, FakeEngine

fuzz = settings(examples(150), suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def check(signature: Signature, decoder: Decoder, body: bytes, length: int | None) -> bool:
    """Return whether a body was decoded; check that its payloads fit their shapes and can be packed."""
    problem = None
    try:
        decoded = decoder.decode(body, length)
    except Problem as refusal:
        problem = refusal
    if problem is not None:
        assert 400 <= problem.kind.status < 500
        assert problem.reply().length < 10_000
        return False
    assert decoded.rows >= 1
    for spec, shape, payload in zip(signature.inputs, decoded.row_shapes, decoded.payloads, strict=True):
        assert len(shape) == len(spec.shape)
        assert all(want in (-1, size) and size >= 0 for want, size in zip(spec.shape, shape, strict=True))
        elements = decoded.rows * prod(shape)
        size = len(payload) if isinstance(payload, list) else memoryview(payload).nbytes
        np.empty((64, *shape), np.bool_)  # an engine can allocate it
        assert size == elements * (1 if isinstance(payload, list) else spec.dtype.itemsize)
    return True


@fuzz
@given(st.data(), st.sampled_from(SIGNATURES))
def test_a_valid_message_is_decoded(data: st.DataObject, signature: Signature) -> None:
    body, header = data.draw(whole(signature)).build()
    assert check(signature, Decoder(signature, 1 << 40), body, int(header))


def bounded(signature: Signature, body: bytes, length: int | None) -> None:
    """Check a body within memory that its size bounds."""
    decoder = Decoder(signature, 1 << 40)
    tracemalloc.start()
    try:
        check(signature, decoder, body, length)
        assert tracemalloc.get_traced_memory()[1] < 100_000 + 100 * len(body)
    finally:
        tracemalloc.stop()


@fuzz
@given(st.data(), st.sampled_from(SIGNATURES))
def test_a_damaged_message_is_decoded_or_refused(data: st.DataObject, signature: Signature) -> None:
    body, header = data.draw(hostile(signature)).build()
    bounded(signature, body, int(header) if header.isdigit() else None)


@fuzz
@given(st.binary(max_size=200), st.none() | st.integers(0, 250), st.sampled_from(SIGNATURES))
def test_noise_is_refused(body: bytes, length: int | None, signature: Signature) -> None:
    bounded(signature, body, length)


@fuzz
@given(
    st.integers(1, 3), st.lists(st.tuples(st.sampled_from([0, 1, 2, 9, 2**32 - 1]), st.binary(max_size=9)))
)
def test_damaged_strings_are_decoded_or_refused(rows: int, elements: list[tuple[int, bytes]]) -> None:
    """The limit of an engine is checked with lengths that do not fit the data."""
    data = b"".join(length.to_bytes(4, "little") + text for length, text in elements)
    parameters = {"binary_data_size": len(data)}
    tensor = {"name": "s", "datatype": "BYTES", "shape": [rows, 1, 1], "parameters": parameters}
    body, header = Message({"inputs": [tensor]}, [(tensor, data)]).build()
    bounded(LIMITED, body, int(header))


# Through a server


class EchoEngine(FakeEngine):
    """Returns its five inputs of five datatypes unchanged."""

    def __init__(self) -> None:
        super().__init__(max_batch_size=8)
        self.signature = SIGNATURES[0]
        self._slots: dict[int, tuple[Array, ...]] = {}
        self._rows: dict[int, int] = {}

    def inputs(self, slot: int, rows: int, row_shapes: RowShapes) -> tuple[Array, ...]:
        made = [
            np.zeros((self.max_batch_size, *shape), spec.dtype)
            for spec, shape in zip(SPECS, row_shapes, strict=True)
        ]
        self._slots[slot] = tuple(made)
        return self._slots[slot]

    def enqueue(self, slot: int, rows: int, row_shapes: RowShapes) -> None:
        self._rows[slot] = rows

    def wait(self, slot: int) -> tuple[Array, ...]:
        return tuple([array[: self._rows[slot]] for array in self._slots[slot]])


GOOD = {
    "inputs": [
        {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1.5, -2]},
        {"name": "k", "datatype": "INT64", "shape": [1, 2], "data": [3, 4]},
        {"name": "b", "datatype": "BOOL", "shape": [1, 1, 1], "data": [True]},
        {"name": "s", "datatype": "BYTES", "shape": [1, 1, 1], "data": ["ü"]},
        {"name": "h", "datatype": "BF16", "shape": [1, 1], "parameters": {"binary_data_size": 2}},
    ],
    # Without "h", which would make the answer binary.
    "outputs": [{"name": name} for name in "xkbs"],
}
GOOD_TEXT = json.dumps(GOOD).encode()
TARGET = "/v2/models/echo/infer"
GOOD_REQUEST = post(TARGET, GOOD_TEXT + b"\x80\x3f", {"Inference-Header-Content-Length": str(len(GOOD_TEXT))})


@pytest.fixture(scope="module", params=WAYS)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    engines = {"echo": EchoEngine()}
    model = ModelSettings(path="echo", max_batch_size=8)
    with serving.serve(**way(request.param), models=(model,), engines=engines) as server:
        yield server


@pytest.fixture(scope="module")
def beside(served: Served) -> Iterator[Client]:
    with served.connect() as client:
        yield client


@settings(fuzz, max_examples=fuzz.max_examples // 2)
@given(message=hostile(SIGNATURES[0]) | whole(SIGNATURES[0]))
def test_a_damaged_message_does_not_affect_another_request(
    served: Served, beside: Client, message: Message
) -> None:
    body, header = message.build()
    with served.connect() as client:
        client.send(post(TARGET, body, {"Inference-Header-Content-Length": header}))
        assert data_of(beside.ask(GOOD_REQUEST)) == [1.5, -2]
        answer = client.answer()
        assert answer.status == 200 or answer.slug, answer
        assert answer.status < 500, answer
