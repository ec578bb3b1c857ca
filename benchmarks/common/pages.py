"""Pictures of pages with lines of text, for the example of text recognition."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 960, 736
_WORDS = """
the quick brown fox jumps over lazy dogs while seven wizards mix potions near an old harbour and bright lights
guide every ship home before winter total amount invoice number
"""


def page(seed: int, lines: int = 8) -> bytes:
    """Return a page as PNG: lines of three to eight words in sizes of 24 to 36 pixels."""
    chance = np.random.default_rng(seed)
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    drawing = ImageDraw.Draw(picture)
    top = 24
    for _ in range(lines):
        size = int(chance.integers(24, 37))
        text = " ".join(chance.choice(_WORDS.split(), int(chance.integers(3, 9))))
        drawing.text((32, top), text, fill="black", font=ImageFont.load_default(size))
        top += 2 * size + 12
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()
