"""Times without any answer of a server, and the parts of them that stops and waits for a CPU explain.

The processes are looked at again and again: how long has a thread of each waited for a CPU since the last
look? While home is killed, the next answer depends on the supervisor until there is another home, and on that
from then on. Else it depends on home, fronts and clients, one after another. A silence in which all of them
sleep has no explanation.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from benchmarks.link.workers import thread_waits_s

# A shorter one is none.
SILENCE_S = 0.1
# Answers that home had sent still come in after its death.
_LATE_S = 2.0


class Explained(NamedTuple):
    """A silence: its length, and how long of it a process was stopped, or waited for a CPU."""

    length_s: float
    stopped_s: float
    waited_s: float

    @property
    def unexplained_s(self) -> float:
        return max(0.0, self.length_s - self.stopped_s - self.waited_s)

    def __str__(self) -> str:
        return (
            f"{self.length_s:.2f} s, of these stopped {self.stopped_s:.2f} s,"
            f" waiting for a CPU {self.waited_s:.2f} s: {self.unexplained_s:.2f} s are left"
        )


class Look(NamedTuple):
    """For how long the processes have waited for a CPU since the look before, by name."""

    at_s: float
    waited_s: dict[str, float]

    def explains_s(self, *, restarting: bool) -> float:
        """Return the time that the next answer waited. `restarting`: home was killed."""
        if restarting:
            return self.waited_s.get("home", self.waited_s.get("supervisor", 0.0))
        return sum(self.waited_s.values())


class Watcher:
    """Looks at a server and at this process, which has its clients. `stops`: of what all answers need."""

    def __init__(self, supervisor: int) -> None:
        self.stops: list[tuple[float, float]] = []
        self.kills: list[float] = []  # of home
        self.looks: list[Look] = []
        self.processes: dict[str, int] = {}  # home and fronts
        self.silences: list[tuple[float, float]] = []
        self.heard_s = time.monotonic()
        self._supervisor = supervisor
        self._waits_s: dict[Path, float] = {}  # of each thread
        self._names: dict[int, str] = {}

    def look(self) -> None:
        """Find the processes, and note their waits."""
        self.processes = {name: process for process in self._children() if (name := self._name(process))}
        before, self._waits_s, waited_s = self._waits_s, {}, {}
        for name, process in (
            *self.processes.items(),
            ("supervisor", self._supervisor),
            ("clients", os.getpid()),
        ):
            waits_s = thread_waits_s(process)
            self._waits_s |= waits_s
            # Threads wait for one another; the longest wait is on the path.
            waited_s[name] = max([wait - before.get(one, 0.0) for one, wait in waits_s.items()], default=0.0)
        self.looks.append(Look(time.monotonic(), waited_s))

    def hear(self) -> None:
        """Note an answer, and the silence that it ends."""
        now_s = time.monotonic()
        if now_s - self.heard_s > SILENCE_S:
            self.look()
            self.silences.append((self.heard_s, now_s))
        self.heard_s = now_s

    def explain(self) -> Iterator[tuple[bool, Explained]]:
        """Yield each silence, and whether home was killed before or in it: it begins with that then."""
        looks = _spread(self.looks)
        for silence_s, ended_s in self.silences:
            kills = [at_s for at_s in self.kills if silence_s - _LATE_S <= at_s < ended_s]
            began_s = max([silence_s, *kills[-1:]])
            stopped_s = waited_s = 0.0
            first = max(0, bisect_left(looks, began_s, key=lambda look: look.at_s) - 1)
            for before, look in pairwise(looks[first:]):
                if before.at_s >= ended_s:
                    break
                start_s, end_s = max(before.at_s, began_s), min(look.at_s, ended_s)
                stop_s = overlap_s(self.stops, start_s, end_s)
                stopped_s += stop_s
                explained_s = look.explains_s(restarting=bool(kills))
                waited_s += max(0.0, min(end_s - start_s - stop_s, explained_s))
            yield bool(kills), Explained(ended_s - began_s, stopped_s, waited_s)

    def _children(self) -> list[int]:
        path = Path(f"/proc/{self._supervisor}/task/{self._supervisor}/children")
        return [int(process) for process in path.read_text().split()]

    def _name(self, process: int) -> str:
        """Return `home`, `front N`, or "" for another process."""
        if process not in self._names:
            with suppress(OSError, ValueError):
                *command, name, _ = Path(f"/proc/{process}/cmdline").read_text().split("\0")
                if "cobatch.server.fronts.child" in command:
                    self._names[process] = name
        return self._names.get(process, "")


def _spread(looks: Sequence[Look]) -> list[Look]:
    """Move waits to when they were: the kernel counts one at its end, and it may last for many looks."""
    spread = []
    carried_s: dict[str, float] = {}
    for before, look in reversed(list(pairwise(looks))):
        waits_s = {name: waited_s + carried_s.get(name, 0.0) for name, waited_s in look.waited_s.items()}
        length_s = look.at_s - before.at_s
        now_s = {name: min(wait_s, length_s) for name, wait_s in waits_s.items()}
        spread.append(Look(look.at_s, now_s))
        # Not to a time when there was no such process.
        carried_s = {name: waits_s[name] - now_s[name] for name in waits_s.keys() & before.waited_s}
    return [*looks[:1], *reversed(spread)]


def overlap_s(stops: Collection[tuple[float, float]], start_s: float, end_s: float) -> float:
    """Return how much of a time was in stops, which do not overlap."""
    return sum(max(0.0, min(end_s, ended_s) - max(start_s, began_s)) for began_s, ended_s in stops)
