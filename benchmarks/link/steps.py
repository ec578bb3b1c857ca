"""The cost of a pipeline's step beside the same rows in home: microseconds of wall time and of CPU a call.

`python -m benchmarks.link.steps`: a process with the far end of a link calls a model whose runs take no time,
in a closed loop of 16 and of 64 coroutines; in turns with coroutines of home that submit to its batcher. Rows
have 16 floats (64 B), or 50,000 (200 kB).
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import numpy as np
import uvloop

from benchmarks.request_cost.request_path import MODEL, serving
from cobatch.batcher.batcher import Batcher
from cobatch.batcher.request import Request
from cobatch.server.links.hub import Hub
from cobatch.server.links.step_end import LinkedModel, StepEnd
from cobatch.server.links.steps import CALLER, Caller, model

WIDTHS = (16, 50_000)
CALLERS = (16, 64)
_ROUNDS = 7
_CALLS = {16: 4096, 50_000: 512}
_QUEUE_ROWS = 1024
_TITLES = {
    "alone": "in home",
    "alone_cpu": "its CPU",
    "step": "step",
    "step_cpu": "its CPU",
    "home_cpu": "home's CPU",
}


class Alone(Request):
    """A row whose outputs are awaited in home."""

    __slots__ = ("answer",)

    def __init__(self, data: bytes, elements: int) -> None:
        super().__init__(1, ((elements,),), (data,))
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def done(self) -> None:
        assert self.batch is not None
        self.answer.set_result(self.batch.outputs[0][self.first_row].copy())


async def closed_loop(callers: int, calls: int, call: Callable[[], Awaitable[object]]) -> dict[str, float]:
    """Return the microseconds a call of `callers` coroutines: wall time, and this process's CPU."""

    async def caller() -> None:
        for _ in range(calls // callers):
            await call()

    wall_s, cpu_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*[caller() for _ in range(callers)])
    each = calls // callers * callers
    return {
        "wall_us": (time.perf_counter() - wall_s) / each * 1e6,
        "cpu_us": (time.process_time() - cpu_s) / each * 1e6,
    }


async def in_process(descriptors: list[int]) -> None:
    """Run the closed loops that home asks for, one a line."""
    end = StepEnd(descriptors, [LinkedModel(MODEL, _QUEUE_ROWS)])
    CALLER.set(Caller(end))
    step = model(MODEL)
    while line := await asyncio.to_thread(sys.stdin.readline):
        asked = json.loads(line)
        call = partial(step, x=np.ones((1, asked["elements"]), np.float32))
        print(json.dumps(await closed_loop(asked["callers"], asked["calls"], call)), flush=True)
    end.close()


async def _home(batcher: Batcher, elements: int, callers: int, calls: int) -> dict[str, float]:
    data = np.ones((1, elements), np.float32).tobytes()

    async def call() -> None:
        request = Alone(data, elements)
        batcher.submit(request)
        await request.answer

    return await closed_loop(callers, calls, call)


async def measure(elements: int, rounds: int = _ROUNDS, calls: int | None = None) -> dict[str, Any]:
    """Return the medians for rows of this width, by the number of callers."""
    calls = calls or _CALLS[elements]
    results: dict[str, Any] = {}
    async with serving(elements=elements) as make:
        inference = make().inference
        hub = Hub(inference)
        descriptors = hub.open_steps(lambda link, why, broken: None)
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.link.steps", *map(str, descriptors),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, pass_fds=descriptors,
        )  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        batcher = inference.models[MODEL].loaded_batcher
        for callers in CALLERS:
            columns: dict[str, list[float]] = {}
            for round_ in range(-1, rounds):
                alone = await _home(batcher, elements, callers, calls)
                asked = {"elements": elements, "callers": callers, "calls": calls}
                cpu_s = time.process_time()
                child.stdin.write(json.dumps(asked).encode() + b"\n")
                far = json.loads(await child.stdout.readline())
                home_us = (time.process_time() - cpu_s) / calls * 1e6
                row = {"alone": alone["wall_us"], "alone_cpu": alone["cpu_us"], "step": far["wall_us"],
                       "step_cpu": far["cpu_us"], "home_cpu": home_us}  # fmt: skip
                if round_ >= 0:  # the first one warms up
                    for name, value in row.items():
                        columns.setdefault(name, []).append(value)
            results[str(callers)] = {name: statistics.median(values) for name, values in columns.items()}
        child.stdin.close()
        await child.wait()
        hub.close()
    return results


async def main() -> None:
    """Print the table."""
    print(f"{'bytes':>9}{'callers':>9}" + "".join(f"{title:>12}" for title in _TITLES.values()) + "   us")
    for elements in WIDTHS:
        for callers, row in (await measure(elements)).items():
            times = "".join(f"{row[name]:>12.1f}" for name in _TITLES)
            print(f"{elements * 4:>9}{callers:>9}{times}   x{row['step'] / row['alone']:.1f}", flush=True)


if __name__ == "__main__":
    uvloop.run(in_process([int(one) for one in sys.argv[1:]]) if sys.argv[1:] else main())
