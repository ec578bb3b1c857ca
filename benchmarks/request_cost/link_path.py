"""The request path with a front and home, in one process and one event loop, beside that of one process.

`python -m benchmarks.request_cost.link_path` passes bytes to a front's protocol, as
`benchmarks.request_cost.request_path` does to that of one process; between front and home are a real socket
and real shared memory. Prints the CPU time per request of both, the least of many rounds in turns, which
hardly depends on the machine's load. It has no wake-ups of other processes, which `benchmarks.processes` has.
`python -m benchmarks.request_cost.guard --link` runs it under callgrind and counts instructions.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvloop

from benchmarks.request_cost.request_path import ELEMENTS, REQUESTS, Path, request_of, serving
from cobatch.engines.link import slab
from cobatch.server.edge.fast_path import make_protocol
from cobatch.server.fronts.control import PAGE_BYTES, LinkEnds
from cobatch.server.fronts.front import Uplinks
from cobatch.server.fronts.home import Downlinks
from cobatch.server.links.hub import Hub

_CALLERS = (1, 64, 256)
_COUNTED_CALLERS = (1, 32, 64)
_ROUNDS = 40
_SLAB_BYTES = 1 << 26


@contextlib.asynccontextmanager
async def linked(elements: int = ELEMENTS) -> AsyncIterator[Callable[[], Any]]:
    """Serve through a front and home, and yield a function that makes the protocol of a connection."""
    async with serving(elements=elements) as make:
        connection = make()
        inference = connection.inference
        hub, uplinks = Hub(inference), Uplinks(inference.settings, 1)
        front = uplinks.make_inference(inference.settings, None)
        ready = asyncio.Event()
        front.on_ready = ready.set
        downlinks, page = Downlinks(inference, hub), slab.create("page", PAGE_BYTES)
        downlinks.use_page(os.dup(page))
        home_end, front_end = link_ends(page)
        downlinks.add(0, home_end)
        uplinks.use(front_end)
        await ready.wait()
        of_uvicorn = {"config": connection.config, "server_state": connection.server_state, "app_state": {}}
        protocol = make_protocol(front)
        yield lambda: protocol(**of_uvicorn, _loop=asyncio.get_running_loop())
        hub.close()
        assert uplinks.current is not None
        uplinks.current.end("the measurement ends")


def link_ends(page: int) -> tuple[LinkEnds, LinkEnds]:
    """Return home's end of a new link, and the front's, with the descriptor of home's page."""
    messages = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    handover = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in handover:
        end.close()  # nothing is relayed
    questions, answers = (slab.create("slab", _SLAB_BYTES) for _ in range(2))
    home = LinkEnds(messages[0], handover[0], slab.for_reading(questions), answers)
    front = LinkEnds(messages[1], handover[1], slab.for_reading(answers), questions, page)
    return home, front


async def measure() -> None:
    """Print the CPU times."""
    print(f"{'case':>12}{'one process':>14}{'front and home':>16}   microseconds per request")
    async with serving() as one, linked() as both:
        gc.collect()
        gc.freeze()
        gc.disable()
        for binary in (False, True):
            for callers in _CALLERS:
                paths = [Path(make, [request_of(binary)], callers) for make in (one, both)]
                times_us: list[list[float]] = [[] for _ in paths]
                for path in paths:
                    await path.serve(2048)
                for _ in range(_ROUNDS):
                    for path, times in zip(paths, times_us, strict=True):
                        began = time.process_time()
                        served = await path.serve(max(64, callers))
                        times.append((time.process_time() - began) / served * 1e6)
                alone, two = (min(times) for times in times_us)
                name = f"{'binary' if binary else 'JSON'} {callers}"
                print(
                    f"{name:>12}{alone:>14.1f}{two:>16.1f}   x{two / alone:.2f}, {two - alone:+.1f}",
                    flush=True,
                )


async def _counted(library: ctypes.CDLL) -> None:
    """Count the instructions of 1, 32 and 64 callers."""
    async with serving() as one, linked() as both:
        paths = {
            f"{'binary' if binary else 'JSON'} {callers}{name}": Path(make, [request_of(binary)], callers)
            for binary in (False, True)
            for callers in _COUNTED_CALLERS
            for name, make in (("", one), (", front and home", both))
        }
        for path in paths.values():
            await path.serve(512)
        gc.collect()
        gc.freeze()
        gc.disable()
        for _ in range(3):
            for case, path in paths.items():
                library.begin()
                await path.serve(REQUESTS)
                library.end(case.encode())


if __name__ == "__main__":
    if sys.argv[1:]:
        sys.setswitchinterval(3600)  # as in request_path
        uvloop.run(_counted(ctypes.CDLL(sys.argv[1])))
    else:
        uvloop.run(measure())
