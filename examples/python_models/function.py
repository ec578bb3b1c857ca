"""A function as a model: texts of any number in, how often each has each letter out.

cobatch serve examples/python_models/function.py:count_letters
"""

from typing import Annotated

import numpy as np

Texts = Annotated[np.ndarray, "BYTES", [-1, 1]]
Counts = Annotated[np.ndarray, "INT64", [-1, 26]]


def count_letters(text: Texts) -> Counts:
    """Count the letters from a to z in each text."""
    rows = [np.frombuffer(one.lower(), np.uint8) for one in text[:, 0]]
    return np.array([np.bincount(row, minlength=256)[97:123] for row in rows])
