"""Large rows over links whose processes stall, die and read slowly: `python -m benchmarks.link.stress`.

Each front keeps 72 requests of 200 kB open, as far as its slab has room. Home answers them in batches, from
block to block of shared memory. Every answer is checked, and some again when they are given back. Meanwhile
fronts and home are stopped for up to 1.5 s (SIGSTOP), or killed and started again. If a link has no answer
for a second, a process must have been stopped or have waited for a CPU. Ends with status 1 otherwise, if an
answer is wrong, or if a block or a descriptor is left over.

`--server`: the same over HTTP to a real server (`benchmarks.link.server`), about 3,000 rows/s on two cores;
it prints its progress, and Ctrl-C or SIGTERM end it with the figures so far.
"""

from __future__ import annotations

import argparse
import random
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence

from benchmarks.link import server
from benchmarks.link.ends import link
from benchmarks.link.silences import Explained
from benchmarks.link.workers import SLAB_BYTES, Leftover, Report, Silence, decode

_LONGEST_STALL_S = 1.5
_LOOK_S = 0.02
_HANG_S = 60.0
LIMIT_S = 1.0


class Child:
    """A front, or home (-1)."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        role = "home" if number < 0 else "front"
        command = [sys.executable, "-m", "benchmarks.link.workers", role, str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=(theirs.fileno(),))
        theirs.close()
        self.ready = False

    def end(self) -> None:
        """Kill it, if it lives, and forget it."""
        self.process.kill()
        self.process.wait()
        self.control.close()


class Stress:
    """The supervisor: starts processes, links them, disturbs them, and gathers what fronts report."""

    def __init__(self, fronts: int, every_s: float) -> None:
        self.every_s = every_s
        self.counts: Counter[str] = Counter()
        self.silences: list[tuple[int, Silence]] = []
        self.explained: list[Explained] = []
        self.stops: list[tuple[int, float, float]] = []
        self.leftovers: dict[int, Leftover] = {}
        self.selector = selectors.DefaultSelector()
        self.children: dict[int, Child] = {}
        self.stopped: dict[int, float] = {}
        self.disturb_s = time.monotonic() + 2 * every_s
        for number in range(-1, fronts):
            self.start(number)

    def start(self, number: int) -> None:
        child = self.children[number] = Child(number)
        self.selector.register(child.control, selectors.EVENT_READ, child)

    def link(self, front: Child) -> None:
        """Link a front and home, once both are ready."""
        home = self.children[-1]
        if front.ready and home.ready:
            for child, ends in zip((front, home), link(SLAB_BYTES), strict=True):
                socket.send_fds(child.control, [b"%d" % home.process.pid], ends)
                ends.close()

    def look(self, timeout_s: float = _LOOK_S) -> None:
        """Read reports; start processes again that have ended."""
        for key, _ in self.selector.select(timeout_s):
            child: Child = key.data
            try:
                data = child.control.recv(1 << 16)
            except ConnectionError:  # it was killed before it received all
                data = b""
            if data:
                self.take(child, decode(data))
            else:
                self.selector.unregister(child.control)
                child.end()
                if child.number not in self.leftovers:
                    self.counts["died"] += 1
                    self.start(child.number)

    def take(self, child: Child, message: Report | Leftover) -> None:
        if isinstance(message, Leftover):
            self.leftovers[child.number] = message
        elif not child.ready:
            child.ready = True
            for front in self.children.values():
                if front.number >= 0 and (front is child or child.number < 0):
                    self.link(front)
        else:
            for name in ("answered", "dropped", "failed", "full", "wrong"):
                self.counts[name] += getattr(message, name)
            self.silences += [(child.number, silence) for silence in message.silences]

    def disturb(self) -> None:
        """Stop or kill a process now and then, and continue those that were stopped."""
        now_s = time.monotonic()
        for number in [number for number, until_s in self.stopped.items() if until_s <= now_s]:
            self.resume(number)
        if now_s < self.disturb_s:
            return
        self.disturb_s = now_s + random.expovariate(1 / self.every_s)
        child = self.children[random.choice([-1, *self.children])]
        if not child.ready or child.number in self.stopped:
            return
        if random.random() < 0.4:
            self.counts["killed"] += 1
            child.process.kill()
        else:
            self.counts["stopped"] += 1
            child.process.send_signal(signal.SIGSTOP)
            self.stopped[child.number] = now_s + random.uniform(0.05, _LONGEST_STALL_S)
            self.stops.append((child.number, now_s, 0.0))

    def resume(self, number: int) -> None:
        del self.stopped[number]
        self.children[number].process.send_signal(signal.SIGCONT)
        at = max(at for at, stop in enumerate(self.stops) if stop[0] == number)
        self.stops[at] = (number, self.stops[at][1], time.monotonic())

    def run(self, requests: int) -> None:
        """Go on until this number of answers has been checked; then stop all, and explain the silences."""
        progress, progress_s = 0, time.monotonic()
        while self.counts["answered"] < requests:
            self.look()
            self.disturb()
            if self.counts["answered"] > progress:
                progress, progress_s = self.counts["answered"], time.monotonic()
            if time.monotonic() - progress_s > _HANG_S:
                raise TimeoutError(f"no answer for {_HANG_S} s, after {progress}")
        for number in list(self.stopped):
            self.resume(number)
        self.stop()
        self.explain()

    def stop(self) -> None:
        """Stop the fronts, then home. Raises TimeoutError if they do not."""
        give_up_s = time.monotonic() + _HANG_S
        for numbers in ([number for number in self.children if number >= 0], [-1]):
            told: set[Child] = set()
            while not self.leftovers.keys() >= set(numbers):
                for child in [self.children[number] for number in numbers]:
                    if child.ready and child not in told and self.children[-1].ready:
                        told.add(child)
                        child.control.send(b"stop")
                self.look()
                if time.monotonic() > give_up_s:
                    raise TimeoutError(f"processes {numbers} do not stop")
        for child in self.children.values():
            child.end()

    def explain(self) -> None:
        """Find the actions of the processes during each silence of their link."""
        for front, silence in self.silences:
            stopped_s, at_s = 0.0, silence.began_s
            for number, began_s, ended_s in sorted(self.stops, key=lambda stop: stop[1]):
                overlap_s = min(silence.ended_s, ended_s) - max(at_s, began_s)
                if number in (-1, front) and overlap_s > 0:
                    stopped_s += overlap_s
                    at_s = ended_s
            length_s = silence.ended_s - silence.began_s
            self.explained.append(Explained(length_s, stopped_s, silence.waited_s))

    def faults(self, limit_s: float = LIMIT_S) -> list[str]:
        """Return the faults. `limit_s`: the longest silence without an explanation."""
        faults = []
        if self.counts["wrong"]:
            faults.append(f"{self.counts['wrong']} answers are wrong")
        for number, leftover in self.leftovers.items():
            if leftover.blocks or leftover.descriptors:
                name = "home" if number < 0 else f"front {number}"
                faults.append(f"{name} has {leftover.blocks} blocks, {leftover.descriptors} descriptors left")
        worst = max((silence.unexplained_s for silence in self.explained), default=0.0)
        if worst > limit_s:
            faults.append(f"no answer for {worst:.2f} s without an explanation")
        return faults


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stress; return 1 if it has found a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--fronts", type=int, default=2)
    parser.add_argument("--every", type=float, default=1.0, metavar="S", help="mean time between faults")
    parser.add_argument("--server", action="store_true", help="over HTTP to a real server")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # of `timeout`: end all processes
    if options.server:
        faults = server.run(options.requests, options.fronts, options.every)
    else:
        faults = run(options.requests, options.fronts, options.every)
    for fault in faults:
        print(fault)
    return 1 if faults else 0


def run(requests: int, fronts: int, every_s: float) -> list[str]:
    """Run the stress, print its figures, and return its faults."""
    began_s = time.monotonic()
    stress = Stress(fronts, every_s)
    try:
        stress.run(requests)
    finally:
        for child in stress.children.values():
            child.end()
    took_s = time.monotonic() - began_s
    print(f"{took_s:.0f} s: " + ", ".join(f"{count:,} {name}" for name, count in stress.counts.items()))
    for silence in sorted(stress.explained, reverse=True)[:3]:
        print(f"no answer for {silence}")
    worst = max((silence.unexplained_s for silence in stress.explained), default=0.0)
    print(f"the longest silence without an explanation: {worst:.2f} s")
    return stress.faults()


if __name__ == "__main__":
    sys.exit(main())
