"""The C library's memory: what large requests have used is kept for the next ones.

By default glibc gives large buffers back to the system as soon as they are free, and the next request's are
new pages, which the kernel has to clear and to map one by one as they are touched. For a row of 150,528
floats in JSON that was 1.1 of 4.1 ms (`python -m benchmarks.scaling --only row`).
"""

from __future__ import annotations

import ctypes
import os

# malloc.h. Buffers up to the first size come from the heap and not as pages of their own (glibc takes no more
# than this); so much free memory at the heap's end stays there.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_HEAP_BYTES = 32 << 20
_KEPT_BYTES = 128 << 20
# Whoever has set one of these knows better.
_SETTINGS = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> None:
    """Have the C library keep up to 128 MiB that are free, for the whole process. Does nothing where the C
    library is another one than glibc, or where its settings are in the environment."""
    if any(name in os.environ for name in _SETTINGS):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_THRESHOLD, _HEAP_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
