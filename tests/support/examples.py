"""Numbers of hypothesis' examples: each run draws new ones, so CI needs few.

`COBATCH_EXAMPLES=100 pytest tests/server/v2/test_fuzz_binary.py` draws a hundred times as many.
"""

from __future__ import annotations

import os

from hypothesis import settings

FACTOR = int(os.environ.get("COBATCH_EXAMPLES", "1"))


def examples(count: int, **more: int) -> settings:
    """Settings for this number of examples."""
    return settings(max_examples=count * FACTOR, **more)  # type: ignore[arg-type]  # of several types
