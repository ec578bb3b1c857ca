"""BentoML: a service with a batchable API over NumPy arrays; no access log, no metrics, no traces."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import bentoml
import numpy as np
import shared
from bentoml.validators import DType

_DTYPE = "int32" if shared.NAME == "magika" else "float32"
# The goal of its dispatcher, which refuses requests that would miss it. Until it has measured the time of a
# request, it assumes a fifteenth of the goal: with the default of a minute a single request waits two thirds
# of a second for others. This value is a few times the worst latency of 256 callers, and it still refuses
# some.
_GOAL_MS = shared.DEADLINE_MS or (10_000 if shared.NAME == "magika" else 2_000)


@bentoml.service(
    workers=1,
    traffic={
        "timeout": shared.DEADLINE_MS / 1000 if shared.DEADLINE_MS else 60,
        "max_concurrency": shared.MAX_QUEUE,
    },
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
class Predictor:
    """`{"x": [[...]]}` to `[[...]]`."""

    def __init__(self) -> None:
        self.model = shared.Model()

    @bentoml.api(
        batchable=True,
        max_batch_size=shared.MAX_BATCH,
        max_latency_ms=_GOAL_MS,
    )
    def predict(self, x: Annotated[np.ndarray, DType(_DTYPE)]) -> Annotated[np.ndarray, DType("float32")]:
        return self.model(x)


if __name__ == "__main__":
    command = ["bentoml", "serve", "bentoml_app:Predictor", "--host=127.0.0.1", f"--port={shared.PORT}"]
    os.execv(sys.executable, [sys.executable, "-m", *command])
