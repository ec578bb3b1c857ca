"""CPU time and memory of a server's processes, from /proc.

schedstat counts nanoseconds of CPU time for each thread; /proc/PID/stat counts ticks of 10 ms and is the
fallback for kernels without schedstat. Threads that have ended are not counted; the servers' threads do not
end.
"""

from __future__ import annotations

import os
from pathlib import Path

_PROC = Path("/proc")


def cpu_us(pid: int) -> float:
    """Return the CPU time of a process and its descendants in microseconds, of all threads."""
    return sum(_process_us(each) for each in descendants(pid))


def descendants(pid: int) -> list[int]:
    """Return the process and all processes below it."""
    children: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            try:
                # The command's name may contain anything: read after its closing bracket.
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended meanwhile
            children.setdefault(parent, []).append(int(entry.name))
    pids = [pid]
    for each in pids:
        pids += children.get(each, [])
    return pids


def children(supervisor: int) -> dict[str, int]:
    """Return the processes of a supervisor's children by their names: home, front 0, front 1, ..."""
    named = {}
    for pid in (_PROC / f"{supervisor}/task/{supervisor}/children").read_text().split():
        try:
            named[(_PROC / pid / "cmdline").read_bytes().split(b"\0")[-2].decode()] = int(pid)
        except (OSError, IndexError):  # it has just ended
            continue
    return named


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
    """Return the proportional set size of a process; 0 if it has ended."""
    try:
        text = (_PROC / str(pid) / "smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))
