"""Serve a model with the `cobatch` of this interpreter's environment, and send it one request.

./scripts/test runs it in a temporary environment that has the built wheel and nothing of the source tree, so
it uses the standard library only. Usage: smoke.py MODEL.onnx
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

from serving import Server, ServingError


def ask(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """Send a GET, or a POST if there is a body; return the JSON of the response."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 (loopback)
    with urllib.request.urlopen(request, timeout=30.0) as response:  # noqa: S310 (loopback)
        answer: dict[str, Any] = json.load(response)
    return answer


def zeros(tensor: dict[str, Any], rows: int) -> dict[str, Any]:
    """Return an input of zeros for a tensor of the model's metadata."""
    shape = [rows, *(max(1, axis) for axis in tensor["shape"][1:])]
    size = 1
    for axis in shape:
        size *= axis
    return {"name": tensor["name"], "datatype": tensor["datatype"], "shape": shape, "data": [0] * size}


def check(url: str) -> str:
    """Send an infer request of two rows, and describe the outputs. Raises ServingError if they are wrong."""
    metadata = ask(f"{url}/v2/models/smoke")
    inputs = [zeros(tensor, rows=2) for tensor in metadata["inputs"]]
    answer = ask(f"{url}/v2/models/smoke/infer", {"inputs": inputs})
    for wanted, got in zip(metadata["outputs"], answer["outputs"], strict=True):
        if got["name"] != wanted["name"] or got["shape"][0] != 2 or not got["data"]:
            raise ServingError(f"expected {wanted}, got {got['name']} {got['shape']}")
    return ", ".join(f"{got['name']} {got['datatype']} {got['shape']}" for got in answer["outputs"])


def main() -> int:
    """Return 0 if the request was answered and the server stopped with status 0."""
    model = Path(sys.argv[1])
    try:
        with Server([str(model), "--name", "smoke", "--port", "0"]) as server:
            server.wait_ready()
            answer = check(server.url)
            server.stop()
    except (ServingError, OSError) as error:
        print(f"smoke: {error}", file=sys.stderr)
        return 1
    print(f"smoke: {sys.prefix}/bin/cobatch served {model.name} and answered {answer}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
