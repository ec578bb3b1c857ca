"""Text in pictures: rapidocr, whose models are models of the server.

    pip install rapidocr onnx
    python examples/ocr/prepare.py /tmp/ocr
    cobatch serve --config /tmp/ocr/cobatch.toml
    curl -H 'Content-Type: image/png' --data-binary @page.png http://127.0.0.1:8000/v1/models/ocr/infer

The lines of a picture, and of all pictures that are read at the same time, are recognized in common batches.
"""

import asyncio
import io
from typing import Annotated, Any

import msgspec
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rapidocr import RapidOCR
from rapidocr.ch_ppocr_rec import TextRecInput, TextRecOutput
from rapidocr.utils.load_image import LoadImageError

from cobatch import BadRequest, model

detect, classify, recognize = model("detect"), model("classify"), model("recognize")


class Line(msgspec.Struct):
    """A line of text, the corners of its box from the upper left one on, and the model's confidence."""

    text: str
    box: list[tuple[float, float]]
    score: float


class Step:
    """A model of the server in place of a session of rapidocr, which is called in a thread."""

    def __init__(self, of_server: Any) -> None:
        self._model = of_server

    def __call__(self, pictures: np.ndarray) -> np.ndarray[Any, Any]:
        """Return the model's only output."""
        (output,) = self._model.run(x=pictures).values()
        array: np.ndarray[Any, Any] = output
        return array


class Recognizer:
    """Recognizes each line by itself; the server pads it to a bucket, and makes batches."""

    def __init__(self, own: Any, loop: asyncio.AbstractEventLoop) -> None:
        self._own = own
        self._loop = loop

    def __call__(self, given: TextRecInput) -> TextRecOutput:
        """Return the text of each picture of a line."""
        _, height, width = self._own.rec_image_shape
        pictures: Any = given.img
        rows = [
            self._own.resize_norm_img(picture, max(width / height, picture.shape[1] / picture.shape[0]))
            for picture in pictures
        ]
        lines = asyncio.run_coroutine_threadsafe(self._recognize(rows), self._loop).result()
        found: Any = (*zip(*lines, strict=True), (None,) * len(lines))
        return TextRecOutput(pictures, *found)

    async def _recognize(self, rows: list[np.ndarray]) -> list[tuple[str, float]]:
        found = await asyncio.gather(*[recognize(x=row[np.newaxis]) for row in rows])
        decode = self._own.postprocess_op.decode
        return [decode(one["index"], one["probability"], remove_duplicate=True)[0][0] for one in found]


class Ocr:
    """Pictures in, lines of text out."""

    def load(self) -> None:
        """Load what comes before and after the models."""
        rapidocr: Any = RapidOCR(params={"Global.log_level": "error"})
        rapidocr(_sample())  # it opens its models, of which it keeps the list of characters
        rapidocr.text_det.session = Step(detect)
        rapidocr.text_cls.session = Step(classify)
        self.rapidocr = rapidocr

    async def handle(self, picture: Annotated[bytes, "image/png", "image/jpeg"]) -> list[Line]:
        """Return the lines in reading order."""
        if not isinstance(self.rapidocr.text_rec, Recognizer):
            self.rapidocr.text_rec = Recognizer(self.rapidocr.text_rec, asyncio.get_running_loop())
        try:
            # In a thread: rapidocr is no asynchronous code, and computes for tens of milliseconds.
            found = await asyncio.to_thread(self.rapidocr, picture)
        except LoadImageError as error:
            raise BadRequest(f"the picture cannot be read: {error}") from error
        if found.txts is None:
            return []
        return [
            Line(text, [(float(x), float(y)) for x, y in box], float(score))
            for text, box, score in zip(found.txts, found.boxes, found.scores, strict=True)
        ]


def _sample() -> bytes:
    picture = Image.new("RGB", (320, 64), "white")
    ImageDraw.Draw(picture).text((16, 12), "a line of text", fill="black", font=ImageFont.load_default(32))
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()
