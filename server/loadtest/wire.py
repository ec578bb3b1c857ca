"""V2 requests as bytes that are made once and sent often, and answers as arrays."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson

from cobatch.engines.base import DATATYPES
from cobatch.server.loadtest.messages import Address, Arrays

_HEADER_LENGTH = re.compile(rb"\r\ninference-header-content-length: *(\d+)", re.IGNORECASE)
_OF_DTYPE = {dtype: name for name, dtype in DATATYPES.items() if name not in ("BF16", "BYTES")}


def datatype_of(array: np.ndarray[Any, Any]) -> str:
    """The protocol's name of an array's type. Raises KeyError."""
    return "BYTES" if array.dtype.kind in "OSU" else _OF_DTYPE[array.dtype]


def encode(
    tensors: Arrays, datatypes: Mapping[str, str], binary: bool, parameters: Mapping[str, int]
) -> tuple[bytes, dict[str, str]]:
    """An infer request's body, and the headers that it needs."""
    described: list[dict[str, Any]] = []
    tail: list[bytes] = []
    for name, array in tensors.items():
        entry: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": datatypes[name]}
        if binary:
            tail.append(_packed(array, datatypes[name]))
            entry["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            entry["data"] = _plain(array, datatypes[name])
        described.append(entry)
    more: dict[str, Any] = dict(parameters)
    if binary:
        more["binary_data_output"] = True
    message = {"inputs": described} | ({"parameters": more} if more else {})
    head = orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY)
    if not binary:
        return head, {"Content-Type": "application/json"}
    headers = {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }
    return head + b"".join(tail), headers


def _plain(array: np.ndarray[Any, Any], datatype: str) -> Any:
    flat = np.ascontiguousarray(array).reshape(-1)
    if datatype == "BYTES":
        return [one.decode() if isinstance(one, bytes) else str(one) for one in flat.tolist()]
    return (flat.astype(np.uint32) << 16).view(np.float32) if datatype == "BF16" else flat


def _packed(array: np.ndarray[Any, Any], datatype: str) -> bytes:
    if datatype != "BYTES":
        return np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    parts = [one if isinstance(one, bytes) else str(one).encode() for one in array.reshape(-1).tolist()]
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def request(address: Address, path: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """All of a POST as it goes over the wire."""
    lines = [f"POST {address.base}{path} HTTP/1.1"]
    if not any(name.lower() == "host" for name in headers):
        lines.append(f"Host: {address.authority}")
    lines += [f"{name}: {value}" for name, value in headers.items()]
    lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def decode(head: bytes, body: bytes) -> dict[str, np.ndarray[Any, Any]]:
    """An answer's outputs. `head`: its header lines. Raises ValueError where it is none of the protocol's."""
    found = _HEADER_LENGTH.search(head)
    end = int(found[1]) if found else len(body)
    tail = memoryview(body)[end:]
    try:
        outputs = json.loads(body[:end])["outputs"]
        arrays = {}
        for one in outputs:
            size = (one.get("parameters") or {}).get("binary_data_size")
            if size is None:
                array = _read_plain(one["data"], one["datatype"])
            else:
                array = _read_packed(bytes(tail[:size]), one["datatype"])
                tail = tail[size:]
            arrays[str(one["name"])] = array.reshape(one["shape"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not an answer of the protocol: {error!r}") from None
    return arrays


def _read_plain(data: Any, datatype: str) -> np.ndarray[Any, Any]:
    if datatype == "BF16":
        return _to_bf16(np.asarray(data, np.float32))
    # Triton answers a class as text even where JSON could hold its number.
    return np.asarray(data, DATATYPES[datatype])


def _to_bf16(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (array.view(np.uint32) >> 16).astype(np.uint16)


def _read_packed(data: bytes, datatype: str) -> np.ndarray[Any, Any]:
    if datatype != "BYTES":
        return np.frombuffer(data, DATATYPES[datatype].newbyteorder("<"))
    values, at = [], 0
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        values.append(data[at + 4 : at + 4 + size].decode())
        at += 4 + size
    return np.array(values, object)


def same(got: Arrays, wanted: Arrays, rtol: float, atol: float) -> str | None:
    """None if the answer is right, that is, has all that is wanted; else what is wrong with it."""
    for name, right in wanted.items():
        array = got.get(name)
        if array is None:
            return f"output {name!r} is missing"
        if array.shape != right.shape:
            return f"output {name!r} has shape {list(array.shape)}, expected {list(right.shape)}"
        if array.dtype.kind in "OSU":
            near = [_text(one) for one in array.flat] == [_text(one) for one in right.flat]
        else:
            near = bool(np.allclose(array.astype(np.float64), right.astype(np.float64), rtol, atol, True))
        if not near:
            return f"output {name!r} is not what is expected"
    return None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
