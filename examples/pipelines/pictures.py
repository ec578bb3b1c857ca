"""A picture in, a picture out: thumbnails, with Pillow in processes of their own.

    pip install pillow
    cobatch serve examples/pipelines/pictures.py:Thumbnail
    curl -H 'content-type: image/png' --data-binary @a.png -o b.png localhost:8000/v1/models/Thumbnail/infer

A picture of another type is refused, with 415, before a process sees it.
"""

import io
from typing import Annotated

from PIL import Image

from cobatch import BadRequest, Response

PIXELS = 64


class Thumbnail:
    """The pipeline: no coroutine, so each process handles one picture at a time, in a thread."""

    def handle(self, picture: Annotated[bytes, "image/png", "image/jpeg"]) -> Response:
        """Return a picture of at most 64 pixels each way, as PNG."""
        try:
            image = Image.open(io.BytesIO(picture), formats=["png", "jpeg"])
            image.thumbnail((PIXELS, PIXELS))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # as Pillow says no
            raise BadRequest(f"the picture cannot be read: {error}") from error
        file = io.BytesIO()
        image.convert("RGBA").save(file, "png")  # a JPEG may be CMYK
        return Response(file.getvalue(), "image/png")
