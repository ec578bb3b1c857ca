"""Requests that really run, for the API's description: a row of zeros for each model that is loaded.

Zeros are values of every datatype, are in range wherever the model takes indices, and are ASCII as bytes,
so that even a binary body can stand in a JSON document.

The examples on the API's page: requests as commands that can be pasted, answers as JSON.
"""

from __future__ import annotations

import base64
import json
import shlex
from html import escape
from math import prod
from typing import Any

import msgspec

from cobatch.engines.base import Signature, TensorSpec

Json = dict[str, Any]
# A model whose row is longer has no example: nobody would read it.
_MOST_ELEMENTS = 4096
# Where NumPy's name of what carries a datatype is not the datatype's.
_DTYPES = {"BYTES": "bytes", "BF16": "bfloat16"}


def has_example(signature: Signature) -> bool:
    """Whether a row is short enough to be shown."""
    return sum(prod(_row(spec)) for spec in (*signature.inputs, *signature.outputs)) <= _MOST_ELEMENTS


def infer_json(signature: Signature) -> Json | None:
    """An infer request in JSON; None where JSON has no word for a datatype."""
    if any(spec.datatype == "BF16" for spec in signature.inputs):
        return None
    return {"id": "1", "inputs": [_tensor(spec) | {"data": _flat(spec)} for spec in signature.inputs]}


def infer_binary(signature: Signature) -> tuple[str, int]:
    """An infer request with binary tensors both ways, as text, and the length of its JSON."""
    message = {
        "inputs": [
            _tensor(spec) | {"parameters": {"binary_data_size": len(_bytes(spec))}}
            for spec in signature.inputs
        ],
        "parameters": {"binary_data_output": True},
    }
    text = msgspec.json.encode(message).decode()
    return text + "".join(_bytes(spec) for spec in signature.inputs), len(text)


def infer_answer(model: str, version: str, signature: Signature) -> Json:
    """What comes of it, but for the values."""
    outputs = [_tensor(spec) | {"data": _flat(spec)} for spec in signature.outputs]
    return {"model_name": model, "model_version": version, "id": "1", "outputs": outputs}


def raw_tensor(signature: Signature) -> str | None:
    """A body that is one row of the only input; None where there are several."""
    if len(signature.inputs) != 1 or signature.inputs[0].shape.count(-1) > 1:
        return None
    spec = signature.inputs[0]
    # Elsewhere an element of BYTES has its length before it; here the whole body is one.
    if spec.datatype != "BYTES":
        return _bytes(spec)
    return "text" if prod(_row(spec)) == 1 else None


def prediction(signature: Signature) -> Json:
    """A prediction's request in JSON."""
    return {"inputs": {spec.name: _nested(spec) for spec in signature.inputs}, "deadline_ms": 60_000}


def form(signature: Signature) -> Json:
    """The parts of a form, each of them JSON."""
    return {spec.name: _nested(spec) for spec in signature.inputs} | {"request": {"priority": 1}}


def prediction_answer(model: str, signature: Signature) -> Json:
    """What comes of it, but for the values."""
    return {
        "id": "kQ0vR1mXbq8sWc3LtZ5dYg6h",
        "status": "completed",
        "model": model,
        "outputs": {
            spec.name: {
                "dtype": _DTYPES.get(spec.datatype, spec.dtype.name),
                "shape": [1, *_row(spec)],
                "data": _zeros(spec),
            }
            for spec in signature.outputs
        },
        "usage": {"rows": 1, "batch_rows": 16, "queue_us": 213, "compute_us": 1480},
    }


def _row(spec: TensorSpec) -> list[int]:
    return [1 if size == -1 else size for size in spec.shape]


def _tensor(spec: TensorSpec) -> Json:
    return {"name": spec.name, "shape": [1, *_row(spec)], "datatype": spec.datatype}


def _zero(spec: TensorSpec) -> Any:
    if spec.datatype == "BYTES":
        return "text"
    return False if spec.datatype == "BOOL" else 0.0 if spec.datatype in ("FP16", "FP32", "FP64") else 0


def _flat(spec: TensorSpec) -> list[Any]:
    return [_zero(spec)] * prod(_row(spec))


def _zeros(spec: TensorSpec) -> Any:
    values = _zero(spec)
    for size in reversed([1, *_row(spec)]):
        values = [values] * size
    return values


def _nested(spec: TensorSpec) -> Any:
    """As nested lists, or where JSON has no numbers of the kind, as base64."""
    if spec.datatype != "BF16":
        return _zeros(spec)
    data = base64.b64encode(_bytes(spec).encode()).decode()
    return {"b64": data, "dtype": spec.datatype, "shape": [1, *_row(spec)]}


def _bytes(spec: TensorSpec) -> str:
    """The row as binary, as text. An element of BYTES is its length, here 0, and as many bytes."""
    size = 4 if spec.datatype == "BYTES" else spec.dtype.itemsize
    return "\0" * (size * prod(_row(spec)))


# Longer examples are cut: they are there to be read.
_MOST_SHOWN = 1200
_WIDTH = 76


def request_example(path: str, media: str, example: Json, credentials: str = "") -> str:
    """A request as a command, where a command line can hold it. `credentials` is a header of it."""
    value = example["value"]
    path = path.format_map(example.get("x-path", {}))
    if media == "application/json":
        body = f"--json {shlex.quote(pretty(value))}"
    elif media == "multipart/form-data":
        body = " \\\n  ".join(f"-F {shlex.quote(f'{name}={pretty(part)}')}" for name, part in value.items())
    else:
        return details(example["summary"], _binary(path, media, example, credentials))
    return details(example["summary"], f"curl $URL{path}{_line(credentials)} \\\n  {body}")


def _binary(path: str, media: str, example: Json, credentials: str) -> str:
    """A binary body as a command: text, then zeros."""
    text = example["value"].rstrip("\0")
    zeros = len(example["value"]) - len(text)
    parts = [f"printf %s {shlex.quote(text)}"] if text else []
    parts += [f"head -c {zeros} /dev/zero"] if zeros else []
    headers = {"Content-Type": media, **example.get("x-headers", {})}
    lines = " \\\n  ".join(f"-H {shlex.quote(f'{name}: {value}')}" for name, value in headers.items())
    curl = f"curl $URL{path}{_line(credentials)}"
    return f"{{ {'; '.join(parts)}; }} |\n  {curl} --data-binary @- -o answer \\\n  {lines}"


def _line(credentials: str) -> str:
    # In double quotes, for the shell puts the variable's value in.
    return f' -H "{credentials}"' if credentials else ""


def details(summary: str, text: str) -> str:
    """Text that is shown when it is asked for."""
    if len(text) > _MOST_SHOWN:
        text = text[:_MOST_SHOWN] + " ..."
    # What can be scrolled must be reachable by keyboard.
    body = f'<pre tabindex="0"><code>{escape(text)}</code></pre>'
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def pretty(value: Any, indent: int = 0) -> str:
    """JSON on several lines where it is long, but what is short stays on one."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) + indent <= _WIDTH or not isinstance(value, dict | list):
        return text
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {pretty(one, indent + 2)}" for key, one in value.items()]
    else:
        items = [pretty(one, indent + 2) for one in value]
    ends = "{}" if isinstance(value, dict) else "[]"
    lead = "\n" + " " * (indent + 2)
    return f"{ends[0]}{lead}{f',{lead}'.join(items)}\n{' ' * indent}{ends[1]}"
