"""Ray Serve: one replica with `@serve.batch`, JSON and raw bytes.

It has the settings that its performance guide advises for throughput: RAY_SERVE_THROUGHPUT_OPTIMIZED and
HAProxy in place of its own proxy, both set before Ray is imported.
"""

from __future__ import annotations

import os
import signal
from typing import Any

os.environ.setdefault("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1")
os.environ.setdefault("RAY_SERVE_ENABLE_HA_PROXY", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import orjson
import ray
import shared
from ray import serve
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(
    num_replicas=1,
    max_ongoing_requests=shared.MAX_QUEUE,
    max_queued_requests=max(1, shared.MAX_QUEUE // 4) if shared.DEADLINE_MS else -1,
    ray_actor_options={"num_cpus": 1},
)
class Predictor:
    """`{"x": [...]}` to `{"y": [...]}`; a row's bytes to its output's."""

    def __init__(self) -> None:
        self.model = shared.Model()

    @serve.batch(
        max_batch_size=shared.MAX_BATCH,
        batch_wait_timeout_s=shared.MAX_WAIT_MS / 1000,
        max_concurrent_batches=1,
    )
    async def run(self, rows: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        return list(self.model(np.stack(rows)))

    async def __call__(self, request: Request) -> Response:
        if request.method == "GET":
            return Response(b"ok")
        body = await request.body()
        if request.headers.get("content-type") == "application/octet-stream":
            output = await self.run(np.frombuffer(body, self.model.dtype))
            return Response(output.tobytes(), 200, None, "application/octet-stream")
        output = await self.run(np.array(orjson.loads(body)["x"], self.model.dtype))
        text = orjson.dumps({"y": output}, option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(text, 200, None, "application/json")


if __name__ == "__main__":
    # Signals during Ray's shutdown would leave its processes running.
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    limit_s = shared.DEADLINE_MS / 1000 if shared.DEADLINE_MS else 60
    serve.start(http_options={"host": "127.0.0.1", "port": shared.PORT, "request_timeout_s": limit_s})
    serve.run(Predictor.bind(), route_prefix="/", logging_config={"enable_access_log": False})
    signal.sigwait(signals)
    serve.shutdown()
    ray.shutdown()
