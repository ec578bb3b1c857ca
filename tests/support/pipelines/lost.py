"""A handler of a model that the server does not have."""

from __future__ import annotations

from typing import Any

from cobatch import model


class Lost:
    """Uses two models."""

    gate = model("gate")
    gote = model("gote")

    async def handle(self, ask: Any) -> Any:
        """Return the request."""
        return ask
