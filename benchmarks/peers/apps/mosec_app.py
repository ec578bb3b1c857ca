"""mosec: a Rust server with a route for JSON (with orjson) and one for raw bytes.

Each route has its own worker process; the unused one is idle.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import orjson
import shared
from mosec import Runtime, Server, Worker
from mosec.errors import DecodingError


class Json(Worker):
    """`{"x": [...]}` to `{"y": [...]}`, with orjson, which halves the cost."""

    def __init__(self) -> None:
        super().__init__()
        self.model = shared.Model()

    def deserialize(self, data: bytes) -> Any:
        try:
            return orjson.loads(data)["x"]
        except (orjson.JSONDecodeError, KeyError) as error:
            raise DecodingError from error

    def forward(self, data: list[Any]) -> list[Any]:
        return list(self.model(np.array(data, self.model.dtype)))

    def serialize(self, data: Any) -> bytes:
        return orjson.dumps({"y": data}, option=orjson.OPT_SERIALIZE_NUMPY)


class Raw(Worker):
    """A row's bytes to its output's bytes."""

    resp_mime_type = "application/octet-stream"

    def __init__(self) -> None:
        super().__init__()
        self.model = shared.Model()

    def deserialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: list[bytes]) -> list[Any]:
        return list(self.model(self.model.stack(data)))

    def serialize(self, data: Any) -> bytes:
        return bytes(data.tobytes())


if __name__ == "__main__":
    timeout_ms = shared.DEADLINE_MS or 60_000
    sys.argv[1:] = ["--address=127.0.0.1", f"--port={shared.PORT}", f"--timeout={timeout_ms}"]
    sys.argv += ["--log-level=warning", f"--capacity={shared.MAX_QUEUE}"]
    server = Server()
    size, wait_ms = shared.MAX_BATCH, shared.MAX_WAIT_MS
    routes = {"/predict": Json, "/raw": Raw}
    server.register_runtime(
        {
            route: [Runtime(worker, max_batch_size=size, max_wait_time=wait_ms)]
            for route, worker in routes.items()
        }
    )
    server.run()
