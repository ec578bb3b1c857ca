"""Infer requests in each form that the server takes, and its answers, without the server's own codec."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.common.wire import JSON_LENGTH, Array
from benchmarks.trials.client import Answer, post
from benchmarks.trials.models import TYPES, Case

# The names of datatypes in /v1, and NumPy's types by those.
V1_NAMES = {name: np.dtype(dtype).name for name, (_, dtype) in TYPES.items()} | {"BYTES": "bytes"}
_NUMPY = {V1_NAMES[name]: dtype for name, (_, dtype) in TYPES.items()}
Outputs = dict[str, Array]


@dataclass(frozen=True, slots=True)
class Wish:
    """One request: its id, inputs, the outputs it names (None: no list), and its options."""

    id: str
    case: Case
    feed: Mapping[str, Array]
    wanted: tuple[str, ...] | None
    timeout_us: int = 0
    priority: int = 0


def as_bytes(values: Array) -> bytes:
    """Return a tensor in V2's binary form."""
    if values.dtype != object:
        return values.tobytes()
    texts = [value.encode() for value in values.flat]
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def v2(wish: Wish, rng: np.random.Generator, json_only: bool = False) -> tuple[dict[str, Any], bytes | None]:
    """Return a V2 request: the JSON, and the binary part, None without binary tensors."""
    inputs: list[dict[str, Any]] = []
    tail: bytes | None = None
    for tensor in wish.case.inputs:
        values = wish.feed[tensor.name]
        if tensor.name in wish.case.optional and rng.random() < 0.5:
            continue
        one: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(values.shape)}
        if json_only or rng.random() < 0.5:
            one["data"] = (
                values.tolist() if values.ndim and rng.random() < 0.3 else values.reshape(-1).tolist()
            )
        else:
            data = as_bytes(values)
            one["parameters"] = {"binary_data_size": len(data)}
            tail = (tail or b"") + data
        inputs.append(one)
    parameters: dict[str, Any] = {}
    if wish.timeout_us:
        parameters["timeout"] = wish.timeout_us
    if wish.priority:
        parameters["priority"] = wish.priority
    if not json_only and rng.random() < 0.5:
        parameters["binary_data_output"] = True
    message: dict[str, Any] = {"id": wish.id, "inputs": inputs, "parameters": parameters}
    if wish.wanted is not None:
        message["outputs"] = [{"name": name} for name in wish.wanted]
        if not json_only:
            for output in message["outputs"]:
                output["parameters"] = {"binary_data": bool(rng.random() < 0.5)}
    return message, tail


def v2_request(wish: Wish, rng: np.random.Generator, *fields: str) -> bytes:
    """Return a V2 request, in JSON and binary."""
    message, tail = v2(wish, rng)
    text = json.dumps(message).encode()
    lines = fields if tail is None else [*fields, f"{JSON_LENGTH}: {len(text)}"]
    return post(f"/v2/models/{wish.case.name}/infer", text + (tail or b""), *lines)


def can_be_raw(wish: Wish) -> bool:
    """Return True if the inputs can be the whole body: one row of one input, with elements."""
    if not wish.case.batched or len(wish.case.inputs) > 1:
        return False
    (values,) = wish.feed.values()
    return len(values) == 1 and values.size > 0 and (values.dtype != object or values.shape == (1, 1))


def raw_request(wish: Wish, *fields: str) -> bytes:
    """Return a request whose body is one row and nothing else."""
    (values,) = wish.feed.values()
    body = values.item().encode() if values.dtype == object else values.tobytes()
    return post(f"/v2/models/{wish.case.name}/infer", body, *fields, f"{JSON_LENGTH}: 0")


def v1_request(wish: Wish, rng: np.random.Generator, *fields: str) -> bytes:
    """Return a prediction's request."""
    inputs: dict[str, Any] = {}
    for tensor in wish.case.inputs:
        values = wish.feed[tensor.name]
        if values.size and rng.random() < 0.6:
            inputs[tensor.name] = values.tolist()
        else:
            named = tensor.datatype if rng.random() < 0.5 else V1_NAMES[tensor.datatype]
            text = base64.b64encode(as_bytes(values)).decode()
            inputs[tensor.name] = {"b64": text, "dtype": named, "shape": list(values.shape)}
    message: dict[str, Any] = {"inputs": inputs, "priority": wish.priority}
    if wish.wanted is not None:
        message["outputs"] = list(wish.wanted)
    if wish.timeout_us:
        message["deadline_ms"] = wish.timeout_us / 1000
    body = json.dumps(message).encode()
    return post(f"/v1/models/{wish.case.name}/predictions", body, "Content-Type: application/json", *fields)


def batch_request(wishes: Sequence[Wish], rng: np.random.Generator, *fields: str) -> bytes:
    """Return a POST /batch with these requests."""
    items = [
        {
            "id": wish.id,
            "method": "POST",
            "url": f"/v2/models/{wish.case.name}/infer",
            "body": v2(wish, rng, json_only=True)[0],
        }
        for wish in wishes
    ]
    return post("/batch", json.dumps({"requests": items}).encode(), *fields)


def v2_outputs(message: dict[str, Any], tail: bytes = b"") -> Outputs:
    """Return the outputs of a V2 response, in its order."""
    found: Outputs = {}
    for output in message["outputs"]:
        dtype = TYPES[output["datatype"]][1]
        size = output.get("parameters", {}).get("binary_data_size")
        if size is None:
            found[output["name"]] = _array(_flat(output["data"]), dtype, output["shape"])
        else:
            found[output["name"]] = from_bytes(tail[:size], dtype, output["shape"])
            tail = tail[size:]
    if tail:
        raise ValueError(f"{len(tail)} bytes are left over")
    return found


def v2_answer(answer: Answer) -> tuple[str | None, Outputs]:
    """Return the id and the outputs of a V2 response."""
    length = int(answer.headers.get(JSON_LENGTH.lower(), len(answer.body)))
    message = json.loads(answer.body[:length])
    return message.get("id"), v2_outputs(message, answer.body[length:])


def v1_outputs(message: dict[str, Any]) -> Outputs:
    """Return the outputs of a prediction."""
    return {
        name: _array(_flat(output["data"]), _NUMPY[output["dtype"]], output["shape"])
        for name, output in message["outputs"].items()
    }


def from_bytes(data: bytes, dtype: Any, shape: Sequence[int]) -> Array:
    """Return a tensor from V2's binary form. Raises ValueError, struct.error."""
    if dtype is not object:
        return np.frombuffer(data, dtype).reshape(shape)
    texts = []
    while data:
        (size,) = struct.unpack_from("<I", data)
        texts.append(data[4 : 4 + size].decode())
        data = data[4 + size :]
    return _array(texts, object, shape)


def _array(values: list[Any], dtype: Any, shape: Sequence[int]) -> Array:
    array = np.empty(len(values), dtype)
    array[:] = values
    return array.reshape(shape)


def _flat(data: Any) -> list[Any]:
    if not isinstance(data, list):
        return [data]
    return [one for part in data for one in _flat(part)] if data and isinstance(data[0], list) else data
