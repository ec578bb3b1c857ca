"""The limits that the control groups of this process, usually its container's, set."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def limits(
    controller: str, name: str, old_name: str, cgroups: Path = CGROUPS, own: Path = OWN
) -> Iterator[str]:
    """Yield the texts of a limit's file in the group of this process and in those above it.

    `name`: of the file in cgroups v2, `old_name`: in v1; "" for none.
    """
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, file = cgroups, name
        elif controller in controllers.split(","):
            root, file = cgroups / controller, old_name
        else:
            continue
        # In a container the path may be that of the host, and the root is the container's group.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError):
                yield (folder / file).read_text().strip()
            if folder == root:
                break


def cores(cgroups: Path = CGROUPS, own: Path = OWN) -> float:
    """Return the cores that this process may use: those it may run on, or the least quota of its groups."""
    least = float(len(os.sched_getaffinity(0)))
    for text in limits("cpu", "cpu.max", "", cgroups, own):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit():
            least = min(least, int(quota) / int(period))
    old = (limits("cpu", "", f"cpu.cfs_{name}_us", cgroups, own) for name in ("quota", "period"))
    for quota, period in zip(*old, strict=True):
        if quota.isdigit():  # -1: none
            least = min(least, int(quota) / int(period))
    return least
