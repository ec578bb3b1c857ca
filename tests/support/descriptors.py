"""The open descriptors of this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


def opened() -> set[tuple[str, str]]:
    """Return the numbers of open descriptors, each with the name of its file: a socket's is its own."""
    found = set()
    for one in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of this look
            found.add((one.name, str(one.readlink())))
    return found


@contextlib.contextmanager
def nothing_stays_open() -> Iterator[None]:
    """Check that all descriptors opened meanwhile are closed. Garbage of earlier tests may be, too."""
    before = opened()
    yield
    assert opened() <= before
