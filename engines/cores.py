"""How many processors there are to share."""

from __future__ import annotations

import os


def cores() -> int:
    """Those that this process may use: a container's share can be far below the machine's count."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
