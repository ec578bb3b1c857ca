"""Large buffers are reused, not requested from the system each time."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from cobatch.server.serve import keep_freed_memory

_BUFFERS = """
import resource, sys
from cobatch.server.serve import keep_freed_memory

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        buffers = [bytes([length]) * 1_500_000 for length in range(4)]
        buffers.clear()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

pages()
without = pages()
keep_freed_memory()
pages()
print(without, pages())
"""
_GLIBC = hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def faults(environ: dict[str, str]) -> tuple[int, int]:
    """Return the page faults for the same buffers, without and with `keep_freed_memory`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", _BUFFERS], env=clean | environ, capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    return before, after


@pytest.mark.skipif(not _GLIBC, reason="another C library than glibc")
def test_freed_memory_is_reused() -> None:
    before, after = faults({})
    assert before > 5_000
    assert after < before / 20


@pytest.mark.skipif(not _GLIBC, reason="another C library than glibc")
def test_malloc_variables_win() -> None:
    # Each buffer of a page or more is mapped by itself, as the variable says.
    _, after = faults({"MALLOC_MMAP_THRESHOLD_": "4096"})
    assert after > 5_000


def test_it_can_be_called_repeatedly() -> None:
    keep_freed_memory()
    keep_freed_memory()
