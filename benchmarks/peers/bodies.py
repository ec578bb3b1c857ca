"""One row encoded as each body, and decoded from each answer, without the code of any server."""

from __future__ import annotations

import json

import numpy as np
import orjson

from benchmarks.common import wire
from benchmarks.peers.catalogue import Body

_JSON = {"Content-Type": "application/json"}
_RAW = {"Content-Type": "application/octet-stream"}


def encode(body: Body, model: str, row: wire.Array) -> wire.Message:
    """Return a request with one row."""
    if body in {Body.V2_JSON, Body.V2_BINARY}:
        return wire.encode(model, row.reshape(1, -1), body is Body.V2_BINARY)
    if body is Body.RAW:
        return wire.Message(row.tobytes(), _RAW)
    value = row.reshape(1, -1) if body is Body.BATCHED else row.reshape(-1)
    return wire.Message(orjson.dumps({"x": value}, option=orjson.OPT_SERIALIZE_NUMPY), _JSON)


def decode(body: Body, answer: wire.Message) -> wire.Array:
    """Return the output of the row, flat; all models here answer FP32."""
    if body in {Body.V2_JSON, Body.V2_BINARY}:
        return wire.decode(answer).reshape(-1)
    if body is Body.RAW:
        return np.frombuffer(answer.body, np.dtype("<f4"))
    document = json.loads(answer.body)
    return np.array(document if body is Body.BATCHED else document["y"], np.float32).reshape(-1)
