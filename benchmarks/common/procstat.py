"""CPU time and memory of a server's processes, from /proc.

schedstat counts nanoseconds on a CPU for each thread; /proc/PID/stat counts ticks of 10 ms and is
only the fallback, for kernels built without it. A thread that has ended is no longer counted, which
is right for servers here: their threads live as long as they do.
"""

from __future__ import annotations

import os
from pathlib import Path

_PROC = Path("/proc")


def cpu_us(pid: int) -> float:
    """Microseconds of CPU that the process and its descendants have used so far, all threads."""
    return sum(_process_us(each) for each in descendants(pid))


def descendants(pid: int) -> list[int]:
    """The process and every process below it."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                # The command's name may hold anything, so read what follows its closing bracket.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended while we were looking
            children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def _process_us(pid: int) -> float:
    total_ns = 0
    try:
        tasks = list((_PROC / str(pid) / "task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    for task in tasks:
        try:
            total_ns += int((task / "schedstat").read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            if task.exists():
                return _ticks_us(pid)
    return total_ns / 1e3


def _ticks_us(pid: int) -> float:
    fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1e6 / os.sysconf("SC_CLK_TCK")


def memory_bytes(pid: int) -> int:
    """Proportional set size: what is its own, and its part of what it shares; 0 if it has ended."""
    try:
        text = (_PROC / str(pid) / "smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))
