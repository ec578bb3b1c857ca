"""Print what a call costs with cobatch and with other libraries: `python -m benchmarks.library`.

64 callers call one after another. The libraries take turns; each figure is the median of its turns, and the
ratio that of the turns side by side. CPU is that of the process, all threads. Install the others with
`pip install -e .[library-peers]`; one that is not installed is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import time
from statistics import median
from typing import NamedTuple

from benchmarks.library.counting import CALLS
from benchmarks.library.peers import BATCH, BY_HAND, OURS, PEERS, Call, Library
from benchmarks.request_cost.guard import counted, tools

MOST_CPU_US = 12.0


class Turn(NamedTuple):
    """Microseconds of a call."""

    wall_us: float
    cpu_us: float


async def measure(library: Library, calls: int) -> Turn:
    """Let `BATCH` callers make `calls` calls each, after as many to warm up as each makes in a tenth."""

    async def caller(call: Call, count: int) -> None:
        for _ in range(count):
            if await call("hello") != 5:
                raise AssertionError("a wrong answer")

    async with library.calls() as call:
        await asyncio.gather(*[caller(call, calls // 10 + 1) for _ in range(BATCH)])
        gc.collect()
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        await asyncio.gather(*[caller(call, calls) for _ in range(BATCH)])
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    return Turn(wall_s / calls / BATCH * 1e6, cpu_s / calls / BATCH * 1e6)


def _count() -> int:
    programs = tools()
    if programs is None:
        print("valgrind or a C compiler is missing: apt-get install valgrind g++", file=sys.stderr)
        return 2
    counts = counted(*programs, "benchmarks.library.counting", CALLS)
    print(f"instructions per call, {BATCH} concurrent callers, Python {sys.version.split()[0]}")
    for name, count in counts.items():
        print(f"{name:24}{count:10,.0f}{count / counts[OURS.name]:8.2f}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.library", description=__doc__)
    parser.add_argument("--turns", type=int, default=9, help="turns of each library")
    parser.add_argument("--calls", type=int, default=300, help="calls of each of the 64 callers in a turn")
    parser.add_argument("--check", action="store_true", help="status 1 if another one costs less")
    parser.add_argument("--instructions", action="store_true", help="count instructions (needs valgrind)")
    options = parser.parse_args(arguments)
    if options.instructions:
        return _count()
    libraries = [OURS, *[one for one in PEERS if one.version is not None], BY_HAND]
    turns: dict[str, list[Turn]] = {library.name: [] for library in libraries}
    for _ in range(options.turns):
        for library in libraries:
            turns[library.name].append(asyncio.run(measure(library, options.calls)))
    print(f"microseconds per call, {BATCH} concurrent callers, Python {sys.version.split()[0]}")
    print(f"{'library':24}{'wall':>8}{'CPU':>8}{'CPU, times ours':>18}")
    least = float("inf")
    for library in libraries:
        own = turns[library.name]
        pairs = zip(own, turns[OURS.name], strict=True)
        ratio = median(turn.cpu_us / ours.cpu_us for turn, ours in pairs)
        if library in PEERS:
            least = min(least, ratio)
        wall_us, cpu_us = median(turn.wall_us for turn in own), median(turn.cpu_us for turn in own)
        title = f"{library.name} {library.version or ''}"
        print(f"{title:24}{wall_us:8.2f}{cpu_us:8.2f}{ratio:18.2f}")
    missing = [library.name for library in PEERS if library.version is None]
    if missing:
        print(f"not installed: {', '.join(missing)}")
    cost_us = median(turn.cpu_us for turn in turns[OURS.name])
    return int(options.check and (least < 1 or cost_us > MOST_CPU_US))


if __name__ == "__main__":
    sys.exit(main())
