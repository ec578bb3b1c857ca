"""The CPU time that a request takes in each process: `python -m benchmarks.scaling.process_costs`.

One process, a front with home, and home alone are measured in this process: real protocols, batchers, worker
threads, links and shared memory, and an engine that does nothing. Home alone is fed by prepared datagrams.
The rest, such as sockets and the model, is the difference of a simulation to real servers with one and two
processes under `wrk`, at 64 connections. Other work of the machine hardly matters: the least of many rounds
counts. Writes process_costs.json, the input of `benchmarks.scaling.processes`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from itertools import product
from pathlib import Path as FilePath

import msgspec
import numpy as np
import uvloop
from msgspec import structs

from benchmarks import processes
from benchmarks.request_cost.link_path import link_ends, linked
from benchmarks.request_cost.request_path import ELEMENTS, Idle, Path, request_of, serving
from benchmarks.scaling.process_model import Costs, simulate
from cobatch.engines.link import slab
from cobatch.engines.link.messages import BUNDLE_IDS, Answers, Datagram, Submit, decode_to_front
from cobatch.engines.link.slab import SlabWriter
from cobatch.server.fronts.control import PAGE_BYTES
from cobatch.server.fronts.home import Downlinks
from cobatch.server.links.hub import Hub
from cobatch.server.links.remote import most_bundled

FILE = FilePath(__file__).with_name("process_costs.json")
# By the name of the load, which is a case of `benchmarks.processes` without its connections: floats, binary,
# requests that an iteration takes.
LOADS: dict[str, tuple[int, bool, int | None]] = {
    "tiny-json": (ELEMENTS, False, None),
    "tiny-binary": (ELEMENTS, True, None),
    "row-json": (50_176, False, 1),
}
# Requests at once, of each front; of longer rows more would wait for their turn to be read.
_SIZES, _LONG_SIZES, _FRONTS = (1, 4, 16, 64), (1, 2, 4, 8), (1, 4)
_ROUNDS, _TURNS = 40, 8
_CONNECTIONS, _SOCKET_TURNS, _STEPS = 64, 5, 4
_DATAGRAM_BYTES = 1 << 20

Turn = Callable[[], Awaitable[object]]


@contextlib.asynccontextmanager
async def home_alone(elements: int, fronts: int, requests: int) -> AsyncIterator[Turn]:
    """Yield a turn of home: each front sends a datagram of `requests` rows, and gets the answers."""
    loop = asyncio.get_running_loop()
    async with serving(elements=elements) as make:
        inference = make().inference
        downlinks, page = Downlinks(inference, Hub(inference)), slab.create("page", PAGE_BYTES)
        downlinks.use_page(page)
        done = asyncio.Event()
        sending: list[tuple[socket.socket, bytearray]] = []
        missing = 0

        def receive(front: int) -> None:
            nonlocal missing
            messages = decode_to_front(memoryview(sending[front][0].recv(_DATAGRAM_BYTES)))
            missing -= sum([len(message.ids) for message in messages if isinstance(message, Answers)])
            if not missing:
                done.set()

        for front in range(fronts):
            home_end, front_end = link_ends(-1)
            downlinks.add(front, home_end)
            messages = front_end.messages
            messages.setblocking(False)
            os.close(front_end.slab_in)
            datagram, bundles = _datagram(SlabWriter(front_end.slab_out), elements, requests)
            sending.append((messages, datagram))
            loop.add_reader(messages, receive, front)

        async def turn() -> None:
            nonlocal missing
            done.clear()
            missing = fronts * bundles
            for messages, datagram in sending:
                messages.send(datagram)
            await done.wait()

        try:
            yield turn
        finally:
            for messages, _ in sending:
                loop.remove_reader(messages)
                messages.close()
            downlinks.hub.close()


def _datagram(slab: SlabWriter, elements: int, requests: int) -> tuple[bytearray, int]:
    datagram = Datagram()
    bundle = most_bundled(Idle(elements).signature)
    for first in range(0, requests, bundle):
        rows = min(bundle, requests - first)
        size = 4 * elements * rows
        payload = slab.place([bytes(size)], size)
        assert payload is not None
        datagram.add(Submit((first + 1) * BUNDLE_IDS, 0, rows, (size,), payload, rows))
    return datagram.close(), len(range(0, requests, bundle))


async def measure(elements: int, binary: bool, at_once: int | None) -> Costs:
    """Measure a load."""
    request = request_of(binary, elements=elements)
    sizes = _SIZES if elements == ELEMENTS else _LONG_SIZES
    async with contextlib.AsyncExitStack() as stack:
        one = await stack.enter_async_context(serving(elements=elements))
        both = await stack.enter_async_context(linked(elements))
        turns: dict[tuple[str, int, int], Turn] = {}
        for size in sizes:
            for name, make in (("one", one), ("both", both)):
                path = Path(make, [request], size)
                turns[name, 1, size] = lambda path=path, size=size: path.serve(size)  # type: ignore[misc]
        for fronts, size in product(_FRONTS, sizes):
            if fronts * size <= max(sizes):  # one batch
                turns["home", fronts, size] = await stack.enter_async_context(
                    home_alone(elements, fronts, size)
                )
        for turn in turns.values():
            await turn()
        gc.collect()
        gc.freeze()
        gc.disable()
        us = dict.fromkeys(turns, float("inf"))
        for _ in range(_ROUNDS):
            for key, turn in turns.items():
                us[key] = min(us[key], await _timed(turn))
        gc.enable()
    return structs.replace(costs_of(us), at_once=at_once)


async def _timed(turn: Turn) -> float:
    await turn()
    began_s = time.process_time()
    for _ in range(_TURNS):
        await turn()
    return (time.process_time() - began_s) / _TURNS * 1e6


def costs_of(us: Mapping[tuple[str, int, int], float]) -> Costs:
    """Fit the costs to the times of turns, by kind, fronts and requests of each front."""
    at_home: dict[tuple[int, ...], float] = {}
    at_one: dict[tuple[int, ...], float] = {}
    at_front: dict[tuple[int, ...], float] = {}
    for (kind, fronts, size), took_us in us.items():
        if kind == "home":
            at_home[fronts * size, fronts, 1] = took_us
        elif kind == "one":
            at_one[size, 1] = took_us
        else:
            at_front[size, 1] = took_us - us["home", 1, size]
    one_request, one_batch = _fit(at_one)
    front_request, front_pair = _fit(at_front)
    home_request, home_pair, home_batch = _fit(at_home)
    return Costs(
        one_request=one_request,
        one_batch=one_batch,
        front_request=front_request,
        front_pair=front_pair,
        home_request=home_request,
        home_pair=home_pair,
        home_batch=home_batch,
    )


def _fit(points: Mapping[tuple[int, ...], float]) -> list[float]:
    """Return the cost of each count, by least squares of the relative errors. None is below 0."""
    counts, us = np.array(list(points)), np.array(list(points.values()))
    costs, *_ = np.linalg.lstsq(counts / us[:, None], np.ones(len(us)), rcond=None)
    return [round(max(0.0, float(cost)), 2) for cost in costs]


def calibrated(costs: Costs, load: str) -> Costs:
    """Add what real servers take: per request, the least of a few turns."""
    case = processes.CASES[f"{load}-{_CONNECTIONS}"]
    measured, client_us = [], []
    with processes.serving(case, 1) as one, processes.serving(case, 2) as two:
        for _ in range(_SOCKET_TURNS):
            before_s = _children_s()
            turn = processes.turn_of(one, case, case.message(), 2)
            client_us.append((_children_s() - before_s) / (turn.per_s * 2) * 1e6)
            measured.append((turn, processes.turn_of(two, case, case.message(), 2)))
    one_us = min(alone.all_us for alone, _ in measured)
    home_us = min(both.home_us for _, both in measured)
    front_us = min(both.all_us - both.home_us for _, both in measured)
    costs = structs.replace(costs, client=round(min(client_us), 2))
    for _ in range(_STEPS):  # sizes of datagrams depend on the costs
        alone, both = (simulate(costs, 2, number, _CONNECTIONS, 0.0, 5000, wrk=True) for number in (1, 2))
        costs = structs.replace(
            costs,
            one_apart=round(costs.one_apart + one_us - alone.all_us, 2),
            home_apart=round(costs.home_apart + home_us - both.home_us, 2),
            front_apart=round(costs.front_apart + front_us - (both.all_us - both.home_us), 2),
        )
    return costs


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure all loads."""
    costs = {name: calibrated(uvloop.run(measure(*load)), name) for name, load in LOADS.items()}
    FILE.write_bytes(msgspec.json.format(msgspec.json.encode(costs)) + b"\n")
    print(FILE.read_text())


if __name__ == "__main__":
    main()
