"""Copies of rows, and who has the interpreter lock meanwhile."""

import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from cobatch.batcher.rows.copying import copied

SPINS = 200_000


@pytest.fixture
def waits_long() -> Iterator[None]:
    """A thread that waits for the lock gets it only if the other lets go of it."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(60.0)
    yield
    sys.setswitchinterval(interval_s)


def lets_go(work: Callable[[], object]) -> bool:
    """Return whether another thread had the interpreter lock during `work`."""
    gate, had = threading.Lock(), []
    gate.acquire()
    thread = threading.Thread(target=lambda: had.append(gate.acquire()))
    thread.start()
    gate.release()
    for _ in range(SPINS):  # until the thread waits for the lock
        pass
    before = len(had)
    work()
    after = len(had)
    thread.join()
    return after > before


@pytest.mark.usefixtures("waits_long")
def test_a_short_copy_keeps_the_lock() -> None:
    rows = np.zeros((1, 30_000), np.float32)
    assert not lets_go(lambda: copied(rows))


@pytest.mark.parametrize("dtype", [np.float32, np.bool_, object])
@pytest.mark.parametrize("width", [0, 7, 1 << 19])
def test_it_is_a_copy(dtype: type, width: int) -> None:
    rows: np.ndarray[Any, Any] = np.arange(4 * width).reshape(4, width).astype(dtype)[1:3]
    copy = copied(rows)
    assert copy.dtype == rows.dtype
    assert np.array_equal(copy, rows)
    assert not np.shares_memory(copy, rows)
