"""LitServe: a LitAPI with batching and `fast_queue` (ZeroMQ), as its documentation advises."""

from __future__ import annotations

from typing import Any

import litserve
import numpy as np
import shared


class Predictor(litserve.LitAPI):
    """`{"x": [...]}` to `{"y": [...]}`."""

    def setup(self, device: str) -> None:  # noqa: ARG002 - its name is LitServe's
        self.model = shared.Model()

    # Without annotation: LitServe would pass it to FastAPI.
    def decode_request(self, request):  # type: ignore[no-untyped-def]
        return np.array(request["x"], self.model.dtype)

    def batch(self, inputs: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        return np.stack(inputs)

    def predict(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return self.model(x)

    def unbatch(self, output: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        return list(output)

    def encode_response(self, output: np.ndarray[Any, Any]) -> dict[str, Any]:
        return {"y": output.tolist()}


if __name__ == "__main__":
    server = litserve.LitServer(
        Predictor(max_batch_size=shared.MAX_BATCH, batch_timeout=shared.MAX_WAIT_MS / 1000),
        accelerator="cpu",
        devices=1,
        workers_per_device=1,
        timeout=shared.DEADLINE_MS / 1000 if shared.DEADLINE_MS else 60,
        fast_queue=True,
    )
    server.run(
        host="127.0.0.1",
        port=shared.PORT,
        num_api_servers=1,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )
