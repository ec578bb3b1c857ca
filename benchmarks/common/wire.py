"""V2 infer requests and responses, encoded and decoded without the server's own codec.

Answers are compared with a direct run, so they must not pass the code that is measured.
"""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

JSON_LENGTH = "Inference-Header-Content-Length"
Array = np.ndarray[Any, Any]


class RefusedError(Exception):
    """A server answered with another status than 200."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """The input of a model: name, V2 datatype and elements per row."""

    name: str
    datatype: str
    elements: int


INPUTS = {
    "tiny": Tensor("x", "FP32", 16),
    "wide": Tensor("x", "FP32", 512),
    "deep": Tensor("x", "FP32", 512),
    "magika": Tensor("bytes", "INT32", 2048),
}
_DTYPES = {"FP32": np.dtype("<f4"), "INT32": np.dtype("<i4")}


@dataclass(frozen=True, slots=True)
class Message:
    """A body and its headers."""

    body: bytes
    headers: dict[str, str]


def rows_of(model: str, rows: int, seed: int) -> Array:
    """Return random input [rows, elements] for a model: normal floats, or bytes as integers."""
    rng = np.random.default_rng(seed)
    tensor = INPUTS[model]
    if tensor.datatype == "INT32":
        return rng.integers(0, 256, (rows, tensor.elements), dtype=np.int32)
    return rng.standard_normal((rows, tensor.elements), dtype=np.float32)


def encode(model: str, rows: Array, binary: bool) -> Message:
    """Return an infer request: flat JSON data, or binary data with a binary response."""
    tensor = INPUTS[model]
    described: dict[str, Any] = {"name": tensor.name, "shape": list(rows.shape), "datatype": tensor.datatype}
    if not binary:
        described["data"] = rows.reshape(-1)
        body = orjson.dumps({"inputs": [described]}, option=orjson.OPT_SERIALIZE_NUMPY)
        return Message(body, {"Content-Type": "application/json"})
    data = rows.tobytes()
    described["parameters"] = {"binary_data_size": len(data)}
    text = orjson.dumps({"inputs": [described], "parameters": {"binary_data_output": True}})
    return Message(text + data, {"Content-Type": "application/octet-stream", JSON_LENGTH: str(len(text))})


def with_deadline(message: Message, deadline_ms: float) -> Message:
    """Return a V2 request with the protocol's `timeout` among its parameters."""
    length = int(message.headers.get(JSON_LENGTH, len(message.body)))
    document = json.loads(message.body[:length])
    document["parameters"] = {**document.get("parameters", {}), "timeout": int(deadline_ms * 1000)}
    head = orjson.dumps(document)
    headers = dict(message.headers)
    if JSON_LENGTH in headers:
        headers[JSON_LENGTH] = str(len(head))
    return Message(head + message.body[length:], headers)


def raw_request(message: Message, host: str, path: str) -> bytes:
    """Return a POST request as bytes."""
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(message.body)}"]
    lines += [f"{name}: {value}" for name, value in message.headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + message.body


def decode(answer: Message) -> Array:
    """Return the first output of an infer response."""
    length = {key.lower(): value for key, value in answer.headers.items()}.get(JSON_LENGTH.lower())
    text = answer.body if length is None else answer.body[: int(length)]
    output = json.loads(text)["outputs"][0]
    dtype = _DTYPES[output["datatype"]]
    if length is None:
        return np.array(output["data"], dtype).reshape(output["shape"])
    return np.frombuffer(answer.body[int(length) :], dtype).reshape(output["shape"])


def get(address: str, path: str) -> tuple[int, bytes]:
    """Return status and body of a GET on a new connection; status 0 without an answer."""
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def post(address: str, path: str, request: Message) -> Message:
    """Send a POST on a new connection. Raises RefusedError unless the status is 200."""
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        connection.request("POST", path, request.body, request.headers)
        response = connection.getresponse()
        body = response.read()
    finally:
        connection.close()
    if response.status != 200:
        raise RefusedError(f"POST {path}: status {response.status}: {body[:500].decode(errors='replace')}")
    return Message(body, dict(response.getheaders()))
