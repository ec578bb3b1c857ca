"""The servers compared: versions, bodies, and their settings.

The versions are the latest on 24 Nov 2026.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np
import orjson

from benchmarks.common import wire

_ENGINE = ("onnxruntime==1.32.0", "numpy==2.4.6")


class Body(StrEnum):
    """The format of a request and its answer. PLAIN is `{"x": [...]}`, RAW the bytes of a row."""

    V2_JSON = "V2 JSON"
    V2_BINARY = "V2 binary"
    PLAIN = "JSON"
    BATCHED = "JSON, nested"
    RAW = "raw"

    @property
    def kind(self) -> str:
        """The kind of body that it is compared with: text with text, bytes with bytes."""
        return "binary" if self in {Body.V2_BINARY, Body.RAW} else "JSON"

    def make_request(self, model: str, row: wire.Array) -> wire.Message:
        """Return a request with one row."""
        if self in {Body.V2_JSON, Body.V2_BINARY}:
            return wire.encode(model, row.reshape(1, -1), self is Body.V2_BINARY)
        if self is Body.RAW:
            return wire.Message(row.tobytes(), {"Content-Type": "application/octet-stream"})
        value = row.reshape(1, -1) if self is Body.BATCHED else row.reshape(-1)
        body = orjson.dumps({"x": value}, option=orjson.OPT_SERIALIZE_NUMPY)
        return wire.Message(body, {"Content-Type": "application/json"})

    def read_output(self, answer: wire.Message) -> wire.Array:
        """Return the output of the row, flat; all models here answer FP32."""
        if self in {Body.V2_JSON, Body.V2_BINARY}:
            return wire.decode(answer).reshape(-1)
        if self is Body.RAW:
            return np.frombuffer(answer.body, np.dtype("<f4"))
        document = json.loads(answer.body)
        return np.array(document if self is Body.BATCHED else document["y"], np.float32).reshape(-1)


V2_PATH = "/v2/models/{model}/infer"
V2_READY = "/v2/models/{model}/ready"


@dataclass(frozen=True, slots=True)
class Peer:
    """One server: its environment, its app in `apps/`, and a path for each body that it accepts.

    `package` is the one whose version is reported; `python` is the interpreter that its packages need;
    `deadline` describes how a deadline is set in the overload case. `frozen`: it can be stopped (SIGSTOP)
    while others are measured. `flags` are those of `cobatch serve`.
    """

    name: str
    title: str
    package: str
    requirements: tuple[str, ...]
    paths: dict[Body, str]
    ready: str
    deadline: str
    python: str | None = None
    frozen: bool = True
    start_s: float = 60.0
    flags: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        """It is cobatch, with some number of processes."""
        return self.package == "cobatch"

    @property
    def app(self) -> str:
        return f"{self.name}_app.py"


OURS = Peer(
    "cobatch",
    "cobatch",
    "cobatch",
    (),
    {Body.V2_JSON: V2_PATH, Body.V2_BINARY: V2_PATH},
    "/v2/health/ready",
    "each request's `timeout`, `--max-queue-rows`",
)
OTHERS = (
    Peer(
        "mosec",
        "mosec",
        "mosec",
        ("mosec==0.9.8", "orjson==3.13.0", *_ENGINE),
        {Body.PLAIN: "/predict", Body.RAW: "/raw"},
        "/metrics",
        "`--timeout`, `--capacity`",
    ),
    Peer(
        "starlette",
        "Starlette recipe",
        "starlette",
        ("starlette==1.10.0", "uvicorn[standard]==0.54.0", "orjson==3.13.0", *_ENGINE),
        {Body.PLAIN: "/predict", Body.RAW: "/raw"},
        "/health",
        "`asyncio.wait_for`, a bounded queue",
    ),
    Peer(
        "triton",
        "Triton (PyTriton)",
        "nvidia-pytriton",
        ("nvidia-pytriton==0.7.0", _ENGINE[0]),  # it needs an older NumPy
        {Body.V2_JSON: V2_PATH, Body.V2_BINARY: V2_PATH},
        V2_READY,
        "the timeout of its queue policy",
        python="/usr/bin/python3.11",
        frozen=False,  # after a stop its processes regard each other as dead
    ),
    Peer(
        "mlserver",
        "MLServer",
        "mlserver",
        ("mlserver==1.7.1", *_ENGINE),
        {Body.V2_JSON: V2_PATH},
        V2_READY,
        "it has none",
    ),
    Peer(
        "litserve",
        "LitServe",
        "litserve",
        ("litserve==0.2.19", *_ENGINE),
        {Body.PLAIN: "/predict"},
        "/health",
        "`timeout`",
    ),
    Peer(
        "bentoml",
        "BentoML",
        "bentoml",
        ("bentoml==1.4.40", *_ENGINE),
        {Body.BATCHED: "/predict"},
        "/readyz",
        "`timeout`, `max_latency_ms`, `max_concurrency`",
    ),
    Peer(
        "ray",
        "Ray Serve",
        "ray",
        ("ray[serve]==2.60.0", "orjson==3.13.0", *_ENGINE),
        {Body.PLAIN: "/", Body.RAW: "/"},
        "/",
        "`request_timeout_s`, `max_ongoing_requests`, `max_queued_requests`; its HAProxy refuses none",
        start_s=120.0,
    ),
)
PEERS = (OURS, *OTHERS)
# Only if asked for. Its supervisor would replace a process that is stopped, so it is not frozen.
OURS_3 = replace(OURS, name="cobatch-3", title="cobatch, 3 processes", flags=("--processes=3",), frozen=False)
KNOWN = (*PEERS, OURS_3)
