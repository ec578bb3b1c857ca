"""Large JSON goes through simdjson: on which conditions, ragged data, and its own limits."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest

from cobatch.engines.base import Signature, TensorSpec
from cobatch.server.http.problem import Problem
from cobatch.server.v2.decode import LARGE_BYTES, LARGE_LIMIT_BYTES, Decoder, parse, parse_large
from cobatch.server.v2.messages import InferMessage, Parsed

WIDTH = 2000
DECODER = Decoder(Signature((TensorSpec("x", "FP32", (WIDTH,)),), (TensorSpec("y", "FP32", (1,)),)), 1000)


def message(data: list[object], **more: object) -> bytes:
    tensor = {"name": "x", "shape": [1, WIDTH], "datatype": "FP32", "data": data}
    return json.dumps({"inputs": [tensor], **more}).encode()


def test_a_flat_message_goes_through_simdjson_and_keeps_its_values() -> None:
    values: list[object] = [n / 8 for n in range(WIDTH)]
    body = message(values, id="a", outputs=[{"name": "y"}])
    assert len(body) >= LARGE_BYTES
    assert parse_large(body) is not None
    decoded = DECODER.decode(body, None)
    assert np.frombuffer(decoded.payloads[0], "<f4").tolist() == values  # type: ignore[arg-type]
    assert decoded.id == "a"


@pytest.mark.parametrize(
    "inner", [[[7.25] * 900], [[]], [[1.0, 2.0], []], [[[1.0]]]], ids=["longer", "empty", "even", "deep"]
)
def test_rows_hidden_within_a_row_are_refused(inner: list[object]) -> None:
    """Flattened by simdjson they would be more or fewer numbers than their place in the batch takes."""
    data = [0.5, *inner, *[0.5] * (WIDTH - 1 - len(inner))]
    with pytest.raises(Problem) as refused:
        DECODER.decode(message(data), None)
    assert refused.value.kind.slug == "wrong-data"


def test_arrays_are_shorter_than_simdjson_can_count() -> None:
    """Beyond 2**24 - 1 elements pysimdjson 7.0.2 writes past its memory; each takes two bytes at least."""
    assert LARGE_LIMIT_BYTES < 2 * 2**24


ODD: list[object] = [1.5, "text", True, None, {}, 300, -1, 2**63, 2**64, 1e39, 1e400]


@pytest.mark.parametrize("odd", ODD, ids=repr)
@pytest.mark.parametrize("datatype", ["FP32", "FP64", "INT8", "UINT64", "BOOL", "BYTES", "BF16"])
def test_the_same_values_and_refusals_as_through_msgspec(datatype: str, odd: object) -> None:
    plain = {"BOOL": True, "BYTES": "grüße"}.get(datatype, 7)
    decoder = Decoder(Signature((TensorSpec("x", datatype, (WIDTH,)),), (TensorSpec("y", "FP32", (1,)),)), 10)
    for data in ([plain] * WIDTH, [plain] * (WIDTH - 1), [*[plain] * (WIDTH - 1), odd]):
        tensor = {"name": "x", "shape": [1, WIDTH], "datatype": datatype, "data": data}
        body = json.dumps({"inputs": [tensor]}, ensure_ascii=False).replace("Infinity", "1e400").encode()
        assert len(body) >= LARGE_BYTES
        through_msgspec = msgspec.json.decode(body, type=InferMessage)
        assert outcome(decoder, parse(body, None)) == outcome(decoder, (through_msgspec, None, None))


def outcome(decoder: Decoder, parsed: Parsed) -> object:
    """Return the payload as a list or bytes, or the problem's detail."""
    try:
        (payload,) = decoder.read(parsed).payloads
    except Problem as problem:
        return problem.detail
    return payload if isinstance(payload, list) else bytes(payload)
