"""Random and damaged JSON messages against Python's parser, with pieces of a few bytes.

Valid messages are decoded to the same values; of damaged ones none is accepted that is not JSON, or that
means something else. `FUZZ_EXAMPLES=80000` took a minute.
"""

from __future__ import annotations

import json
import math
import os
import random
from typing import Any

import numpy as np
import pytest

from cobatch.engines.base import Signature, TensorSpec
from cobatch.server.http.problem import Problem
from cobatch.server.v2 import decode, json_data, long_json
from cobatch.server.v2.decode import Decoded, Decoder

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "600"))
VALUES: dict[str, list[Any]] = {
    "FP32": [0.5, -1.25, 3, 1e3, -7e-2],
    "INT64": [0, -5, 123_456_789_012, 7],
    "BOOL": [True, False],
    "BYTES": ["", "a", '"', "\\", "é€😀", ",", "]", "[", "x" * 50, "\n", "[1,2]", '{"data":[1]}'],
}
DAMAGE = b'[]{},:"\\ 01e-.t'


def nested(flat: list[Any], shape: list[int]) -> list[Any]:
    if len(shape) == 1:
        return flat
    width = len(flat) // shape[0]
    return [nested(flat[n * width : (n + 1) * width], shape[1:]) for n in range(shape[0])]


def flattened(data: Any) -> list[Any]:
    return [one for row in data for one in flattened(row)] if isinstance(data, list) else [data]


def message(rng: random.Random) -> tuple[str, bytes]:
    """Return a valid message and the datatype of its tensor."""
    datatype = rng.choice(list(VALUES))
    shape = [rng.randint(1, 3), rng.randint(1, 6), rng.randint(1, 8)][: rng.randint(2, 3)]
    flat = [rng.choice(VALUES[datatype]) for _ in range(math.prod(shape))]
    data = nested(flat, shape) if rng.random() < 0.6 else flat
    made: dict[str, Any] = {"inputs": [{"name": "x", "shape": shape, "datatype": datatype, "data": data}]}
    if rng.random() < 0.3:
        made["id"] = rng.choice(["a", '"data":[1,2,3]', "[", "\\", ""])
    if rng.random() < 0.3:
        made["parameters"] = {"p": rng.choice(["x", '","', 1, "[1,2"])}
    if rng.random() < 0.3:
        made["outputs"] = [{"name": "y"}]
    fields = list(made.items())
    rng.shuffle(fields)
    separators = rng.choice([(",", ":"), (", ", ": "), (" ,", " :")])
    ascii_only = rng.random() < 0.5
    return datatype, json.dumps(dict(fields), ensure_ascii=ascii_only, separators=separators).encode()


def damaged(rng: random.Random, text: bytes) -> bytes:
    changed = bytearray(text)
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(changed))
        match rng.choice(["delete", "insert", "replace"]):
            case "delete":
                del changed[at]
            case "insert":
                changed.insert(at, rng.choice(DAMAGE))
            case _:
                changed[at] = rng.choice(DAMAGE)
    return bytes(changed)


def test_what_is_accepted_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_json, "LONG_BYTES", 20)
    monkeypatch.setattr(long_json, "PIECE_BYTES", 40)
    monkeypatch.setattr(long_json, "STRINGS_BYTES", 40)
    monkeypatch.setattr(json_data, "STRINGS_BYTES", 40)
    monkeypatch.setattr(decode, "LARGE_BYTES", 16)
    rng = random.Random(16)
    accepted = 0
    for _ in range(EXAMPLES):
        datatype, text = message(rng)
        valid = rng.random() < 0.4
        if not valid:
            text = damaged(rng, text)
        axes = 1 + len(json.loads(text)["inputs"][0]["shape"]) if valid else rng.randint(2, 3)
        spec = TensorSpec("x", datatype, (-1,) * (axes - 2 if valid else axes - 1))
        decoder = Decoder(Signature((spec,), (TensorSpec("y", "FP32", (1,)),)), 1000)
        try:
            decoded = decoder.decode(text, None)
        except Problem:
            if valid:
                raise
            continue
        check(decoded, spec, json.loads(text))
        accepted += 1
    assert accepted > EXAMPLES // 4


def check(decoded: Decoded, spec: TensorSpec, expected: Any) -> None:
    """Check the decoded tensor and id against what Python's parser reads."""
    (tensor,) = expected["inputs"]
    flat = flattened(tensor["data"])
    assert len(flat) == math.prod(tensor["shape"])
    assert decoded.id == expected.get("id")
    (payload,) = decoded.payloads
    if isinstance(payload, list):
        assert payload == [value.encode() for value in flat]
    else:
        assert np.array_equal(np.frombuffer(payload, spec.dtype), np.array(flat).astype(spec.dtype))
        np.array(tensor["data"])  # raises if it is ragged
