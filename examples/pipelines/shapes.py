"""Finds bright places in a picture with one model, and names the shape at each of them with another.

    pip install onnx
    python examples/pipelines/make_models.py examples/pipelines/models
    cobatch serve --config examples/pipelines/shapes.toml
    python -c 'import json; print(json.dumps({"pixels": [[1.0] * 8] * 8}))' |
        curl http://127.0.0.1:8000/v1/models/shapes/infer -H 'content-type: application/json' -d @-

Calls that come at the same time share the batches of both models.
"""

import asyncio

import msgspec
import numpy as np

from cobatch import BadRequest, model

CELL = 8
NAMES = ("square", "cross", "diagonal")


class Picture(msgspec.Struct):
    """Rows of pixels from 0 to 1, a multiple of 8 each way."""

    pixels: list[list[float]]


class Found(msgspec.Struct):
    """A shape, and the first row and column of its cell."""

    name: str
    row: int
    column: int


class Shapes:
    """The pipeline."""

    find = model("find")
    name = model("name")

    async def handle(self, picture: Picture) -> list[Found]:
        """Return the shapes in a picture, from top to bottom."""
        try:
            pixels = np.array(picture.pixels, np.float32)
        except ValueError:
            raise BadRequest("all rows of a picture must have the same length") from None
        if pixels.ndim != 2 or not pixels.size or pixels.shape[0] % CELL or pixels.shape[1] % CELL:
            raise BadRequest(f"a picture has a multiple of {CELL} rows and columns, got {list(pixels.shape)}")
        found = await self.find(pixels=pixels[None])
        places = np.argwhere(found["brightness"][0] > 0.2) * CELL
        crops = [pixels[row : row + CELL, column : column + CELL] for row, column in places]
        # One step for each crop: they wait for batches side by side, also with crops of other pictures.
        answers = await asyncio.gather(*[self.name(crop=crop[None]) for crop in crops])
        return [
            Found(NAMES[int(answer["scores"][0].argmax())], int(row), int(column))
            for (row, column), answer in zip(places, answers, strict=True)
        ]
