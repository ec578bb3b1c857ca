"""One row as each body has it, and the row that an answer holds: written apart from any server's own code."""

from __future__ import annotations

import json

import numpy as np
import orjson

from benchmarks.common import wire
from benchmarks.peers.catalogue import Body

_JSON = {"Content-Type": "application/json"}
_RAW = {"Content-Type": "application/octet-stream"}


def encode(body: Body, model: str, row: wire.Array) -> wire.Message:
    """A request for one row of the model's input."""
    if body in {Body.V2_JSON, Body.V2_BINARY}:
        return wire.encode(model, row.reshape(1, -1), body is Body.V2_BINARY)
    if body is Body.RAW:
        return wire.Message(row.tobytes(), _RAW)
    value = row.reshape(1, -1) if body is Body.BATCHED else row.reshape(-1)
    return wire.Message(orjson.dumps({"x": value}, option=orjson.OPT_SERIALIZE_NUMPY), _JSON)


def decode(body: Body, answer: wire.Message) -> wire.Array:
    """The output of that row, flat; all models here answer FP32."""
    if body in {Body.V2_JSON, Body.V2_BINARY}:
        return wire.decode(answer).reshape(-1)
    if body is Body.RAW:
        return np.frombuffer(answer.body, np.dtype("<f4"))
    said = json.loads(answer.body)
    return np.array(said if body is Body.BATCHED else said["y"], np.float32).reshape(-1)


def with_deadline(message: wire.Message, deadline_ms: int) -> wire.Message:
    """A V2 request with the protocol's `timeout` among its parameters."""
    length = message.headers.get(wire.JSON_LENGTH)
    text, tail = (message.body, b"") if length is None else _split(message.body, int(length))
    described = json.loads(text)
    described["parameters"] = {**described.get("parameters", {}), "timeout": deadline_ms * 1000}
    head = orjson.dumps(described)
    headers = dict(message.headers)
    if length is not None:
        headers[wire.JSON_LENGTH] = str(len(head))
    return wire.Message(head + tail, headers)


def on_the_wire(message: wire.Message, address: str, path: str) -> bytes:
    """The whole POST, for a generator that sends bytes."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {address}", f"Content-Length: {len(message.body)}"]
    lines += [f"{name}: {value}" for name, value in message.headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + message.body


def _split(body: bytes, at: int) -> tuple[bytes, bytes]:
    return body[:at], body[at:]
