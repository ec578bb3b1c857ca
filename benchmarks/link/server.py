"""The stress of the real server: large binary rows over HTTP to `cobatch serve --processes N`.

64 clients on connections of their own send rows of 200 kB, some read their answers late, and every answer is
checked. Meanwhile fronts and home are stopped for up to 1.5 s, or killed. Allowed are lost connections where
a front was killed, and 503 with Retry-After while home is stopped or starts again.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

import numpy as np
import uvloop
from onnx import TensorProto, helper, numpy_helper, save

from benchmarks.common.models import MODELS
from benchmarks.common.processes import Server, cobatch
from benchmarks.common.procstat import descendants
from benchmarks.link.clients import FLOATS, Load
from benchmarks.link.silences import Explained, Watcher

_CLIENTS = 64
_LONGEST_STALL_S = 1.5
_KILLED = 0.4  # part of the faults
# Processes that are younger are left alone: after the early death of one the supervisor waits on purpose.
_YOUNG_S = 5.0
# After this time without an answer no more faults until there is one: a busy machine takes long for a start.
_PATIENCE_S = 2.0
# The longest time without any answer, and until the first one after home was killed, beside waits for a CPU.
LIMIT_S, RESTART_LIMIT_S = 1.0, 1.5


def plus_one_model() -> Path:
    """Write the model that is served: y = x + 1."""
    path = MODELS / "plus_one.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", FLOATS]) for name in ("x", "y")
    ]
    one = numpy_helper.from_array(np.ones(1, np.float32), "one")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "one"], ["y"])], "plus_one", values[:1], values[1:], [one]
    )
    save(helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


class Disturber:
    """Stops and kills children of the supervisor."""

    def __init__(self, load: Load, watcher: Watcher, every_s: float) -> None:
        self.load = load
        self.watcher = watcher
        self.every_s = every_s
        self.seen: dict[int, float] = {}  # since when there is a process

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            await asyncio.sleep(random.expovariate(1 / self.every_s))
            names = self.old()
            if not names or time.monotonic() - self.watcher.heard_s > _PATIENCE_S:
                continue
            name = random.choice(list(names))
            kind = name.split()[0]
            with suppress(ProcessLookupError):
                if random.random() < _KILLED:
                    self.load.counts[f"{kind}s killed"] += 1
                    os.kill(names[name], signal.SIGKILL)
                    if kind == "home":
                        self.watcher.kills.append(time.monotonic())
                else:
                    self.load.counts[f"{kind}s stopped"] += 1
                    await self.stop(name, names)

    def old(self) -> dict[str, int]:
        """Return the processes by name that are not young."""
        now_s = time.monotonic()
        processes = self.watcher.processes
        self.seen = {process: self.seen.get(process, now_s) for process in processes.values()}
        return {name: one for name, one in processes.items() if self.seen[one] <= now_s - _YOUNG_S}

    async def stop(self, name: str, old: dict[str, int]) -> None:
        """Stop a process. It explains a silence if no other front has many connections."""
        others = old.keys() - {name, "home"}
        began_s = time.monotonic()
        os.kill(old[name], signal.SIGSTOP)
        try:
            await asyncio.sleep(random.uniform(0.05, _LONGEST_STALL_S))
        finally:
            os.kill(old[name], signal.SIGCONT)
        if name == "home" or not others:
            self.watcher.stops.append((began_s, time.monotonic()))


@contextmanager
def serving(processes: int) -> Iterator[Server]:
    """Start the server; check that none of its processes is left at the end."""
    flags = ("--processes", str(processes), "--threads", "1", "--max-batch-size", "16")
    with cobatch(plus_one_model(), "plus_one", fast_path=True, flags=flags) as server:
        yield server
        before = descendants(server.pid)
    left = [process for process in before if Path(f"/proc/{process}").exists()]
    assert not left, f"processes are left: {left}"


async def disturbed(load: Load, watcher: Watcher, every_s: float) -> None:
    """Run the load beside the disturber."""
    disturbing = asyncio.create_task(Disturber(load, watcher, every_s).run())
    async with asyncio.TaskGroup() as group:
        for _ in range(_CLIENTS):
            group.create_task(load.client())
        group.create_task(load.watch())
    disturbing.cancel()
    with suppress(asyncio.CancelledError):
        await disturbing


def run(requests: int, fronts: int, every_s: float) -> list[str]:
    """Run the stress, print its figures, and return its faults. SIGINT ends it early."""
    began_s = time.monotonic()
    with serving(fronts + 1) as server:
        watcher = Watcher(server.pid)
        load = Load(server.address, requests, watcher)
        with suppress(KeyboardInterrupt):
            uvloop.run(disturbed(load, watcher, every_s))
    took_s = time.monotonic() - began_s
    print(f"{took_s:.0f} s: " + ", ".join(f"{count:,} {name}" for name, count in load.counts.items()))
    faults = [f"{count} times {fault}" for fault, count in load.faults.items() if count]
    if not load.done:
        faults.append(f"{requests - load.counts['answered']:,} requests were not sent")
    explained = list(watcher.explain())
    for after_kill, limit_s, what in (
        (True, RESTART_LIMIT_S, "after home was killed"),
        (False, LIMIT_S, "else"),
    ):
        silences = [silence for killed, silence in explained if killed is after_kill]
        faults += faults_of(silences, limit_s, what)
    return faults


def faults_of(silences: list[Explained], limit_s: float, what: str) -> list[str]:
    """Print the silences of a kind, and return the faults."""
    if not silences:
        return []
    typical_s = median([silence.length_s for silence in silences])
    print(f"{len(silences)} times without any answer {what}: {typical_s:.2f} s (median)")
    worst = max(silences, key=lambda silence: silence.unexplained_s)
    print(f"    the longest: {max(silences)}\n    the one with the most left: {worst}")
    return [f"no answer for {worst} {what}"] if worst.unexplained_s > limit_s else []
