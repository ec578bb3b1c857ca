"""A FastAPI application whose requests share batches, and whose callers get fair shares.

pip install cobatch fastapi uvicorn
uvicorn --app-dir examples/library fastapi_app:app
curl localhost:8000/embed -H 'authorization: Bearer key-of-ann' --json '{"text": "hello"}'
"""

import math
from typing import Annotated

from fastapi import Body, Depends, FastAPI, Header, HTTPException, Request
from fastapi.responses import JSONResponse

from cobatch import DeadlineExceeded, QueueFull, batched

app = FastAPI()
TENANTS = {"Bearer key-of-ann": "ann", "Bearer key-of-bob": "bob"}


@batched(max_batch_size=64, max_queue=256)
def embed(texts: list[str]) -> list[list[float]]:
    """Stand in for a model: one run for all texts."""
    return [[float(len(text)), float(text.count(" "))] for text in texts]


async def tenant_of(authorization: Annotated[str, Header()]) -> str:
    """Return the name of the caller's tenant."""
    tenant = TENANTS.get(authorization)
    if tenant is None:
        raise HTTPException(401, "the key is unknown")
    return tenant


@app.post("/embed")
async def post_embed(
    text: Annotated[str, Body(embed=True)], tenant: Annotated[str, Depends(tenant_of)]
) -> list[float]:
    """Return the embedding of a text."""
    return await embed(text, tenant=tenant, timeout=10)


@app.exception_handler(QueueFull)
async def on_full(request: Request, error: QueueFull) -> JSONResponse:
    """Tell the client when to come back."""
    headers = {"retry-after": str(math.ceil(error.retry_after_s))}
    return JSONResponse({"detail": str(error)}, 429, headers)


@app.exception_handler(DeadlineExceeded)
async def on_late(request: Request, error: DeadlineExceeded) -> JSONResponse:
    """Tell the client that it took too long."""
    return JSONResponse({"detail": str(error)}, 504)
