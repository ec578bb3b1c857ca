"""A Starlette application with a model that is loaded once, and metrics for Prometheus.

pip install cobatch uvicorn
uvicorn --app-dir examples/library starlette_app:app
curl localhost:8000/predict --json '[1, 2, 3]'
curl localhost:8000/metrics/
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client import REGISTRY, make_asgi_app
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from cobatch import batched
from cobatch.server.observability.functions import FunctionCollector


class Model:
    """Stands in for a model: a matrix."""

    def __init__(self) -> None:
        self._weights = np.eye(3) * 2

    @batched(stack=True, max_batch_size=32)
    def predict(self, rows: NDArray[Any]) -> NDArray[np.float64]:
        """Return the outputs of rows [n, 3], as [n, 3]."""
        result: NDArray[np.float64] = rows @ self._weights
        return result


async def predict(request: Request) -> JSONResponse:
    """Answer one row."""
    row = np.asarray(await request.json(), np.float64)
    if row.shape != (3,):
        return JSONResponse({"detail": "three numbers are needed"}, 422)
    model: Model = request.state.model
    return JSONResponse((await model.predict(row)).tolist())


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
    """Load the model."""
    yield {"model": Model()}


REGISTRY.register(FunctionCollector(Model.predict))
app = Starlette(
    routes=[Route("/predict", predict, methods=["POST"]), Mount("/metrics", make_asgi_app())],
    lifespan=lifespan,
)
