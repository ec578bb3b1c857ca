"""The gate of models in `faulty`: a row that waits there goes on when the test says so."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

# Reached only by a bug.
WAIT_S = 60.0


@contextlib.contextmanager
def passed(gate: Path) -> Iterator[None]:
    """Wait until a row waits at the gate; it goes on at the end."""
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(gate.open, "wb", 0)
        came = bool(wait([opening], WAIT_S).done)
        if not came:
            os.close(os.open(gate, os.O_RDWR))  # as a row would, so that the thread ends
        with opening.result():
            assert came, "no row waits at the gate"
            yield
