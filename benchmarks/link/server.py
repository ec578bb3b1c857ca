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
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

from benchmarks.common.models import MODELS
from benchmarks.common.processes import Server, cobatch
from benchmarks.common.procstat import descendants
from benchmarks.link.workers import ROW_BYTES, waited_s

_FLOATS = ROW_BYTES // 4
_CLIENTS = 64
_LATE, _LATEST_S = 0.01, 0.3
_SILENCE_S = 0.05
_PAUSE_S = 0.05
_LONGEST_STALL_S = 1.5
# Processes that are younger are left alone: after the early death of one the supervisor waits on purpose.
_YOUNG_S = 5.0
# Requests of a connection: those of a front that was killed spread again over all fronts.
_REQUESTS = 50
# Answers that home had sent still come in after its death.
_LATE_S = 0.5
_HANG_S = 60.0
# The longest time without any answer, and until the first one after home was killed, beside waits for a CPU.
LIMIT_S, RESTART_LIMIT_S = 1.0, 1.5


def plus_one_model() -> Path:
    """Write the model that is served: y = x + 1."""
    path = MODELS / "plus_one.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", _FLOATS]) for name in ("x", "y")
    ]
    one = numpy_helper.from_array(np.ones(1, np.float32), "one")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "one"], ["y"])], "plus_one", values[:1], values[1:], [one]
    )
    save(helper.make_model(graph, ir_version=9, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


class Slot:
    """A client's request, with random whole numbers; the first and the last are the number of the request."""

    def __init__(self) -> None:
        text = (
            f'{{"inputs":[{{"name":"x","datatype":"FP32","shape":[1,{_FLOATS}],'
            f'"parameters":{{"binary_data_size":{ROW_BYTES}}}}}],"parameters":{{"binary_data_output":true}}}}'
        ).encode()
        head = (
            "POST /v2/models/plus_one/infer HTTP/1.1\r\nHost: stress\r\n"
            f"Content-Length: {len(text) + ROW_BYTES}\r\n"
            f"Inference-Header-Content-Length: {len(text)}\r\n\r\n"
        ).encode()
        self.request = bytearray(head + text + bytes(ROW_BYTES))
        self.row = np.frombuffer(self.request, "<f4", _FLOATS, len(head) + len(text))
        self.row[:] = np.random.default_rng().integers(0, 1 << 20, _FLOATS)

    def next(self, number: int) -> None:
        """Make the next request."""
        self.row[0] = self.row[-1] = number % (1 << 20)

    def is_right(self, data: bytes) -> bool:
        """Check an answer's data."""
        return np.array_equal(np.frombuffer(data, "<f4"), self.row + 1)


class Load:
    """The clients. `answered_s`: when the last answer came."""

    def __init__(self, address: str, pid: int, requests: int) -> None:
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.silences: list[tuple[float, float, float]] = []
        self.waited_s: dict[int, float] = {}  # of each process, for a CPU
        self.answered_s = time.monotonic()
        self._host, _, self._port = address.rpartition(":")
        self._requests = requests
        self._number = 0
        self._pid = pid

    @property
    def done(self) -> bool:
        """Are all requests answered?"""
        return self.counts["answered"] >= self._requests

    async def client(self) -> None:
        """Ask until all is done, on a new connection after the end of one."""
        slot = Slot()
        while not self.done:
            try:
                reader, writer = await asyncio.open_connection(self._host, int(self._port), limit=1 << 20)
            except OSError:
                self.faults["no connection"] += 1
                await asyncio.sleep(_PAUSE_S)
                continue
            with closing(writer):
                try:
                    for _ in range(_REQUESTS):
                        if self.done or not await self.ask(slot, reader, writer):
                            break
                except (OSError, EOFError):
                    self.counts["lost"] += 1

    async def ask(self, slot: Slot, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Ask once; return True if the connection can be used again."""
        self._number += 1
        slot.next(self._number)
        writer.write(slot.request)
        await writer.drain()
        if random.random() < _LATE:
            await asyncio.sleep(random.uniform(0, _LATEST_S))
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        body = await reader.readexactly(int(head.partition("content-length: ")[2].split("\r\n", 1)[0]))
        status = head.split(" ", 2)[1]
        if status == "200":
            self.hear()
            self.counts["answered"] += 1
            self.faults["wrong"] += not slot.is_right(body[-ROW_BYTES:])
        elif status == "503" and "\r\nretry-after: " in head:
            self.counts["503"] += 1
            await asyncio.sleep(_PAUSE_S)
        else:
            self.faults[f"{status} {body[:200]!r}"] += 1
        return "\r\nconnection: close" not in head

    def hear(self) -> None:
        """Note a silence that ends now."""
        now_s = time.monotonic()
        if now_s - self.answered_s > _SILENCE_S:
            before, after = self.waited_s, self.look()
            waits = sum(waited - before.get(process, 0.0) for process, waited in after.items())
            self.silences.append((self.answered_s, now_s, min(waits, now_s - self.answered_s)))
        self.answered_s = now_s

    def look(self) -> dict[int, float]:
        """Note how long each process has waited for a CPU, this one too, and return it."""
        self.waited_s = {process: waited_s([process]) for process in [*descendants(self._pid), os.getpid()]}
        return self.waited_s

    async def watch(self) -> None:
        """Look at the processes. Raises TimeoutError if no answer comes."""
        while not self.done:
            self.look()
            if time.monotonic() - self.answered_s > _HANG_S:
                raise TimeoutError(f"no answer for {_HANG_S} s, after {self.counts['answered']}")
            await asyncio.sleep(_SILENCE_S)


class Disturber:
    """Stops and kills children of the supervisor. `stops` and `kills`: of home, CLOCK_MONOTONIC."""

    def __init__(self, load: Load, every_s: float) -> None:
        self.load = load
        self.every_s = every_s
        self.stops: list[tuple[float, float]] = []
        self.kills: list[float] = []
        self.seen: dict[int, float] = {}  # since when there is a process

    async def run(self) -> None:
        """Go on until cancelled."""
        while True:
            await asyncio.sleep(random.expovariate(1 / self.every_s))
            names = self.old()
            if not names:
                continue
            name = random.choice(list(names))
            if random.random() < 0.4:
                self.load.counts[f"{name.split()[0]}s killed"] += 1
                if name == "home":
                    self.kills.append(time.monotonic())
                with suppress(ProcessLookupError):
                    os.kill(names[name], signal.SIGKILL)
            else:
                self.load.counts[f"{name.split()[0]}s stopped"] += 1
                await self.stop(name, names[name])

    def old(self) -> dict[str, int]:
        """Return the processes by name that are not young."""
        now_s = time.monotonic()
        names = {name: process for process in self.load.waited_s if (name := _name_of(process))}
        self.seen = {process: self.seen.get(process, now_s) for process in names.values()}
        return {name: process for name, process in names.items() if self.seen[process] <= now_s - _YOUNG_S}

    async def stop(self, name: str, process: int) -> None:
        began_s = time.monotonic()
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGSTOP)
            try:
                await asyncio.sleep(random.uniform(0.05, _LONGEST_STALL_S))
            finally:
                os.kill(process, signal.SIGCONT)
        if name == "home":
            self.stops.append((began_s, time.monotonic()))

    def explain(self) -> Iterator[tuple[bool, float]]:
        """Yield for each silence, was home killed meanwhile, and its length without stops and waits."""
        for began_s, ended_s, waited in self.load.silences:
            killed = [at_s for at_s in self.kills if began_s - _LATE_S <= at_s < ended_s]
            length_s = ended_s - max([began_s, *killed[-1:]]) - waited
            for start_s, end_s in self.stops:
                length_s -= max(0.0, min(ended_s, end_s) - max(began_s, start_s))
            yield bool(killed), max(0.0, length_s)


def _name_of(process: int) -> str:
    """Return `home`, `front N`, or "" for another process."""
    with suppress(OSError):
        *command, name, _ = Path(f"/proc/{process}/cmdline").read_text().split("\0")
        if "cobatch.server.fronts.child" in command:
            return name
    return ""


@contextmanager
def serving(processes: int) -> Iterator[Server]:
    """Start the server; check that none of its processes is left at the end."""
    flags = ("--processes", str(processes), "--threads", "1", "--max-batch-size", "16")
    with cobatch(plus_one_model(), "plus_one", fast_path=True, flags=flags) as server:
        yield server
        before = descendants(server.pid)
    left = [process for process in before if Path(f"/proc/{process}").exists()]
    assert not left, f"processes are left: {left}"


async def load_of(server: Server, requests: int, every_s: float) -> tuple[Load, Disturber]:
    """Run the load beside the disturber."""
    load = Load(server.address, server.pid, requests)
    disturber = Disturber(load, every_s)
    disturbing = asyncio.create_task(disturber.run())
    async with asyncio.TaskGroup() as group:
        for _ in range(_CLIENTS):
            group.create_task(load.client())
        group.create_task(load.watch())
    disturbing.cancel()
    with suppress(asyncio.CancelledError):
        await disturbing
    return load, disturber


def run(requests: int, fronts: int, every_s: float) -> list[str]:
    """Run the stress, print its figures, and return its faults."""
    began_s = time.monotonic()
    with serving(fronts + 1) as server:
        load, disturber = asyncio.run(load_of(server, requests, every_s))
    took_s = time.monotonic() - began_s
    print(f"{took_s:.0f} s: " + ", ".join(f"{count:,} {name}" for name, count in load.counts.items()))
    silences = list(disturber.explain())
    faults = [f"{count} times {fault}" for fault, count in load.faults.items() if count]
    longest_s = max((ended_s - began_s for began_s, ended_s, _ in load.silences), default=0.0)
    print(f"the longest time without any answer: {longest_s:.2f} s; without stops and waits for a CPU")
    for killed, limit_s, what in ((True, RESTART_LIMIT_S, "after home was killed"), (False, LIMIT_S, "else")):
        worst_s = max((length_s for after, length_s in silences if after is killed), default=0.0)
        print(f"    {what}: {worst_s:.2f} s")
        if worst_s > limit_s:
            faults.append(f"no answer for {worst_s:.2f} s {what}")
    return faults
