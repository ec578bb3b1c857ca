"""Open Inference Protocol V2 messages: encode requests, decode answers and compare them with the expected."""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from cobatch.engines.base import DATATYPES
from cobatch.server.loadtest.messages import Address, Arrays, Expected

Array = np.ndarray[Any, Any]

_HEADER_LENGTH = re.compile(rb"\r\ninference-header-content-length: *(\d+)", re.IGNORECASE)
_DATATYPE_OF = {dtype: name for name, dtype in DATATYPES.items() if name not in ("BF16", "BYTES")}
_CACHED_BODIES = 16  # per example
_MESSAGE_LIMIT = 300  # characters


def datatype_of(array: Array) -> str:
    """Return the V2 datatype of an array. Raises KeyError."""
    return "BYTES" if array.dtype.kind in "OSU" else _DATATYPE_OF[array.dtype]


def to_bf16(array: Array) -> Array:
    """Return float values as bfloat16 bit patterns, uint16."""
    return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def encode(
    tensors: Arrays, datatypes: Mapping[str, str], binary: bool, parameters: Mapping[str, int]
) -> tuple[bytes, dict[str, str]]:
    """Return an infer request's body and content headers."""
    inputs: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for name, array in tensors.items():
        entry: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": datatypes[name]}
        if binary:
            tail.append(_to_binary(array, datatypes[name]))
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            entry["data"] = _to_json(array, datatypes[name])
        inputs.append(entry)
    all_parameters = {**parameters, **({"binary_data_output": True} if binary else {})}
    message = {"inputs": inputs} | ({"parameters": all_parameters} if all_parameters else {})
    head = orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)
    if not binary:
        return head, {"Content-Type": "application/json"}
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }
    return head + b"".join(tail), headers


def _to_json(array: Array, datatype: str) -> Any:
    flat = np.ascontiguousarray(array).reshape(-1)
    if datatype == "BYTES":
        return [_text(value) for value in flat.tolist()]
    return (flat.astype(np.uint32) << 16).view(np.float32) if datatype == "BF16" else flat


def _to_binary(array: Array, datatype: str) -> bytes:
    if datatype != "BYTES":
        return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    parts = [value if isinstance(value, bytes) else str(value).encode() for value in array.flat]
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def request_bytes(address: Address, path: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """Return a whole HTTP/1.1 POST request."""
    lines = [f"POST {address.base}{path} HTTP/1.1"]
    if not any(name.lower() == "host" for name in headers):
        lines.append(f"Host: {address.authority}")
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def decode(head: bytes, body: bytes) -> dict[str, Array]:
    """Return an answer's outputs. `head`: its header lines. Raises ValueError if it is no V2 answer."""
    match = _HEADER_LENGTH.search(head)
    end = int(match[1]) if match else len(body)
    tail = memoryview(body)[end:]
    arrays = {}
    try:
        for output in json.loads(body[:end])["outputs"]:
            size = (output.get("parameters") or {}).get("binary_data_size")
            datatype = output["datatype"]
            if size is not None:
                array = _from_binary(bytes(tail[:size]), datatype)
                tail = tail[size:]
            elif datatype == "BF16":
                array = to_bf16(np.asarray(output["data"], np.float32))
            else:
                # With the dtype given, a class label that Triton sends as text becomes a number again.
                array = np.asarray(output["data"], DATATYPES[datatype])
            arrays[str(output["name"])] = array.reshape(output["shape"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an answer of the protocol: {error!r}") from None
    return arrays


def _from_binary(data: bytes, datatype: str) -> Array:
    if datatype != "BYTES":
        return np.frombuffer(data, DATATYPES[datatype].newbyteorder("<"))
    values, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        values.append(data[at + 4 : at + 4 + size].decode())
        at += 4 + size
    return np.array(values, object)


def difference(actual: Arrays, expected: Arrays, rtol: float, atol: float) -> str | None:
    """Return None if all expected outputs are there and close enough, else the first difference."""
    for name, right in expected.items():
        array = actual.get(name)
        if array is None:
            return f"output {name!r} is missing"
        if array.shape != right.shape:
            return f"output {name!r} has shape {list(array.shape)}, expected {list(right.shape)}"
        if array.dtype.kind in "OSU":
            equal = [_text(value) for value in array.flat] == [_text(value) for value in right.flat]
        else:
            equal = bool(np.allclose(array.astype(np.float64), right.astype(np.float64), rtol, atol, True))
        if not equal:
            return f"output {name!r} differs from the expected values"
    return None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


class Checker:
    """Compares answers with the expected ones; bodies found right are cached, so equal ones cost little."""

    def __init__(self, expected: Expected) -> None:
        self._expected = expected
        self._right: dict[int, set[bytes]] = {}

    def check(self, example: int, head: bytes, body: bytes) -> str | None:
        """Return None if the answer is right, else the reason."""
        right = self._right.setdefault(example, set())
        if body in right:
            return None
        expected = self._expected
        try:
            outputs = decode(head, body)
        except ValueError as error:
            return str(error)
        reason = difference(outputs, expected.answers[example], expected.rtol, expected.atol)
        if reason is None and len(right) < _CACHED_BODIES:
            right.add(body)
        return reason


def error_message(body: bytes) -> str:
    """Return the message of an error body in one line: V2's `error` or a problem's `detail`."""
    try:
        message = json.loads(body)
    except ValueError:
        message = body.decode("utf-8", "replace")
    if isinstance(message, dict):
        message = message.get("error") or message.get("detail") or message.get("message") or message
    return " ".join(str(message).split())[:_MESSAGE_LIMIT]
