"""The instructions of a call of a batched function, of each library, counted under callgrind.

`python -m benchmarks.library --instructions` runs `python -m benchmarks.library.counting LIBRARY` as
`benchmarks.request_cost.guard` runs the request path. Time stands nearly still for cobatch's batcher, which
else would learn far more often than it does without callgrind.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import gc
import itertools
import sys
import unittest.mock
from types import SimpleNamespace

from benchmarks.library.peers import BATCH, BY_HAND, OURS, PEERS, Call, Library
from cobatch.batcher.batcher import Batcher
from cobatch.batcher.library import runner
from cobatch.engines import worker

CALLS = 20 * BATCH
_REPEATS = 3
_WARM_UP = 60
_NEVER_S = 3600


async def _count(library: Library, counter: ctypes.CDLL) -> None:
    async def caller(call: Call, count: int) -> None:
        for _ in range(count):
            await call("hello")

    async with library.calls() as call:
        await asyncio.gather(*[caller(call, _WARM_UP) for _ in range(BATCH)])
        gc.collect()
        gc.disable()
        for _ in range(_REPEATS):
            counter.begin()
            await asyncio.gather(*[caller(call, CALLS // BATCH) for _ in range(BATCH)])
            counter.end(library.name.encode())
        gc.enable()


def main(arguments: list[str]) -> None:
    sys.setswitchinterval(_NEVER_S)
    counter = ctypes.CDLL(arguments[0])
    clock = itertools.count(0.0, 1e-6).__next__
    with (
        unittest.mock.patch.object(worker, "time", SimpleNamespace(monotonic=clock)),
        unittest.mock.patch.object(runner, "Batcher", functools.partial(Batcher, clock=clock)),
    ):
        for library in [OURS, *PEERS, BY_HAND]:
            if library.version is not None or library is BY_HAND:
                asyncio.run(_count(library, counter))


if __name__ == "__main__":
    main(sys.argv[1:])
